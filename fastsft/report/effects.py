"""Say what the data of one ability did to another: as the books have it, and by regression on what was drawn.

In nats per response token of the ability, per thousand tokens drawn; negative lowered its loss, so it helped.
Letters: T intervals, G groups of sources, A abilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsft.report.books import Book, open_book
from fastsft.report.ridge import ridge
from fastsft.report.run import Run, own_ability

Array = NDArray[np.float64]

# a slope is told where the run narrowed its error to this share of what was thought possible before
TOLD = 0.5
# how far trends may go from start to end, before the run is looked at, in sizes of an ability's slopes
_TREND = 2.0


@dataclass(frozen=True)
class Effects:
    """What each group's tokens did to each ability: values and standard errors [G, A], nan where it can't be told.

    groups: the abilities that have sources of their own. unit: `supervised` tokens or all `tokens`.
    """

    groups: list[str]
    unit: str
    values: Array
    errors: Array


@dataclass(frozen=True)
class Sight:
    """The intervals of one ability, by groups: tokens [T, G] in thousands, entries [T, G] and changes [T] in nats.

    changes: measured, less weight decay and what was not followed. progress [T]: middle of the interval, 0 to 1.
    """

    tokens: Array
    entries: Array
    changes: Array
    progress: Array


def interference(run: Run) -> Effects | None:
    """Divide what the books gave a group's sources by the thousands of tokens drawn of them; None without both."""
    return _each(run, booked)


def slopes(run: Run) -> Effects | None:
    """Regress the measured changes on the thousands of tokens drawn of each group; nan where the run can't tell.

    changes [T] = (tokens * course) [T, G] @ slopes + trends, by `ridge` toward the books' ratios, with their root mean
    square as the standard deviation before. Learning slows, and a mix that drifted meanwhile must not be credited
    with that: hence the course [T], how fast the books' entries fell, and a trend of each group about its own middle.
    In simulated runs of 24 intervals the errors were right to 50 % where the mix went to and fro, and up to 2.7 times
    too small where it only drifted, e^3-fold, while effects fell as 1 / (1 + 10 progress).
    """
    return _each(run, regressed)


def ratio(entries: Array, tokens: Array) -> tuple[float, float]:
    """Sum of entries [T] over sum of tokens [T], and its standard error from the spread over intervals.

    With left = entries - ratio * tokens: sqrt(T / (T - 1) * sum of left^2) / sum of tokens; nan from one interval.
    """
    value, count = float(entries.sum() / tokens.sum()), len(entries)
    if count < 2:
        return value, float("nan")
    left = entries - value * tokens
    return value, float(np.sqrt(count / (count - 1) * (left @ left)) / tokens.sum())


def token_unit(run: Run) -> str | None:
    """Name the tokens to count: supervised ones where every step says them, else all; None where none are said."""
    drew = [event for event in run.steps if event.get("documents")]
    for unit in ("supervised", "tokens"):
        if drew and all(event.get(unit) for event in drew):
            return unit
    return None


def _each(run: Run, judge: Callable[[Sight], Array]) -> Effects | None:
    unit, groups = token_unit(run), _groups(run)
    names = [name for name, _ in groups if name is not None]
    if unit is None or not names:
        return None
    found = np.full((2, len(names), len(run.abilities)), np.nan)
    for a, ability in enumerate(run.abilities):
        book = open_book(run, ability)
        if len(book.last):
            # sources of no ability stand last
            found[:, :, a] = judge(_sight(run, book, unit, [sources for _, sources in groups]))[:, : len(names)]
    return Effects(names, unit, *found)


def booked(sight: Sight) -> Array:
    """Give the books' ratio of each group and its standard error, [2, G]; nan where nothing was drawn of it."""
    pairs = zip(sight.entries.T, sight.tokens.T, strict=True)
    return np.array([ratio(entries, tokens) if tokens.sum() else (np.nan, np.nan) for entries, tokens in pairs]).T


def regressed(sight: Sight) -> Array:
    """Give the slope of each group and its standard error, [2, G], as `slopes` says; nan where it can't be told."""
    told = np.full((2, sight.tokens.shape[1]), np.nan)
    drawn = sight.tokens.sum(axis=0) > 0
    tokens, prior = sight.tokens[:, drawn], booked(sight)[0, drawn]
    # two columns a group, and two intervals to spare for the noise
    if not np.any(prior) or len(tokens) < 2 * len(prior) + 2:
        return told
    size = float(np.sqrt(np.mean(prior**2)))
    columns = tokens * _course(sight, tokens @ np.abs(prior))[:, None]
    # a column in units of its course: so a slope is what a token did on average over the run
    scale = columns.sum(axis=0) / tokens.sum(axis=0)
    middle = (columns * sight.progress[:, None]).sum(axis=0) / columns.sum(axis=0)
    trends = columns * (sight.progress[:, None] - middle)
    spread = np.concatenate([size / scale, _TREND * size / scale])
    before = np.concatenate([prior / scale, np.zeros(len(prior))])
    values, errors = (
        column[: len(prior)] * scale for column in ridge(np.hstack([columns, trends]), sight.changes, before, spread)
    )
    told[:, drawn] = np.where(errors <= TOLD * size, [values, errors], np.nan)
    return told


def _course(sight: Sight, usual: Array) -> Array:
    """Fit exp(a + b progress), [T], to how large the books' entries were, in units of the `usual` [T].

    A smooth course: entries follow the mix too, and what they say of it is what the regression is to judge.
    """
    sizes = np.abs(sight.entries).sum(axis=1)
    moved = (sizes > 0) & (usual > 0)
    weights = np.sqrt(usual[moved])
    design = np.column_stack([np.ones(len(sizes)), sight.progress - 0.5])
    fitted, *_ = np.linalg.lstsq(design[moved] * weights[:, None], np.log(sizes[moved] / usual[moved]) * weights)
    return np.exp(design @ fitted)


def _sight(run: Run, book: Book, unit: str, groups: list[list[str]]) -> Sight:
    begun = {event["to"]: event["from"] for event in run.intervals}
    last = book.last.tolist()
    first = [begun[step] for step in last]
    interval = {step: t for t in range(len(last)) for step in range(first[t] + 1, last[t] + 1)}
    tokens = np.zeros((len(last), len(groups)))
    for event in run.steps:
        if event["step"] in interval:
            counts = event.get(unit) or {}
            tokens[interval[event["step"]]] += [sum(counts.get(source, 0) for source in group) for group in groups]
    places = [[run.sources.index(source) for source in group] for group in groups]
    return Sight(
        tokens=tokens / 1000,
        entries=np.column_stack([book.by_source[:, place].sum(axis=1) for place in places]),
        changes=book.measured - book.decay - book.unfollowed,
        progress=(book.last + np.array(first)) / (2 * book.last[-1]),
    )


def _groups(run: Run) -> list[tuple[str | None, list[str]]]:
    """Sources by the ability they were gathered for, in the abilities' order; those of none, if any, last."""
    groups: dict[str | None, list[str]] = {ability: [] for ability in (*run.abilities, None)}
    for source in run.sources:
        groups[own_ability(run, source)].append(source)
    return [(name, sources) for name, sources in groups.items() if sources]
