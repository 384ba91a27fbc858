"""Hooks of the model, its blocks and its layers. Plain functions that find what they need on the module they hang on:
a copy of the model then has adapters of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsft.adapters.block import Block
from fastsft.adapters.layer import Adapter

if TYPE_CHECKING:
    from fastsft.adapters.gated import Gated


def before_model(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook of the model, before it runs."""
    gated: Gated = module.gated_adapters  # type: ignore[assignment]
    return gated.before(args, kwargs)


def after_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Hook of the model, after it ran."""
    gated: Gated = module.gated_adapters  # type: ignore[assignment]
    gated.after(output)


def before_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook of a block, before it runs."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    blocks: list[Block] = module.__dict__["gated_blocks"]
    for block in blocks:
        block.begin(hidden if isinstance(hidden, Tensor) else None)


def before_child(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook of what a block calls, before it runs."""
    if not torch.compiler.is_compiling():
        blocks: list[Block] = module.__dict__["gated_blocks"]
        for block in blocks:
            block.before_child(module, args[0] if args and isinstance(args[0], Tensor) else None)


def after_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Hook of a block, after it ran."""
    blocks: list[Block] = module.__dict__["gated_blocks"]
    for block in blocks:
        block.end()


def before_layer(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook of an adapted layer, before it runs."""
    adapter: Adapter = module.gated  # type: ignore[assignment]
    return (adapter.block.read(adapter, args[0]), *args[1:])


def after_layer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Hook of an adapted layer, after it ran."""
    adapter: Adapter = module.gated  # type: ignore[assignment]
    return adapter.block.add(adapter, output)
