"""influence_dot: what one pass over a layer's inputs and output gradients can say about each document.

A linear layer y = x W^T with weight [O, I] has, for document d, the gradient G_d = sum over its tokens of dy_t x_t^T.
Scores, group sums and sketches are taken from tiles of G_d: no whole one exists in memory, but in `document_grads`.
"""

# T tokens, D documents, I inputs, O outputs, A targets, C factor rank, K sketch size

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsft.ops import _influence_fused, _influence_tokens
from fastsft.ops._rules import (
    Targets,
    buffer_for,
    check_offsets,
    check_one_device,
    check_targets,
    check_tokens,
    sums_for,
)
from fastsft.ops._sjlt import check_sketch_size


class InfluenceDot(NamedTuple):
    """What `influence_dot` was asked for; None for the rest."""

    scores: Tensor | None
    sums: Tensor | None
    sketch: Tensor | None


def influence_dot(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    targets: Targets | None = None,
    *,
    precondition: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int = 0,
    sums: Tensor | None = None,
    sketch: Tensor | int | None = None,
    seed: int = 0,
    per: Literal["document", "token"] = "document",
) -> InfluenceDot:
    """Dot each document's gradient with the targets; sum the gradients by group; sketch them; in one pass.

    x [T, I], dy [T, O]; document d is the tokens offsets[d] <= t < offsets[d + 1] of offsets [D + 1], int64. Tokens
    outside belong to no document; a document may be empty. Every output is optional:

    scores: <precondition * G_d, targets_a> [D, A], for dense targets [A, O, I], or factors (U [A, O, C], V [A, I, C])
        of targets_a = U_a V_a^T. With per="token": dy_t . (precondition * targets_a) . x_t [T, A], 0 outside documents.
    sums: sum of G_d over the documents with groups[d] == g [num_groups, O, I]; raw, not preconditioned. A tensor given
        as `sums` is added to and returned.
    sketch: the blocked sparse JL sketch of precondition * G_d under the 32-bit `seed` [D, K], see `sketch_matrix`. A
        tensor is added to and returned; a number asks for a new one of that size.

    float32 and narrower inputs are added up in float32, float64 in float64 (by the reference). Results carry no
    gradient. On a CPU their bits do not depend on the number of threads.
    """
    x, dy = x.detach(), dy.detach()
    O, I, D = dy.shape[-1], x.shape[-1], offsets.shape[0] - 1
    check_tokens(x, dy, offsets)
    check_targets(targets, precondition, O, I)
    if per not in ("document", "token"):
        raise ValueError(f"`per` must be 'document' or 'token': got {per!r}.")
    factors = targets if isinstance(targets, tuple) else None
    dense = targets if isinstance(targets, Tensor) else None
    u, v = factors or (None, None)
    check_one_device(x, dy=dy, offsets=offsets, targets=dense, U=u, V=v, precondition=precondition, groups=groups)
    sums = sums_for(groups, num_groups, sums, x, dy, D)
    if sketch is not None:
        size = sketch if isinstance(sketch, int) else sketch.shape[-1]
        check_sketch_size(size)
        sketch = buffer_for("sketch", None if isinstance(sketch, int) else sketch, (D, size), x)

    wide = torch.promote_types(x.dtype, torch.float32)
    factor = None if precondition is None else precondition.to(wide)
    dense = None if dense is None else dense.to(wide)
    scores = None
    if u is not None and v is not None:
        scores = _influence_tokens.factored(x, dy, offsets, u.to(wide), v.to(wide))
        scores = scores if per == "token" else _influence_tokens.segment_sum(scores, offsets)
    elif dense is not None and per == "token":
        scores = _influence_tokens.dense(x, dy, offsets, dense if factor is None else dense * factor)
    if scores is not None:
        dense = None  # scored already
    if dense is not None or sums is not None or sketch is not None:
        fused = _influence_fused.fused(x, dy, offsets, dense, factor, groups, sums, sketch, seed)
        scores = fused if scores is None and dense is not None else scores
    return InfluenceDot(scores, sums, sketch)


def document_grads(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """Materialise each document's gradient: x [T, I], dy [T, O], offsets [D + 1] -> G [D, O, I], float32 at least."""
    check_tokens(x, dy, offsets)
    check_offsets(offsets, x.shape[0])
    return _influence_fused.materialise(x.detach(), dy.detach(), offsets)
