"""A linear layer whose weight gradient comes from the capture's sink, so that autograd does not form it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastsft.capturing.layers import Layer

if TYPE_CHECKING:
    from fastsft.capturing.hooks import Capture


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast rounds a linear layer's operands to, None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round as autocast does: it leaves float64 alone."""
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with dW = what the sink returns.

    Casts happen in here, so the sink's float32 sum reaches a float32 weight without a detour through bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, capture: Capture, index: int) -> Tensor:
        dtype = autocast_dtype(x.device)
        x, weight = rounded(x, dtype), rounded(weight, dtype)
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.index = capture, index
        ctx.swapped = capture.layers[index].swapped
        bias = None if bias is None else rounded(bias, dtype)
        return nn.functional.linear(x, weight.T if ctx.swapped else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0]
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dbias = None
        # a backward pass called inside autocast must not round what the forward pass left alone
        with torch.autocast(dy.device.type, enabled=False):
            if need_x:
                dx = dy @ (weight.T if ctx.swapped else weight)
            if need_bias:
                dbias = dy.flatten(0, -2).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        dweight = ctx.capture._see(ctx.index, x, dy)
        if need_weight:
            _check(ctx.capture.layers[ctx.index], dweight)
        return dx, dweight if need_weight else None, dbias, None, None


def _check(layer: Layer, gradient: Tensor | None) -> None:
    if gradient is None or gradient.shape != layer.weight.shape:
        came = "None" if gradient is None else f"shape {list(gradient.shape)}"
        raise ValueError(
            f'with weight_grads="sink" the sink must return the gradient {list(layer.weight.shape)} of {layer.name}, '
            f'the sum of its documents\' gradients: got {came}. Return it, or capture with weight_grads="autograd".'
        )


def replace_forward(capture: Capture, index: int) -> None:
    """Give layer `index` a forward of its own while the capture sees a batch; `restore_forward` takes it back."""
    module = capture.layers[index].module
    own = _own_forward(capture.layers[index])

    def forward(x: Tensor) -> Tensor:
        if not capture.is_seeing or not torch.is_grad_enabled():
            return own(x)
        return _Linear.apply(x, module.weight, module.bias, capture, index)

    module.forward = forward  # type: ignore[method-assign, unused-ignore]


def restore_forward(layer: Layer) -> None:
    layer.module.__dict__.pop("forward", None)


def _own_forward(layer: Layer) -> Callable[[Tensor], Tensor]:
    """Return the layer's forward, where it is one that `_Linear` computes too."""
    known = ("torch.nn.modules.linear.Linear.forward", "transformers.pytorch_utils.Conv1D.forward")
    method = type(layer.module).forward
    if f"{method.__module__}.{method.__qualname__}" not in known or "forward" in vars(layer.module):
        raise ValueError(
            f'weight_grads="sink" replaces the forward of plain linear layers, and {layer.name} '
            f"({type(layer.module).__name__}) has one of its own (another capture, accelerate's hooks, quantised "
            f'weights). Close the other, or use weight_grads="autograd".'
        )
    return layer.module.forward
