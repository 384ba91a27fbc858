"""Saying where prompts end to a model that is called without labels.

Gates per sequence look at the prompt's tokens alone. Labels given to the model say which those are (up to the first
token that counts for the loss); whoever calls it without them says it here, and no model sees more than it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_told: ContextVar[Tensor | None] = ContextVar("labels", default=None)


@contextmanager
def told_labels(labels: Tensor | None) -> Iterator[None]:
    """Let forward passes inside know their labels [B, L], -100 where no token counts; nothing computes a loss of them.

    >>> import torch
    >>> with told_labels(torch.tensor([[-100, -100, 7]])):
    ...     pass  # model(input_ids=...) here: gates per sequence look at the first two tokens
    """
    token = _told.set(labels)
    try:
        yield
    finally:
        _told.reset(token)


def labels_told() -> Tensor | None:
    """The labels of the forward pass under way, as `told_labels` said them."""
    return _told.get()
