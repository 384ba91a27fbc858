"""A tap on a model's logits: the gradient of each document weighed by its source, and each source's training loss.

Scaling the gradient that enters the output layer is scaling the loss of each document, whoever computes it: the
trainer's own loss, its reported value and its normalisation stay as they are.

Letters: B rows of a batch, T tokens of a row, S sources, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsft.data import IGNORED
from fastsft.tasks import MixError


class LogitsTap:
    """Hook a causal model's output layer. `factors` [S], where set, scale the gradients of each source's documents;
    with `losses` the mean training loss of each source is kept too, at the cost of one more softmax."""

    def __init__(self, model: nn.Module, num_sources: int, *, losses: bool) -> None:
        find: Any = getattr(model, "get_output_embeddings", None)
        layer: Any = None if find is None else find()
        if layer is None:
            raise MixError(
                f"{type(model).__name__} names no output layer (get_output_embeddings), where documents would be "
                f"weighed: resolve conflicts with apply='exact', or not at all."
            )
        self.factors: Tensor | None = None
        self._sums = torch.zeros(2, num_sources, dtype=torch.float64) if losses else None  # nats, tokens
        self._where: Tensor | None = None
        self._labels: Tensor | None = None
        self._fired = False
        self._handle = layer.register_forward_hook(self._see)

    @contextmanager
    def batch(
        self, sources: Sequence[int], lengths: Sequence[Sequence[int]], labels: Tensor, *, packed: bool
    ) -> Iterator[None]:
        """See the pass of one micro-batch: the source of every document, in the order of `lengths` of each row."""
        self._where = _places(sources, lengths, labels.shape, packed=packed).to(labels.device)
        self._labels, self._fired = labels, False
        yield
        self._where = self._labels = None
        if not self._fired:
            raise MixError(
                "the model's output layer was not called in a training step (a fused or chunked loss computes logits "
                "by itself), so documents can't be weighed there: switch such a loss off, or use apply='exact'."
            )

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        where = self._where
        if where is None or not torch.is_grad_enabled() or not output.requires_grad:
            return
        if output.shape[:2] != where.shape:
            raise MixError(
                f"the output layer gave logits {list(output.shape[:2])} for a batch of {list(where.shape)} tokens: "
                f"switch off what leaves tokens out, or use apply='exact'."
            )
        self._fired = True
        if self.factors is not None:
            factors = torch.cat([self.factors, self.factors.new_ones(1)]).to(output)[where]  # -1, padding: one
            output.register_hook(lambda gradient: gradient * factors[..., None])
        if self._sums is not None:
            self._add_losses(output.detach())

    def _add_losses(self, logits: Tensor) -> None:
        assert self._labels is not None
        assert self._where is not None
        assert self._sums is not None
        labels = self._labels[:, 1:].reshape(-1)
        nats = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="none"
        )
        seen = labels != IGNORED
        where = self._where[:, :-1].reshape(-1)[seen].cpu()
        for row, values in zip(self._sums, (nats[seen].double().cpu(), torch.ones(len(where)).double()), strict=True):
            row.index_add_(0, where, values)

    def take_losses(self, device: torch.device) -> list[float]:
        """Mean loss of each source since the last call [S], over all ranks; nan where nothing was seen."""
        assert self._sums is not None
        sums, self._sums = self._sums.to(device), torch.zeros_like(self._sums)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return [float(value) for value in sums[0] / sums[1]]

    def close(self) -> None:
        self._handle.remove()


def _places(sources: Sequence[int], lengths: Sequence[Sequence[int]], shape: torch.Size, *, packed: bool) -> Tensor:
    """The source of every token [B, T]; -1 in the padding of packed rows."""
    found = torch.full(tuple(shape), -1, dtype=torch.int64)
    document = 0
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            # one document a row may be padded on either side, and padding has no loss
            span = slice(start, start + size) if packed else slice(None)
            found[row, span] = sources[document]
            start, document = start + size, document + 1
    return found
