"""Loss: samples that the model does not know yet first, whatever is asked."""

# N samples, Q queries, B rows of a batch, T tokens of a row

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastsft.attribution.methods._base import Queries
from fastsft.attribution.methods._checkpoints import load, present, restored
from fastsft.attribution.methods._forward import over_rows
from fastsft.attribution.methods._samples_only import SampleMethod
from fastsft.attribution.methods._scores import Block
from fastsft.data import IGNORED, told_labels
from fastsft.sketch.passes import Batching


class Loss(SampleMethod):
    """score(i, q) = the mean loss of sample i over its response tokens at the last checkpoint, whatever the query.

    Positive, as every loss is: a sample that is not learnt yet is held to have the most left to give. Wrong answers are
    not learnt either, and come out first too.
    """

    name = "loss"
    unit = "the sample's own loss in nats per response token, not the query's, and the same for every query"

    def __init__(self, *, batching: Batching | None = None) -> None:
        self.batching = Batching() if batching is None else batching

    def learn(self) -> None:
        """Measure every sample's loss."""
        with restored(self.model):
            load(self.model, (self.checkpoints or [present(self.model)])[-1])
            self._losses = over_rows(self.model, self.samples, self.batching, self._mean_losses)

    def blocks(self, queries: Queries) -> Iterator[Block]:
        """Yield one block."""
        yield Block(list(range(len(self.samples))), 0, self._losses[:, None].repeat(1, len(queries)))

    def _mean_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Each row's mean loss over its supervised tokens [B]."""
        # no attention_mask: tokens see no later ones, so none sees the padding on the right
        with told_labels(batch["labels"]):
            logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return losses.sum(1) / (labels != IGNORED).sum(1)
