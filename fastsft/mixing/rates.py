"""What one token more of a source does, by the books: rates with standard errors, followed over intervals.

Entries fall as a run goes on, by the schedule of the learning rate and by what is already learnt, and a mean over nats
would be ruled by the first intervals for long. So a signal is followed as relative value: a source's share of all that
the books moved in an interval, against its share of the tokens.
"""

# N intervals, K sources, J abilities

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastsft.mixing.core import Array, vector
from fastsft.tasks import Feedback

# weights of intervals below this are as good as none
_FORGOTTEN = 1e-6
# how much an interval weighs, against the next, in the estimate of noise; prior weight of what sources share, in
# intervals. Longer: steep first intervals pass for noise. Both from the study in tests/mixing/_support.py
_NOISE_DECAY, _POOLED = 0.6, 2.0


class Rates(NamedTuple):
    """signal [K]: nats that a thousand tokens more lower the weighted mean loss by; error [K]: its standard error;
    scale: nats that a thousand tokens of the mix moved, all entries counted positive. A source that was not drawn has
    signal nan."""

    signal: Array
    error: Array
    scale: float


class Intervals:
    """Keep the books of the last intervals; `decay` is what an interval weighs against the one after it."""

    def __init__(self, sources: Sequence[str], abilities: Sequence[str], decay: float) -> None:
        self.sources, self.abilities, self.decay = list(sources), list(abilities), decay
        self.entries: list[Array] = []  # [J, K]
        self.tokens: list[Array] = []  # [K]
        slowest = max(decay, _NOISE_DECAY)
        self._longest = int(np.ceil(np.log(_FORGOTTEN) / np.log(slowest)))

    def add(self, feedback: Feedback) -> None:
        entries = np.array([vector(self.sources, feedback.entries[ability]) for ability in self.abilities])
        self.entries = [*self.entries, entries][-self._longest :]
        self.tokens = [*self.tokens, vector(self.sources, feedback.credited)][-self._longest :]

    def __len__(self) -> int:
        return len(self.tokens)

    def rates(self, importance: Array) -> Rates:
        """Give every source's signal, abilities weighted by importance [J]."""
        weighted = importance[:, None] * np.stack(self.entries)
        return _relative(-weighted.sum(1), np.abs(weighted).sum((1, 2)), np.stack(self.tokens), self.decay)

    def table(self) -> tuple[Array, Array]:
        """Give A [J, K], nats that a thousand tokens more of each source lower each ability's loss by, and its standard
        errors; nan where a source was not drawn."""
        tokens = np.stack(self.tokens)
        found = [
            _relative(-entries, np.abs(entries).sum(1), tokens, self.decay)
            for entries in np.stack(self.entries).swapaxes(0, 1)
        ]
        return np.stack([each.signal for each in found]), np.stack([each.error for each in found])


def _relative(values: Array, gross: Array, tokens: Array, decay: float) -> Rates:
    """Follow values [N, K] as shares of what moved in each interval, gross [N], and scale them to what moves now."""
    drawn = tokens.sum(1)
    moved = (gross > 0) & (drawn > 0)
    if not moved.any():
        return Rates(np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan), 0.0)
    relative = values[moved] * (drawn[moved] / gross[moved])[:, None]
    value, error = followed(relative, tokens[moved], decay)
    age = np.arange(moved.sum() - 1, -1, -1.0)
    weight = np.where(age > 0, decay**age, 1.0)
    scale = 1000 * float(weight @ gross[moved]) / float(weight @ drawn[moved])
    return Rates(value * scale, error * scale, scale)


def followed(values: Array, tokens: Array, decay: float) -> tuple[Array, Array]:
    """Give each source's value a token [K] and its standard error [K]; values, tokens [N, K], oldest first.

    The value is sum of decay^age values / sum of decay^age tokens. The noise of an interval's value is taken to grow
    like its tokens; its variance a token is that of differences between neighbouring intervals, so a trend counts
    little, and is drawn towards the median over sources, since a few intervals alone say little. One interval has no
    standard error: it is infinite.
    """
    age = np.arange(len(tokens) - 1, -1, -1.0)[:, None]
    weight = np.where(age > 0, decay**age, 1.0)
    sums = (weight * tokens).sum(0)
    drawn = sums > 0
    rate = np.divide((weight * values).sum(0), sums, out=np.full(len(sums), np.nan), where=drawn)
    variance = _variance_per_token(values, tokens)
    spread = np.divide((weight**2 * tokens).sum(0), sums**2, out=np.full(len(sums), np.nan), where=drawn)
    return rate, np.sqrt(variance * spread)


def _variance_per_token(values: Array, tokens: Array) -> Array:
    """Estimate the variance that a token adds to an interval's value [K], from neighbouring intervals."""
    both = (tokens[1:] > 0) & (tokens[:-1] > 0)
    if not both.any():
        return np.full(tokens.shape[1], np.inf)
    each = np.divide(values, tokens, out=np.zeros_like(values), where=tokens > 0)
    inverse = np.divide(1.0, tokens, out=np.zeros_like(values), where=tokens > 0)
    squares = np.divide((each[1:] - each[:-1]) ** 2, inverse[1:] + inverse[:-1], out=np.zeros(both.shape), where=both)
    weight = both * _NOISE_DECAY ** np.arange(len(both) - 1, -1, -1.0)[:, None]
    total = weight.sum(0)
    own = np.divide((weight * squares).sum(0), total, out=np.zeros(len(total)), where=total > 0)
    num = np.divide(total**2, (weight**2).sum(0), out=np.zeros(len(total)), where=total > 0)
    shared = float(np.median(own[total > 0]))
    return (num * own + _POOLED * shared) / (num + _POOLED)
