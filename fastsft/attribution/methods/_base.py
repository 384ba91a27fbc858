"""The one interface of all methods, and what they share: targets as queries, and what was fitted."""

# N samples, Q queries

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from torch import Tensor, nn

from fastsft.attribution.methods._checkpoints import Checkpoint
from fastsft.attribution.methods._scores import Scores
from fastsft.data import Row

# rows that are a query each, or named groups of rows that are one query each
Targets = Sequence[Row] | Mapping[str, Sequence[Row]]
# of one checkpoint: parameter name -> exp_avg, exp_avg_sq (both of the parameter's shape) and step (a number)
Moments = Mapping[str, Mapping[str, Tensor | float]]
Per = Literal["sample", "token"]


class Method(Protocol):
    """A way to score training samples for queries.

    fit: remember the samples and learn from them what the method needs. No checkpoints: the model's present weights.
    optimizer_state: of each checkpoint its optimizer's moments, for the methods that read them. The model is given back
    as it was found.
    score: nothing is computed until the scores are iterated. Positive scores help: training on the sample lowers the
    loss of the query. per="token" adds each token's share where the method knows it, else it is a ValueError.
    """

    name: str

    def fit(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        samples: Sequence[Row],
        optimizer_state: Sequence[Moments] | None = None,
    ) -> Self: ...

    def score(self, targets: Targets, *, per: Per = "sample") -> Scores: ...


@dataclass(frozen=True, eq=False)
class Queries:
    """Q queries: of each its name and its rows. Its loss is nats per response token, over all its rows' tokens."""

    names: list[str]
    rows: list[list[Row]]

    @staticmethod
    def of(targets: Targets) -> Queries:
        """Read targets in either form, and refuse empty ones."""
        if isinstance(targets, Mapping):
            found = Queries(list(targets), [list(rows) for rows in targets.values()])
        else:
            found = Queries([row.id for row in targets], [[row] for row in targets])
        if not found.names:
            raise ValueError("`targets` is empty: give rows, each a query, or a mapping of names to rows.")
        for name, rows in zip(found.names, found.rows, strict=True):
            if not sum(row.num_supervised for row in rows):
                raise ValueError(f"query {name!r} has no supervised token, so it has no loss: leave it out.")
        return found

    @property
    def tokens(self) -> list[int]:
        """Count each query's supervised tokens."""
        return [sum(row.num_supervised for row in rows) for rows in self.rows]

    def __len__(self) -> int:
        return len(self.names)


def only_samples(method: str, per: Per) -> None:
    """Refuse scores of tokens for a method that has none."""
    if per != "sample":
        raise ValueError(f"{method} scores whole samples only: ask per='sample'.")
