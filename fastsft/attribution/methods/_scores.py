"""What every method answers: a stream of scores with ids and units, gathered as little or as much as is asked for."""

# N samples, Q queries, S sources, T tokens of a sample

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsft.data import Row


class _Named(Protocol):
    name: str
    unit: str


class Block(NamedTuple):
    """Scores of some samples for some neighbouring queries.

    values [n, q], float32 at least, on the CPU; rows: the samples' places in the order that `fit` was given; first: the
    first query. tokens: of each sample its tokens' scores [T, q], which sum to its row of `values`; None unless asked.
    """

    rows: list[int]
    first: int
    values: Tensor
    tokens: list[Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Top:
    """The k samples with the largest and the k with the smallest scores of each query, best first [Q, k]; places are
    -1 where there are fewer samples than k."""

    largest: Tensor
    largest_rows: Tensor
    smallest: Tensor
    smallest_rows: Tensor


@dataclass(frozen=True, eq=False)
class Summary:
    """What one pass over the scores gives: the best of both signs, and sums by source {source: [Q]}."""

    top: Top
    by_source: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of N samples for Q queries. Positive: training on the sample lowers the query's loss.

    Each iteration computes them anew, a block at a time: neither N x Q nor N x parameters is ever in memory unless
    `matrix` is asked for. unit: what a score is, in words; a baseline's has none that means anything.
    """

    method: str
    unit: str
    ids: Sequence[str]
    sources: Sequence[str]
    queries: Sequence[str]
    blocks: Callable[[], Iterator[Block]] = field(repr=False)

    @staticmethod
    def of(
        method: _Named, samples: Sequence[Row], queries: Sequence[str], blocks: Callable[[], Iterator[Block]]
    ) -> Scores:
        """Name the scores of a method by its samples."""
        ids, sources = [row.id for row in samples], [row.source for row in samples]
        return Scores(method.name, method.unit, ids, sources, queries, blocks)

    def __iter__(self) -> Iterator[Block]:
        return self.blocks()

    def matrix(self) -> Tensor:
        """Gather all scores [N, Q] in the order of `ids` and `queries`."""
        found: Tensor | None = None
        for block in self:
            if found is None:
                found = block.values.new_full((len(self.ids), len(self.queries)), float("nan"))
            found[torch.tensor(block.rows)[:, None], block.first + torch.arange(block.values.shape[1])] = block.values
        return torch.zeros(len(self.ids), len(self.queries)) if found is None else found

    def tokens(self) -> dict[str, Tensor]:
        """Gather every token's scores {sample id: [T, Q]}; a ValueError where `score` was not asked for tokens."""
        if len(set(self.ids)) < len(self.ids):
            twice = next(id for id in self.ids if self.ids.count(id) > 1)
            raise ValueError(
                f"tokens are gathered by sample id, and {twice!r} names several samples: iterate over the blocks, "
                f"whose `rows` are places among the samples."
            )
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for block in self:
            if block.tokens is None:
                raise ValueError(f"these scores of {self.method} are per sample: ask `score(..., per='token')`.")
            for row, values in zip(block.rows, block.tokens, strict=True):
                found.setdefault(self.ids[row], []).append((block.first, values))
        return {
            id: torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])], dim=1)
            for id, parts in found.items()
        }

    def summary(self, top: int = 20) -> Summary:
        """Keep the `top` best of both signs and each source's sum, in one pass."""
        names = sorted(set(self.sources))
        number = {name: place for place, name in enumerate(names)}
        Q = len(self.queries)
        sums = torch.zeros(len(names), Q, dtype=torch.float64)
        best = _Best(Q, top)
        for block in self:
            of = torch.tensor([number[self.sources[row]] for row in block.rows])
            columns = slice(block.first, block.first + block.values.shape[1])
            sums[:, columns].index_add_(0, of, block.values.double())
            best.take(block, columns)
        return Summary(best.top(), dict(zip(names, sums, strict=True)))


class _Best:
    """The running best of both signs."""

    def __init__(self, Q: int, k: int) -> None:
        self.k = k
        self._values = [torch.full((Q, k), -torch.inf, dtype=torch.float64) for _ in range(2)]
        self._rows = [torch.full((Q, k), -1) for _ in range(2)]

    def take(self, block: Block, columns: slice) -> None:
        rows = torch.tensor(block.rows).expand(block.values.shape[1], -1)
        for side, sign in enumerate((1.0, -1.0)):
            values = torch.cat([self._values[side][columns], sign * block.values.T.double()], dim=1)
            places = torch.cat([self._rows[side][columns], rows], dim=1)
            # equal scores by place, so that the order of the blocks does not show
            order = places.argsort(dim=1, stable=True)
            order = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, : self.k]
            self._values[side][columns] = values.gather(1, order)
            self._rows[side][columns] = places.gather(1, order)

    def top(self) -> Top:
        return Top(self._values[0], self._rows[0], -self._values[1], self._rows[1])
