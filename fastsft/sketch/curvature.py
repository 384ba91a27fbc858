"""EK-FAC whitening: eigenvectors of each layer's two covariances, eigenvalues corrected on per-document gradients.

George et al. 2018 (arXiv 1806.03884), as Grosse et al. 2023 (arXiv 2308.03296) apply it to language models:

    A = E[x x^T], S = E[dy dy^T],   A = Q_A . Q_A^T, S = Q_S . Q_S^T
    Lambda_oi = E[(Q_S^T G Q_A)_oi^2] over documents,   P^1/2 G = (Q_S^T G Q_A) / sqrt(Lambda + damping)

with the empirical Fisher, where labels are the rows' own, or the true one, where they are drawn from the model. A and S
are taken over the tokens before a document's last supervised one: later tokens and padding have no part in its loss.
"""

# T tokens, D documents, O outputs, I inputs

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.capturing import Documents, Layer
from fastsft.data import Row
from fastsft.sketch.passes import Batch, Batching, Labels, Loss, attribution_only, make_batch, run_batch
from fastsft.sketch.rotate import rotate_grads, rotate_tokens, rotated_grads
from fastsft.sketch.spec import SketchSpec
from fastsft.sketch.whiten import LayerWhitening, Whitening

# numbers of per-document gradients that exist at once
_CHUNK = 4 * 2**20
# columns of a covariance that one product fills
_COLUMNS = 128


class Curvature:
    """A capture's sink: first the covariances, then (after `rotate`) the eigenvalues.

    Takes (I^2 + O^2 + I O) numbers a layer. Layers with one input (a block's queries, keys and values) share its
    products and eigenvectors. With `keep`, per-document gradients of the first pass stay in memory and a
    second pass is not needed.
    """

    def __init__(self, layers: Sequence[Layer], *, keep: bool) -> None:
        self.keep = keep
        self.layers = layers
        self.documents = 0
        self._squares = [layer.weight.new_zeros(layer.shape, dtype=_wide(layer)) for layer in layers]  # [O, I]
        self._left = [squares.new_zeros(len(squares), len(squares)) for squares in self._squares]
        self._right = [squares.new_zeros(squares.shape[1], squares.shape[1]) for squares in self._squares]
        self._kept: list[list[Tensor]] = [[] for _ in layers]
        self.rotated = False
        self._seen: set[int] = set()
        self._last = _Last()

    def begin(self, batch: Batch) -> None:
        """Start a batch."""
        self._seen = set()
        self._last = _Last()
        self._counts = batch.counts
        self.documents += len(batch.documents)

    def __call__(self, index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        if index in self._seen:
            raise ValueError(
                f"EK-FAC takes each layer's gradient from one use a pass: {self.layers[index].name} was used twice. "
                f"Whiten by 'adam', or not at all."
            )
        self._seen.add(index)
        same, x, dy = x, x.to(self._squares[index]), dy.to(self._squares[index])
        if self.rotated:
            self._square(index, same, x, dy, documents.offsets)
            return
        # Padding has inputs too, but no part in the loss. (Not dy != 0: where a gradient is zero by cancellation, as
        # that of a first token's query, rounding would decide.)
        self._right[index] += self._last(same, None, lambda: _gram(x[self._counts]))
        _add_gram(self._left[index], dy)
        if self.keep:
            self._kept[index].append(ops.document_grads(x, dy, documents.offsets))

    def rotate(self) -> None:
        """Turn the covariances into their eigenvectors; where gradients were kept, into eigenvalues too."""
        self._left, self._right = _eigenvectors(self._left), _eigenvectors(self._right)
        self.rotated = True
        for index, kept in enumerate(self._kept):
            for grads in kept:
                self._squares[index] += rotate_grads(grads, self._left[index], self._right[index]).square_().sum(0)
        self._kept = []

    def restart(self) -> None:
        """Count documents from zero, before the second pass."""
        self.documents = 0

    def _square(self, index: int, same: Tensor, x: Tensor, dy: Tensor, offsets: Tensor) -> None:
        right = self._right[index]

        def turn() -> Tensor:
            return self._last(same, right, lambda: x @ right)

        sides = rotate_tokens(x, dy, offsets, self._left[index], right, turn=turn)
        if sides.left is not None or sides.right is not None:  # narrow: fewer numbers than the tokens have
            self._squares[index] += rotated_grads(sides, offsets).square().sum(0)
            return
        step = max(1, _CHUNK // max(1, (len(offsets) - 1) * x.shape[1]))
        for start in range(0, dy.shape[1], step):
            part = ops.document_grads(sides.x, sides.dy[:, start : start + step], offsets)
            self._squares[index][start : start + step] += part.square_().sum(0)

    def whitening(self, damping: float) -> list[LayerWhitening]:
        """Return each layer's map, made of this object's own tensors; damping is a share of its mean eigenvalue."""
        found = []
        for left, right, squares in zip(self._left, self._right, self._squares, strict=True):
            eigenvalues = squares.div_(self.documents)
            scale = eigenvalues.add_(damping * eigenvalues.mean()).rsqrt_()
            # a layer no gradient flowed through (LoRA's A while B = 0): its gradients are zero and stay so
            found.append(LayerWhitening(scale.masked_fill_(scale == torch.inf, 0), left, right))
        return found


class _Last:
    """Remembers, of the last matrix of each width, what was made of it: neighbours in a backward pass share inputs."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

    def __call__(self, matrix: Tensor, by: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        known = self._known.get(matrix.shape[1])
        # It is held, so no other matrix can have come to lie in its place.
        if known is None or _place(known[0]) != _place(matrix) or known[1] is not by:
            known = self._known[matrix.shape[1]] = (matrix, by, make())
        return known[2]


def _place(matrix: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return matrix.data_ptr(), matrix.shape, matrix.stride()


def _gram(x: Tensor) -> Tensor:
    return _add_gram(x.new_zeros(x.shape[1], x.shape[1]), x)


def _add_gram(total: Tensor, x: Tensor) -> Tensor:
    """Add x^T x to the upper triangle of `total`, some columns at a time: what is below is not computed."""
    for start in range(0, x.shape[1], _COLUMNS):
        end = start + _COLUMNS
        total[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
    return total


def _eigenvectors(covariances: Sequence[Tensor]) -> list[Tensor]:
    """Of each covariance, whose upper triangle is read; equal neighbours of a size share theirs."""
    found: list[Tensor] = []
    last: dict[int, tuple[Tensor, Tensor]] = {}
    for covariance in covariances:
        known = last.get(len(covariance))
        if known is None or not torch.equal(known[0], covariance):
            # float32 loses the small eigenvalues' directions
            vectors = torch.linalg.eigh(covariance.double(), UPLO="U").eigenvectors.to(covariance)
            known = last[len(covariance)] = (covariance, vectors)
        found.append(known[1])
    return found


def _wide(layer: Layer) -> torch.dtype:
    return torch.promote_types(layer.weight.dtype, torch.float32)


def fit_whitening(
    model: nn.Module,
    rows: Sequence[Row],
    spec: SketchSpec,
    max_documents: int | None = 256,
    damping: float = 0.1,
    *,
    loss: Loss = "sum",
    max_tokens: int = 4096,
    packing: bool = False,
    pad_id: int = 0,
    labels: Labels = "rows",
    seed: int = 0,
    keep_bytes: int = 64 * 2**20,
) -> Whitening:
    """Fit EK-FAC whitening on at most `max_documents` rows, evenly spaced (all where None).

    damping: what is added to every eigenvalue, as a share of its layer's mean. labels: "rows" for the empirical Fisher,
    "sampled" for the true one, by one draw of every label from the model under `seed`, which depends on a row's source
    and id but on no other row. Two passes over these rows; one where
    all their gradients fit into `keep_bytes`. Eigenvectors cost some 10 (I^3 + O^3) operations a layer, in float64.
    """
    if spec.precondition != "ekfac":
        raise ValueError(
            f"`fit_whitening` fits EK-FAC, and this spec has precondition {spec.precondition!r}. "
            f"Use SketchSpec(precondition='ekfac'), or AdamWhitener.from_optimizer for 'adam'."
        )
    if not rows or (max_documents is not None and max_documents < 1) or damping <= 0:
        raise ValueError(
            f"`fit_whitening` needs rows, `max_documents` of 1 or more and `damping` above 0: got {len(rows)} rows, "
            f"max_documents={max_documents}, damping={damping}."
        )
    number = len(rows) if max_documents is None else min(len(rows), max_documents)
    chosen = [rows[place * len(rows) // number] for place in range(number)]
    batching = Batching(loss=loss, max_tokens=max_tokens, packing=packing, pad_id=pad_id, labels=labels, seed=seed)
    plan = batching.plan(chosen)
    curvature: Curvature

    def sink(index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        curvature(index, x, dy, documents)

    with attribution_only(model, sink, extra=spec.extra) as capture:
        size = sum(math.prod(layer.shape) * _wide(layer).itemsize for layer in capture.layers)
        curvature = Curvature(capture.layers, keep=number * size <= keep_bytes)
        for _ in range(1 if curvature.keep else 2):
            curvature.restart()
            for batch in plan:
                made = make_batch(batch, batching, capture.layers[0].weight.device)
                curvature.begin(made)
                run_batch(model, capture, made)
            if not curvature.rotated:
                curvature.rotate()
    names = [layer.name for layer in curvature.layers]
    about: dict[str, object] = {"damping": damping, "documents": number, "loss": loss}
    if labels == "sampled":
        about |= {"labels": labels, "seed": seed}
    return Whitening("ekfac", dict(zip(names, curvature.whitening(damping), strict=True)), about)
