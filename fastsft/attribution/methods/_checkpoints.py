"""Weights of a run at some of its steps, and what an optimizer knew there, by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The trainable weights at one step.

    weights: by parameter name, or a function that reads them. share: how much the checkpoint counts beside others: the
    learning rates summed over the steps that it stands for. Shares are divided by their sum.
    """

    name: str
    weights: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]
    share: float = 1.0
    # anything a method may want to know: step, learning_rate, ...
    about: Mapping[str, Any] = field(default_factory=dict)


def shares(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """Divide the checkpoints' shares by their sum."""
    total = sum(checkpoint.share for checkpoint in checkpoints)
    if total <= 0 or any(checkpoint.share < 0 for checkpoint in checkpoints):
        raise ValueError(
            f"shares of checkpoints must not be negative, and their sum must be above 0: got "
            f"{[checkpoint.share for checkpoint in checkpoints]}."
        )
    return [checkpoint.share / total for checkpoint in checkpoints]


def present(model: nn.Module) -> Checkpoint:
    """Take the weights that `model` has now as its only checkpoint."""
    return Checkpoint("present weights", trainable(model))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trainable parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def load(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into `model`; every trainable parameter must be there, in its shape."""
    weights = checkpoint.weights() if callable(checkpoint.weights) else checkpoint.weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                if weights[name].shape != parameter.shape:
                    raise ValueError(
                        f"{checkpoint.name} does not fit the model: its {name} has the shape "
                        f"{list(weights[name].shape)}, the model's {list(parameter.shape)}."
                    )
                parameter.copy_(weights[name])
            elif parameter.requires_grad:
                raise ValueError(
                    f"{checkpoint.name} has no weights of {name}, which is trainable: it holds "
                    f"{', '.join(list(weights)[:3])} ... Is it of another model, or adapted differently?"
                )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the trainable weights back as they are now."""
    before = Checkpoint("the model as it was", trainable(model))
    try:
        yield
    finally:
        load(model, before)
