"""Embedding: texts alike to the model's own eye, without a gradient."""

# N samples, Q queries, H hidden size, B rows of a batch, T tokens of a row

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastsft.attribution.methods._base import Queries
from fastsft.attribution.methods._checkpoints import load, present, restored
from fastsft.attribution.methods._forward import over_rows
from fastsft.attribution.methods._samples_only import SampleMethod
from fastsft.attribution.methods._scores import Block
from fastsft.data import Row
from fastsft.sketch.passes import Batching


class Embedding(SampleMethod):
    """score(i, q) = cosine of e_q and e_i, the mean last hidden state over a row's tokens, prompt and response, at the
    last checkpoint; of several rows the mean of theirs.

    The states are those that the output layer is given (after the final norm), from a model of transformers.
    """

    name = "embedding"
    unit = "cosine of mean hidden states: no unit that means anything in nats"

    def __init__(self, *, batching: Batching | None = None) -> None:
        self.batching = Batching() if batching is None else batching

    def learn(self) -> None:
        """Embed the samples."""
        self._samples = nn.functional.normalize(self._embedded(self.samples), dim=-1)  # [N, H]

    def blocks(self, queries: Queries) -> Iterator[Block]:
        """Yield 4096 samples a block."""
        means = torch.stack([self._embedded(rows).mean(0) for rows in queries.rows])
        means = nn.functional.normalize(means, dim=-1)  # [Q, H]
        for start in range(0, len(self.samples), 4096):
            part = self._samples[start : start + 4096]
            yield Block(list(range(start, start + len(part))), 0, part @ means.T)

    def _embedded(self, rows: Sequence[Row]) -> Tensor:
        with restored(self.model):
            load(self.model, (self.checkpoints or [present(self.model)])[-1])
            return over_rows(self.model, rows, self.batching, self._means)

    def _means(self, batch: dict[str, Tensor]) -> Tensor:
        """Each row's mean last hidden state [B, H]."""
        # logits of one token are made, which the model gives at the least
        given = {"use_cache": False, "output_hidden_states": True, "logits_to_keep": 1}
        states = self.model(input_ids=batch["input_ids"], **given).hidden_states[-1]
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        mask = batch["attention_mask"][..., None].to(states)
        return (states * mask).sum(1) / mask.sum(1)
