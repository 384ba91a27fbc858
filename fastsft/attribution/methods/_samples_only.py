"""Shared ground of the methods that score whole samples and no tokens: the baselines, and what a run booked."""

# N samples, Q queries

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from torch import nn

from fastsft.attribution.methods._base import Moments, Per, Queries, Targets, only_samples
from fastsft.attribution.methods._checkpoints import Checkpoint
from fastsft.attribution.methods._scores import Block, Scores
from fastsft.data import Row


class SampleMethod:
    """Base of them: each says by `learn` what it keeps of the samples, and by `blocks` what their scores are."""

    name = ""
    unit = ""

    def fit(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        samples: Sequence[Row],
        optimizer_state: Sequence[Moments] | None = None,
    ) -> Self:
        """Remember the samples, and what the method needs of them."""
        self.model, self.checkpoints, self.samples = model, list(checkpoints), list(samples)
        self.optimizer_state = optimizer_state
        self.learn()
        return self

    def learn(self) -> None:
        """Read what was given to `fit`; nothing unless told."""

    def score(self, targets: Targets, *, per: Per = "sample") -> Scores:
        """Score every sample for every query."""
        only_samples(self.name, per)
        queries = Queries.of(targets)
        return Scores(
            method=self.name,
            unit=self.unit_of(queries),
            ids=[row.id for row in self.samples],
            sources=[row.source for row in self.samples],
            queries=queries.names,
            blocks=lambda: self.blocks(queries) if self.samples else iter(()),
        )

    def unit_of(self, queries: Queries) -> str:
        """Say what a score of these queries is; `unit` unless it depends on them."""
        return self.unit

    def blocks(self, queries: Queries) -> Iterator[Block]:
        """Yield the scores."""
        raise NotImplementedError
