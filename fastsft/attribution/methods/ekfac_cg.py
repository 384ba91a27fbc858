"""EK-FAC influence functions refined by conjugate gradient: the curvature itself instead of its Kronecker factors."""

# N samples, Q queries, P followed parameters end to end, O outputs, I inputs

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsft.attribution.methods._base import Moments
from fastsft.attribution.methods._curvature_products import ggn_products, twice_differentiable
from fastsft.attribution.methods._gradients import Directions, Turn
from fastsft.attribution.methods.ekfac import EkFac
from fastsft.data import Row
from fastsft.sketch import Whitening
from fastsft.sketch.passes import Batching, make_batch

Product = Callable[[Tensor], Tensor]


class EkFacCg(EkFac):
    """score(i, q) = 1/N <v_q, g_i>,  (H + damping) v_q = g_q, solved by `iterations` of conjugate gradient.

    H: Gauss-Newton matrix of the samples' mean loss by the followed weights, exact products over all samples or
    `max_documents` of them, evenly spaced. EK-FAC (empirical Fisher) is the preconditioner, and the answer where
    `iterations` is 0; damping is EK-FAC's own, a share of each layer's mean eigenvalue. Each iteration lowers the error
    of v_q in the norm of H + damping, and costs two backward passes a query and document: 2 Q * documents * iterations
    in all, at every checkpoint.

    residuals: after scoring, of each checkpoint, of the last block of queries [iterations + 1, Q], in the
    preconditioner's norm as a share of g_q's: 1 at first, 0 where solved.
    """

    name = "ekfac_cg"
    unit = "nats per response token that the query would lose if the sample were removed (influence function)"

    def __init__(
        self,
        *,
        iterations: int = 10,
        damping: float = 0.1,
        max_documents: int | None = None,
        product_bytes: int = 2**32,
        batching: Batching | None = None,
        direction_bytes: int = 2**31,
    ) -> None:
        super().__init__(
            damping=damping, max_documents=max_documents, batching=batching, direction_bytes=direction_bytes
        )
        if iterations < 0:
            raise ValueError(f"`iterations` of conjugate gradient must be 0 or more: got {iterations}.")
        self.iterations, self.product_bytes = iterations, product_bytes
        self.residuals: dict[str, Tensor] = {}

    def _queries_at_once(self) -> int:
        return max(1, super()._queries_at_once() // 6)  # solution, residual, search direction, and what they become

    def turn(self, moments: Moments | None) -> Turn:
        """Fit the preconditioner at the model's weights; the solving waits for the queries."""
        checkpoint, number = self.checkpoints[len(self.turns)].name, len(self.samples)
        documents = number if self.max_documents is None else min(number, self.max_documents)
        chosen = [self.samples[place * number // documents] for place in range(documents)]
        whitening = self.whitening(chosen)

        def turned(directions: Directions) -> Directions:
            flat = _Flat(directions)
            start = flat.join(directions)
            solved, self.residuals[checkpoint] = conjugate_gradient(
                self._damped_curvature(chosen, whitening, flat),
                lambda r: flat.join({name: whitening.layers[name].precondition(part) for name, part in flat.split(r)}),
                start,
                self.iterations,
            )
            return dict(flat.split(solved.div_(number)))

        return turned

    def _damped_curvature(self, rows: Sequence[Row], whitening: Whitening, flat: _Flat) -> Product:
        """The map v -> (H + damping) v of [Q, P] at the weights that the model has when it is called."""
        parameters = dict(self.model.named_parameters())
        weights = [parameters[name] for name in flat.names]
        plan = self.batching.plan(rows)
        dampings = [_damping(whitening.layers[name].scale, self.damping) for name in flat.names]

        def product(vectors: Tensor) -> Tensor:
            parts = [part for _, part in flat.split(vectors)]
            totals = [torch.zeros_like(part) for part in parts]
            with twice_differentiable(self.model):
                for batch in plan:
                    made = make_batch(batch, self.batching, weights[0].device)
                    found = ggn_products(self.model, weights, made, parts, self.product_bytes)
                    for total, part in zip(totals, found, strict=True):
                        total += part
            return torch.cat(
                [(t / len(rows) + d * v).flatten(1) for t, d, v in zip(totals, dampings, parts, strict=True)], dim=1
            )

        return product


def _damping(scale: Tensor, share: float) -> float:
    """What EK-FAC added to a layer's eigenvalues: scale = (Lambda + share * mean Lambda)^-1/2, or 0 where all are 0."""
    if not scale.any():
        return 0.0
    return float(share / (1 + share) * scale.double().square().reciprocal().mean())


class _Flat:
    """Layers' matrices end to end: {name: [Q, O, I]} <-> [Q, P]."""

    def __init__(self, like: Directions) -> None:
        self.names = list(like)
        self.shapes = [direction.shape[1:] for direction in like.values()]

    def join(self, directions: Directions) -> Tensor:
        return torch.cat([directions[name].flatten(1) for name in self.names], dim=1)

    def split(self, vectors: Tensor) -> list[tuple[str, Tensor]]:
        parts = vectors.split([shape.numel() for shape in self.shapes], dim=1)
        return [(name, part.view(-1, *shape)) for name, part, shape in zip(self.names, parts, self.shapes)]


def conjugate_gradient(
    product: Product, precondition: Product, right: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Solve product(v) = right for Q right sides [Q, P] at once, one product an iteration.

    No iteration gives precondition(right) itself. Else the search begins at 0, whose first step goes along
    precondition(right) to the best length: as good as beginning at precondition(right), and a product cheaper.
    Returns v, and after each iteration sqrt(<r, precondition(r)>) of the residual r, as a share of the right side's
    [iterations + 1, Q]: 1 at first.
    """
    r, p = right, precondition(right)
    if not iterations:
        return p, torch.ones(1, len(right))
    z, v = p, torch.zeros_like(right)
    scale = rz = _dot(r, z)
    residuals = [_share(rz, scale)]
    for _ in range(iterations):
        curved = product(p)
        bend = _dot(p, curved)
        # solved to the last bit: stay there
        step = torch.where(bend > 0, rz / bend, 0.0)[:, None]
        v, r = v + step * p, r - step * curved
        z = precondition(r)
        before, rz = rz, _dot(r, z)
        p = z + torch.where(before > 0, rz / before, 0.0)[:, None] * p
        residuals.append(_share(rz, scale))
    return v, torch.stack(residuals).cpu()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _share(rz: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, rz.clamp(min=0) / scale, 0.0).sqrt()
