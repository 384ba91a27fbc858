"""One layer's share of a sketch: its per-document gradients, whitened where asked for, compressed and added."""

# T tokens, D documents, I inputs, O outputs, V vocabulary, H width, K sketch size

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsft import ops
from fastsft.capturing import Documents, Layer
from fastsft.ops._sjlt import BLOCK, block_hash
from fastsft.sketch.rotate import rotate_tokens, rotated_grads
from fastsft.sketch.spec import SketchSpec
from fastsft.sketch.whiten import LayerWhitening, Whitening


class Sketcher:
    """A capture's sink that adds every layer's gradients to one sketch a document."""

    def __init__(self, spec: SketchSpec, whitening: Whitening | None = None) -> None:
        given = None if whitening is None else whitening.precondition
        if given != spec.precondition:
            raise ValueError(
                f"the spec has precondition {spec.precondition!r}, and the `whitening` given is {given!r}: give "
                f"the one that the spec names (AdamWhitener.from_optimizer for 'adam', fit_whitening for 'ekfac')."
            )
        self.spec, self.whitening = spec, whitening
        self.layers: Sequence[Layer] = ()
        self.sketches = torch.zeros(0, spec.size)

    def follow(self, layers: Sequence[Layer]) -> None:
        """Learn which layers the sink's indices mean."""
        self.layers = layers
        self._seeds = [self.spec.layer_seed(layer.name) for layer in layers]
        self._maps: Sequence[LayerWhitening | None] = [None] * len(layers)
        if self.whitening is not None:
            self._maps = self.whitening.of(layers)

    def begin(self, num_documents: int) -> None:
        """Start the sketches [D, K] of a new batch: float32, or float64 where the weights are."""
        weight = self.layers[0].weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.sketches = torch.zeros(num_documents, self.spec.size, dtype=wide, device=weight.device)

    def __call__(self, index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        seed, white, offsets = self._seeds[index], self._maps[index], documents.offsets
        scale = None if white is None else white.scale
        if self.layers[index].kind == "embedding":
            add_embedding(x, dy, offsets, seed, scale, self.sketches)
        elif white is None or white.left is None or white.right is None:
            self._add(x, dy, offsets, seed, scale)
        else:
            x, dy = x.to(self.sketches), dy.to(self.sketches)
            self._add_rotated(x, dy, offsets, seed, white)

    def _add(self, x: Tensor, dy: Tensor, offsets: Tensor, seed: int, scale: Tensor | None) -> None:
        # under autocast the two sides may differ in type
        dy = dy if dy.dtype == x.dtype else dy.to(self.sketches)
        x = x if dy.dtype == x.dtype else x.to(self.sketches)
        kind = self.spec.kind
        ops.sample_grad_project(x, dy, offsets, kind=kind, seed=seed, precondition=scale, out=self.sketches)  # type: ignore[arg-type]

    def _add_rotated(self, x: Tensor, dy: Tensor, offsets: Tensor, seed: int, white: LayerWhitening) -> None:
        assert white.left is not None and white.right is not None  # noqa: PT018
        sides = rotate_tokens(x, dy, offsets, white.left, white.right)
        if sides.left is None and sides.right is None:
            self._add(sides.x, sides.dy, offsets, seed, white.scale)
        else:
            grads = rotated_grads(sides, offsets)
            self.sketches += ops.sketch_matrix(grads, self.spec.size, seed, precondition=white.scale)


def add_embedding(dy: Tensor, ids: Tensor, offsets: Tensor, seed: int, scale: Tensor | None, out: Tensor) -> None:
    """Add to `out` [D, K] the sketch of each document's gradient [V, H] of an embedding, which is never formed.

    dy [T, H], ids [T]: row ids[t] of the gradient gets dy[t]. Only the blocks of these rows are hashed, by their number
    in the whole matrix: the result is `sketch_matrix` of it. scale [V, H] multiplies the gradient.
    """
    wide = dy.to(out.dtype) if scale is None else dy.to(out.dtype) * scale[ids]
    T, H = wide.shape
    column = torch.arange(H, device=dy.device)
    rows, place_of = ids.unique(return_inverse=True)
    block = rows[:, None] * -(-H // BLOCK) + (column // BLOCK)[None, :]  # [rows, H]
    bucket, twist = block_hash(block, out.shape[1], seed)
    place = (column % BLOCK - twist) & (BLOCK - 1)
    sign = 1 - 2 * ((twist >> (8 + place)) & 1)
    index = (bucket * BLOCK + place)[place_of]  # [T, H]
    document = torch.bucketize(torch.arange(T, device=dy.device), offsets[1:], right=True)
    inside = (document < len(out)) & (torch.arange(T, device=dy.device) >= offsets[0])
    index += (document * out.shape[1])[:, None]
    values = wide * sign[place_of].to(wide)
    out.view(-1).index_add_(0, index[inside].flatten(), values[inside].flatten())
