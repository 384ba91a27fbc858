"""Turn a layer's per-document gradients G into left^T G right, through its tokens or its products, as is cheaper."""

# T tokens, D documents, O outputs, I inputs

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastsft import ops


class Sides(NamedTuple):
    """The two sides of the gradients, and the rotations that are still to be applied to their products."""

    x: Tensor  # [T, I]
    dy: Tensor  # [T, O]
    left: Tensor | None  # [O, O]
    right: Tensor | None  # [I, I]


def rotate_tokens(
    x: Tensor, dy: Tensor, offsets: Tensor, left: Tensor, right: Tensor, *, turn: Callable[[], Tensor] | None = None
) -> Sides:
    """Rotate each side's tokens where that is cheaper than rotating the products [D, O, I].

    T rows of x against D * O rows of the products, T rows of dy against their D * I columns: of LoRA's A [r, I] with
    8 documents of 256 tokens, 8 r rows against 2048. Where a product is left to rotate, D O I < T max(O, I). turn:
    gives x @ right, where the caller may know it.
    """
    D = len(offsets) - 1
    if D * x.shape[1] >= len(dy):
        dy, left_over = dy @ left, None
    else:
        left_over = left
    if D * dy.shape[1] >= len(x):
        return Sides(x @ right if turn is None else turn(), dy, left_over, None)
    return Sides(x, dy, left_over, right)


def rotated_grads(sides: Sides, offsets: Tensor) -> Tensor:
    """Form the rotated gradients [D, O, I]."""
    return rotate_grads(ops.document_grads(sides.x, sides.dy, offsets), sides.left, sides.right)


def rotate_grads(grads: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return left^T G right for each G of [D, O, I], or what is left of it without a side."""
    if left is not None:
        # One product for all documents: of LoRA's B [O, r] a product a document would have r columns.
        D, O, I = grads.shape
        columns = left.T @ grads.permute(1, 0, 2).reshape(O, D * I)
        grads = columns.view(O, D, I).permute(1, 0, 2)
    return grads if right is None else grads @ right
