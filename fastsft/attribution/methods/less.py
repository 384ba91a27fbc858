"""LESS: the cosine between the step that Adam would take for a sample and the query's gradient (Xia et al. 2024)."""

# Q queries, D documents of a batch, O outputs, I inputs of a layer, K sketch size

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastsft import ops
from fastsft.attribution.methods._base import Moments, Per, Queries, Targets, only_samples
from fastsft.attribution.methods._dots import products, sweep
from fastsft.attribution.methods._gradients import Directions, GradientMethod, Turn, query_gradients
from fastsft.attribution.methods._scores import Scores
from fastsft.capturing import Layer
from fastsft.data import Row
from fastsft.sketch import SketchSpec
from fastsft.sketch.passes import Batching, Loss

Aggregate = Literal["examples", "gradient"]


# the name of the one direction [Q, K] where all layers are projected together
_SKETCH = "sketch"


class Aim(dict[str, Tensor]):
    """What samples are compared with, [Q, O, I] by layer, and the moments at the same checkpoint."""

    def __init__(self, directions: Directions, moments: Moments) -> None:
        super().__init__(directions)
        self.moments = moments


class Less(GradientMethod):
    """score(i, q) = sum over checkpoints of share * cos(Gamma_i, g_q) (arXiv 2402.04333), with

        Gamma = m' / sqrt(v' + eps),   m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2

    elementwise, g the gradient of the sample's loss, eps inside the root and no bias correction, as in LESS's code.
    Gamma is not linear in g, so each sample's gradient is formed, a layer and a few samples at a time.

    momentum=False leaves m out: it is the same for all samples and, where it is larger than a tenth of a sample's own
    gradient, dominates all cosines. loss: "mean" over the sample's tokens, as published; Gamma depends on its size.
    aggregate, for queries of several rows: "examples", the mean of the rows' cosines, as in LESS's code; "gradient",
    the cosine with the gradient of their common loss. sketch: None for exact cosines; a spec of kind "sjlt" to compare
    projections, as a store of them would.
    """

    name = "less"
    unit = "cosine between Adam's step for the sample and the query's gradient"

    def __init__(
        self,
        *,
        momentum: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        loss: Loss = "mean",
        aggregate: Aggregate = "examples",
        sketch: SketchSpec | None = None,
        batching: Batching | None = None,
        direction_bytes: int = 2**31,
    ) -> None:
        batching = dataclasses.replace(Batching() if batching is None else batching, loss=loss)
        super().__init__(batching=batching, direction_bytes=direction_bytes)
        if aggregate not in ("examples", "gradient"):
            raise ValueError(f"`aggregate` must be 'examples' or 'gradient': got {aggregate!r}.")
        if sketch is not None and (sketch.kind != "sjlt" or sketch.precondition is not None or sketch.extra):
            raise ValueError(
                f"less projects its own Gamma of linear layers: `sketch` must be of kind 'sjlt' with neither "
                f"precondition nor extra layers, got {sketch}."
            )
        self.momentum, self.betas, self.eps, self.aggregate, self.sketch = momentum, betas, eps, aggregate, sketch

    def turn(self, moments: Moments | None) -> Turn:
        """Check the moments of the checkpoint, and hand them on beside the queries' directions."""
        if moments is None:
            raise ValueError(
                "less needs the optimizer's moments at each checkpoint, and `optimizer_state` is None: read them with "
                "read_moments(checkpoint folder, model), or score by 'grad_cos', which needs none."
            )
        return partial(Aim, moments=moments)

    def score(self, targets: Targets, *, per: Per = "sample") -> Scores:
        """Score every sample for every query."""
        only_samples(self.name, per)
        return super().score(targets)

    def query_directions(self, queries: Queries) -> Directions:
        """What a sample's Gamma is compared with at the model's weights, of length one."""
        if self.aggregate == "gradient":
            return _unit(self._projected(query_gradients(self.model, queries, self.batching)))
        sizes = [len(rows) for rows in queries.rows]
        owners = [number for number, size in enumerate(sizes) for _ in range(size)]
        rows = [row for rows in queries.rows for row in rows]
        total: dict[str, Tensor] = {}
        for start in range(0, len(rows), len(queries)):  # as many gradients at once as there are queries
            of = owners[start : start + len(queries)]
            alone = Queries([""] * len(of), [[row] for row in rows[start : start + len(queries)]])
            for name, units in _unit(self._projected(query_gradients(self.model, alone, self.batching))).items():
                sums = total.setdefault(name, units.new_zeros(len(queries), *units.shape[1:]))
                units /= units.new_tensor([sizes[owner] for owner in of]).view(-1, *[1] * (units.dim() - 1))
                sums.index_add_(0, torch.tensor(of, device=units.device), units)
        return total

    def _projected(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.sketch is None:
            return dict(gradients)
        spec = self.sketch
        parts = [ops.sketch_matrix(each, spec.size, spec.layer_seed(name)) for name, each in gradients.items()]
        return {_SKETCH: torch.stack(parts).sum(0)}

    def contract(
        self, batches: Sequence[Sequence[Row]], directions: Directions, per: Per
    ) -> tuple[Tensor, list[Tensor]]:
        """Take the cosine of each row's Gamma at the model's weights with the directions -> [n, Q]."""
        assert isinstance(directions, Aim)  # of `turn`
        batch = _Batch(self, directions)
        parts = [batch.cosines() for _ in sweep(self.model, batches, self.batching, batch.see)]
        return torch.cat(parts), []

    def gamma(self, gradients: Tensor, moment: Tensor, second: Tensor) -> Tensor:
        """Turn gradients [D, O, I] of samples into the steps that Adam would take for each alone."""
        b1, b2 = self.betas
        root = gradients.square().mul_(1 - b2).add_(second, alpha=b2).add_(self.eps).sqrt_()
        top = gradients * (1 - b1)
        return (top.add_(moment, alpha=b1) if self.momentum else top).div_(root)


class _Batch:
    """The dot products and squared norms of one batch's samples, summed over layers as they are seen."""

    def __init__(self, method: Less, aim: Aim) -> None:
        self.method, self.aim = method, aim
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._reset()

    def _reset(self) -> None:
        self._dots: Tensor | None = None  # [D, Q], or sketches [D, K]
        self._squares: Tensor | None = None  # [D]

    def see(self, layer: Layer, x: Tensor, dy: Tensor, offsets: Tensor) -> None:
        """Add one layer's part."""
        spec, target = self.method.sketch, self.aim.get(layer.name)
        for some, grads in products(x, dy, offsets):
            gamma = self.method.gamma(grads, *self._moments_of(layer, grads))
            if spec is not None:
                part = ops.sketch_matrix(gamma, spec.size, spec.layer_seed(layer.name))
            elif target is not None:
                part = gamma.flatten(1) @ target.to(gamma).flatten(1).T
            else:
                part = gamma.new_zeros(len(gamma), 1)
            if self._dots is None or self._squares is None:
                self._dots = part.new_zeros(
                    len(offsets) - 1, len(next(iter(self.aim.values()))) if spec is None else spec.size
                )
                self._squares = part.new_zeros(len(offsets) - 1)
            self._dots[some] += part
            self._squares[some] += gamma.flatten(1).square().sum(1)

    def _moments_of(self, layer: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's two moments, brought to the device once."""
        if layer.name not in self._moments:
            known = self.aim.moments.get(layer.name)
            if known is None:
                raise ValueError(
                    f"the optimizer's moments have none of {layer.name}, which is trainable: they hold "
                    f"{', '.join(list(self.aim.moments)[:2])} ... Were they read for this model, after a step on it?"
                )
            first, second = (torch.as_tensor(known[key]).to(like) for key in ("exp_avg", "exp_avg_sq"))
            self._moments[layer.name] = first, second
        return self._moments[layer.name]

    def cosines(self) -> Tensor:
        """Close the batch -> [D, Q] on the CPU."""
        dots, squares = self._dots, self._squares
        assert dots is not None and squares is not None  # noqa: PT018
        if self.method.sketch is not None:
            dots, squares = dots @ self.aim[_SKETCH].to(dots).T, dots.square().sum(1)
        self._reset()
        # without momentum a sample whose gradient is zero has no direction
        return torch.where(squares[:, None] == 0, 0.0, dots * squares.rsqrt()[:, None]).cpu()


def _unit(directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale each query [Q, ...] to length one over all layers; a zero one stays zero."""
    norms = torch.stack([each.flatten(1).square().sum(1) for each in directions.values()]).sum(0).sqrt()
    factor = torch.where(norms == 0, 0.0, 1 / norms)
    return {name: each * factor.view(-1, *[1] * (each.dim() - 1)) for name, each in directions.items()}
