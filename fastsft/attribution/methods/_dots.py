"""Each document's gradient of a layer while a backward pass shows it: dotted, squared, or formed whole."""

# T tokens, D documents, O outputs, I inputs, A directions

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.attribution.methods._base import Per
from fastsft.capturing import Documents, Layer
from fastsft.data import Row
from fastsft.sketch.passes import Batching, attribution_only, make_batch, run_batch

# From so many directions on a GEMM with the documents' gradients is quicker than the fused pass, which reads every
# direction anew for every document. One thread, 32 documents of 128 tokens, [O, I] of [8, 256], [256, 8], [256, 256],
# [768, 256]: the two meet between 8 and 16; at 100 the GEMM takes 1/2, 1/6, 1/4, 1/4 of the time.
_MANY = 12
# numbers of documents' gradients that exist at once. CPU: 0.5 to 4 million did not differ, more is slower.
_FORMED = {"cpu": 2**20, "cuda": 2**26}
# the same where they are formed whole, some documents at a time
_PRODUCTS = 8 * 2**20


class Dots:
    """A capture's sink that adds up, over layers, each document's (token's) dots with directions [A, O, I] by name.

    values [D, A] or [T, A] of the batch, and with `squares` [D] the squared norm of each document's gradient; None
    before the first layer.
    """

    def __init__(self, directions: Mapping[str, Tensor], per: Per = "sample", *, squares: bool = False) -> None:
        self.directions, self.per, self.wants_squares = directions, per, squares
        self.layers: Sequence[Layer] = []
        self.begin()

    def begin(self) -> None:
        """Start a batch."""
        self.values: Tensor | None = None
        self.squares: Tensor | None = None
        self._seen: set[int] = set()

    def __call__(self, index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        name = self.layers[index].name
        direction = self.directions.get(name)
        if self.wants_squares:
            if index in self._seen:
                raise ValueError(f"a gradient's norm needs one use of a layer in a pass: {name} was used twice.")
            self._seen.add(index)
            if self.squares is None:
                self.squares = x.new_zeros(len(documents), dtype=torch.promote_types(x.dtype, torch.float32))
        if direction is None and not self.wants_squares:
            return
        found = self._dots(x, dy, documents.offsets, direction)
        if found is not None:
            self.values = found if self.values is None else self.values + found

    def _dots(self, x: Tensor, dy: Tensor, offsets: Tensor, direction: Tensor | None) -> Tensor | None:
        if self.per == "token":
            if self.squares is not None:
                formed_dots(x, dy, offsets, None, self.squares)
            return None if direction is None else ops.influence_dot(x, dy, offsets, direction, per="token").scores
        if direction is None or self.squares is not None or len(direction) >= _MANY:
            return formed_dots(x, dy, offsets, direction, self.squares)
        return ops.influence_dot(x, dy, offsets, direction).scores


def formed_dots(
    x: Tensor, dy: Tensor, offsets: Tensor, directions: Tensor | None, squares: Tensor | None = None
) -> Tensor | None:
    """Dot by a GEMM with the documents' gradients, some of their output rows at a time.

    x [T, I], dy [T, O], offsets [D + 1], directions [A, O, I] -> [D, A]; squared norms are added to `squares` [D]. By
    output rows, not by documents: so each direction is read once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dy = x.to(wide), dy.to(wide)
    D, O, I = len(offsets) - 1, dy.shape[1], x.shape[1]
    step = max(1, _FORMED.get(x.device.type, 2**20) // max(1, D * I))
    flat = None if directions is None else directions.to(wide).reshape(len(directions), O * I)
    found = None if flat is None else x.new_zeros(D, len(flat))
    for start in range(0, O, step):
        grads = ops.document_grads(x, dy[:, start : start + step], offsets).flatten(1)
        if squares is not None:
            squares += torch.linalg.vector_norm(grads, dim=1).square()
        if found is not None and flat is not None:
            found.addmm_(grads, flat[:, start * I : start * I + grads.shape[1]].T)
    return found


def sweep(
    model: nn.Module,
    batches: Sequence[Sequence[Row]],
    batching: Batching,
    see: Callable[[Layer, Tensor, Tensor, Tensor], None],
) -> Iterator[Sequence[Row]]:
    """Show `see` every followed layer's x [T, I], dy [T, O] and document offsets, of each row's own loss; yield each
    batch when it is through. A layer that is used twice in a pass, where no one product is a row's gradient, is
    refused."""
    if not batches:
        raise ValueError("`samples` is empty, and this method learns from them: give the run's training rows.")
    layers: Sequence[Layer] = ()
    seen: set[int] = set()

    def sink(index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        if index in seen:
            raise ValueError(
                f"{layers[index].name} was used twice in a pass, and this method takes a layer's gradient from one "
                f"use: freeze that layer, or use a method of plain dot products (grad_dot, tracin)."
            )
        seen.add(index)
        see(layers[index], x, dy, documents.offsets)

    with attribution_only(model, sink) as capture:
        layers = capture.layers
        for batch in batches:
            seen.clear()
            run_batch(model, capture, make_batch(batch, batching, layers[0].weight.device))
            yield batch


def products(x: Tensor, dy: Tensor, offsets: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Form the documents' gradients, a bounded number at a time: which documents, and [d, O, I]."""
    D = len(offsets) - 1
    step = max(1, _PRODUCTS // (x.shape[1] * dy.shape[1]))
    for start in range(0, D, step):
        some = slice(start, min(D, start + step))
        yield some, ops.document_grads(x, dy, offsets[some.start : some.stop + 1])
