"""Add up the intervals of a run: one book per ability, and what it leaves unexplained.

All in nats per response token of the ability; negative lowers its loss, so it helps.
"""

# I intervals, S sources

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsft.report.run import Event, Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Book:
    """The intervals of one ability, in order.

    last [I] steps; measured, error, decay, unfollowed (carried momentum included) [I]; by_source [I, S];
    start_only and samples [I, S], or None where the run did not record them.
    left_out: intervals dropped because a loss or an entry was not a number.
    misbooked: how far the recorded residuals are from what the other entries leave, in nats.
    """

    ability: str
    first_step: int
    last: NDArray[np.int64]
    measured: Array
    error: Array
    by_source: Array
    decay: Array
    unfollowed: Array
    start_only: Array | None
    samples: Array | None
    left_out: int
    misbooked: float

    @property
    def predicted(self) -> Array:
        """The change the books predict, [I]."""
        return self.by_source.sum(axis=1) + self.decay + self.unfollowed


def open_book(run: Run, ability: str) -> Book:
    """Collect the intervals of `ability`; those with an undefined number are counted and left out."""
    found = [(event, event["abilities"][ability]) for event in run.intervals if ability in event["abilities"]]
    kept = [(event, entry) for event, entry in found if _is_defined(entry)]
    entries = [entry for _, entry in kept]
    by_source = _table(entries, "by_source", run.sources)
    measured, decay = _column(entries, "measured"), _column(entries, "decay")
    unfollowed = _column(entries, "unfollowed") + _column(entries, "carried")
    residual = measured - by_source.sum(axis=1) - decay - unfollowed
    return Book(
        ability=ability,
        first_step=kept[0][0]["from"] if kept else 0,
        last=np.array([event["to"] for event, _ in kept], dtype=np.int64),
        measured=measured,
        error=np.array(
            [math.nan if entry.get("error") is None else entry["error"] for entry in entries], dtype=np.float64
        ),
        by_source=by_source,
        decay=decay,
        unfollowed=unfollowed,
        start_only=_table(entries, "start_only", run.sources)
        if all(entry.get("start_only") for entry in entries)
        else None,
        samples=_table(entries, "samples", run.sources)
        if len(run.drawn) and all(entry.get("samples") for entry in entries)
        else None,
        left_out=len(found) - len(kept),
        misbooked=float(np.abs(residual - _column(entries, "residual")).sum()),
    )


def shares(book: Book) -> tuple[Array, Array | None]:
    """Share of the gross flow left unexplained up to each interval, [I]: by these books, and by start-only ones.

    Gross flow: the sum over sources of |what was booked to the source so far|. Undefined (nan) where it is 0.
    """
    gross = np.abs(book.by_source.cumsum(axis=0)).sum(axis=1)
    gross[gross == 0] = math.nan
    own = np.abs((book.measured - book.predicted).cumsum()) / gross
    if book.start_only is None:
        return own, None
    start = book.measured - book.decay - book.unfollowed - book.start_only.sum(axis=1)
    return own, np.abs(start.cumsum()) / gross


def correlation(book: Book) -> float | None:
    """Pearson correlation over intervals of predicted with measured change; None below three intervals."""
    if len(book.measured) < 3 or np.ptp(book.measured) == 0 or np.ptp(book.predicted) == 0:
        return None
    return float(np.corrcoef(book.predicted, book.measured)[0, 1])


def samples_share(book: Book) -> float | None:
    """Sum over sources of |samples' sum - entry|, as a share of the sum of |entry|."""
    if book.samples is None or not len(book.measured):
        return None
    entries = book.by_source.sum(axis=0)
    gross = float(np.abs(entries).sum())
    return float(np.abs(book.samples.sum(axis=0) - entries).sum()) / gross if gross else None


def loss_at(run: Run, step: int, ability: str) -> tuple[float | None, float | None]:
    """The target loss measured at `step` and its standard error."""
    for event in run.refreshes:
        if event["step"] == step:
            return event["losses"].get(ability), event.get("errors", {}).get(ability)
    return None, None


def measured_error(run: Run, book: Book) -> float | None:
    """Bound the standard error of the whole measured change, without assuming independent intervals.

    The smaller of two bounds: the sum of the intervals' errors (triangle inequality), and
    sqrt(error_start^2 + error_end^2), which holds when a row's losses before and after are not anti-correlated.
    """
    bounds = []
    if len(book.error) and np.isfinite(book.error).all():
        bounds.append(float(book.error.sum()))
    if len(book.last):
        _, before = loss_at(run, book.first_step, book.ability)
        _, after = loss_at(run, int(book.last[-1]), book.ability)
        if before is not None and after is not None:
            bounds.append(math.hypot(before, after))
    return min(bounds, default=None)


def _is_defined(entry: Event) -> bool:
    numbers = [entry["measured"], entry["decay"], entry["unfollowed"], entry["residual"], *entry["by_source"].values()]
    return all(number is not None for number in numbers)


def _column(entries: list[Event], key: str) -> Array:
    return np.array([entry.get(key) or 0.0 for entry in entries], dtype=np.float64)


def _table(entries: list[Event], key: str, sources: list[str]) -> Array:
    rows = [[entry[key].get(source) or 0.0 for source in sources] for entry in entries]
    return np.array(rows, dtype=np.float64).reshape(len(entries), len(sources))
