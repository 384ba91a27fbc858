"""What influence_dot asks of its arguments, each with a sentence.

Shapes and types are checked at the door of the public function, values inside the registered operators, where
torch.compile does not look.
"""

# T tokens, D documents, I inputs, O outputs, A targets, C factor rank

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Targets = Tensor | tuple[Tensor, Tensor]
# Offsets on CUDA that were checked: their version then, and T.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()
FEW = 256


def check_tokens(x: Tensor, dy: Tensor, offsets: Tensor) -> None:
    if x.ndim != 2 or dy.ndim != 2 or x.shape[0] != dy.shape[0]:
        raise ValueError(
            f"`x` [T, I] and `dy` [T, O] must be matrices over the same tokens: "
            f"got {list(x.shape)} and {list(dy.shape)}. Flatten batch and length first."
        )
    if not (x.is_floating_point() and dy.is_floating_point()):
        raise TypeError(f"`x` and `dy` must be floating point: got {x.dtype} and {dy.dtype}.")
    if (x.dtype == torch.float64) != (dy.dtype == torch.float64):
        raise TypeError(f"`x` and `dy` must both be float64 or neither: got {x.dtype} and {dy.dtype}.")
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(
            f"`offsets` must be int64 [D + 1], with one more entry than documents: "
            f"got {offsets.dtype} {list(offsets.shape)}."
        )


def check_targets(targets: Targets | None, precondition: Tensor | None, O: int, I: int) -> None:
    if isinstance(targets, tuple):
        u, v = targets
        if u.ndim != 3 or v.ndim != 3 or u.shape[1] != O or v.shape[1] != I or u.shape[::2] != v.shape[::2]:
            raise ValueError(
                f"`targets` as factors must be (U [A, {O}, C], V [A, {I}, C]): got {list(u.shape)} and {list(v.shape)}."
            )
        if precondition is not None:
            raise ValueError(
                "`precondition` cannot be applied to factored `targets`, as the product is not low rank: "
                "multiply it into dense targets, or factor the preconditioned target."
            )
    elif targets is not None and (targets.ndim != 3 or targets.shape[1:] != (O, I)):
        raise ValueError(f"`targets` must be [A, {O}, {I}], as `dy` and `x` say: got {list(targets.shape)}.")
    if precondition is not None and precondition.shape != (O, I):
        raise ValueError(f"`precondition` must be [{O}, {I}], as `dy` and `x` say: got {list(precondition.shape)}.")


def check_one_device(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"`{name}` must be on the device of `x`, {x.device}: it is on {tensor.device}.")


def buffer_for(
    name: str, buffer: Tensor | None, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a buffer of zeros, or the one given if it can be added to in place."""
    wide = dtype or torch.promote_types(x.dtype, torch.float32)
    if buffer is None:
        return x.new_zeros(shape, dtype=wide)
    if buffer.shape != shape or buffer.dtype != wide or buffer.device != x.device or not buffer.is_contiguous():
        raise ValueError(
            f"`{name}` is added to in place, so it must be a contiguous {wide} {list(shape)} on {x.device}: "
            f"got {buffer.dtype} {list(buffer.shape)} on {buffer.device}, strides {list(buffer.stride())}."
        )
    return buffer


def sums_for(
    groups: Tensor | None, num_groups: int, sums: Tensor | None, x: Tensor, dy: Tensor, D: int
) -> Tensor | None:
    """Return the buffer [num_groups, O, I] of the group sums, or None where none are asked for."""
    if groups is None:
        if sums is not None or num_groups:
            raise ValueError("`sums` and `num_groups` need `groups` [D]: the group of each document.")
        return None
    if groups.dtype != torch.int64 or groups.shape != (D,):
        raise ValueError(f"`groups` must be int64 [{D}], one per document: got {groups.dtype} {list(groups.shape)}.")
    if sums is None and not num_groups:
        raise ValueError("`groups` needs `num_groups`, or a `sums` [num_groups, O, I] to add to.")
    if sums is not None and not num_groups:
        num_groups = sums.shape[0]
    return buffer_for("sums", sums, (num_groups, dy.shape[1], x.shape[1]), x)


def check_offsets(offsets: Tensor, tokens: int) -> None:
    """Refuse offsets that point outside. On CUDA nobody waits for the answer: the device stops at the next call.

    The layers of a model share their offsets, which are checked once: that takes as long as a LoRA layer's scores.
    """
    rule = f"`offsets` must not decrease, from 0 at least to T={tokens} at most"
    if not offsets.is_cuda and len(offsets) <= FEW:
        bounds = offsets.tolist()  # a tenth of the time of the tensor operations below
        if sorted(bounds) != bounds or bounds[0] < 0 or bounds[-1] > tokens:
            raise ValueError(f"{rule}: got {bounds}.")
        return
    if _checked.get(offsets) == (offsets._version, tokens):
        return
    good = (offsets[1:] >= offsets[:-1]).all() & (offsets[0] >= 0) & (offsets[-1] <= tokens)
    _require(good, rule, offsets)
    if offsets.is_cuda:
        _checked[offsets] = (offsets._version, tokens)


def check_groups(groups: Tensor | None, num_groups: int) -> None:
    if groups is not None:
        good = ((groups >= 0) & (groups < num_groups)).all()
        _require(good, f"`groups` must lie in 0 <= g < num_groups={num_groups}", groups)


def _require(good: Tensor, rule: str, values: Tensor) -> None:
    if values.is_cuda:
        torch._assert_async(good, rule)
    elif not good:
        raise ValueError(f"{rule}: got {values.tolist()}.")
