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
    """Copy a checkpoint's weights into the trainable parameters of `model`: each must be there, in its shape.

    Frozen parameters are not written. Those that the checkpoint holds too must have the model's values.
    """
    weights = checkpoint.weights() if callable(checkpoint.weights) else checkpoint.weights
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        _check(checkpoint.name, weights, name, parameter)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                parameter.copy_(weights[name])


def _check(checkpoint: str, weights: Mapping[str, Tensor], name: str, parameter: nn.Parameter) -> None:
    if name not in weights:
        if parameter.requires_grad:
            raise ValueError(
                f"{checkpoint} has no weights of {name}, which is trainable: it holds "
                f"{', '.join(list(weights)[:3])} ... Is it of another model, or adapted differently?"
            )
    elif weights[name].shape != parameter.shape:
        raise ValueError(
            f"{checkpoint} does not fit the model: its {name} has the shape {list(weights[name].shape)}, the model's "
            f"{list(parameter.shape)}."
        )
    elif not parameter.requires_grad and not torch.equal(weights[name].to(parameter), parameter):
        raise ValueError(
            f"{checkpoint} has other values of {name} than the model, where it is frozen: only trainable parameters "
            f"are loaded. Unfreeze it, or give the model these values first."
        )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the trainable weights back as they are now."""
    before = Checkpoint("the model as it was", trainable(model))
    try:
        yield
    finally:
        load(model, before)
