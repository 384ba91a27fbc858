"""The step that all steered policies share: from a signal and its standard error to the next mix.

A signal says how much each source is worth drawing from (higher: more), in a policy's own unit. The step is a mirror
step that forgets towards the prior, moves only along what stands out of the noise, and keeps floors, caps and a trust
region.
"""

# K sources, p mix, p0 prior mix, s signal, u caps

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsft.tasks import Feedback, MixError, MixTask

Array = NDArray[np.float64]
# no source's relative value pulls by more than this
CLIP = 2.0
# of the moves in a sentence, at most; the others are counted
_SPOKEN = 4


class Moved(NamedTuple):
    """The next mix [K], how far each source's signal pulled it [K], and what must be said of bounds."""

    weights: Array
    z: Array
    said: list[str]


@dataclass(kw_only=True)
class Steps:
    """How far and where to a mix moves at one decision.

        z = clip((s - <p, s>) / scale, -2, 2) less `slack`, shrunk by max(0, 1 - (gate * error / |s - <p, s>|)^2)
        q = softmax((1 - prior_strength) log p + prior_strength log p0 + eta z)
        p' = argmin KL(p' || q) over {floor_i <= p'_i <= cap_i, |log p'_i - log p_i| <= trust, sum one}

    The last line is the projection, which also keeps floors and caps exactly. A source with a share of 0 keeps it.
    A steady signal holds the log of a share at eta / prior_strength times z from the prior's; without one the mix is
    back at the prior in a few decisions. The defaults won on the simulated worlds of tests/mixing/_support.py: with
    eta .3, prior_strength .05 and Align's decay .8 it closed 34 % of the gap to the best static mix, with these 66 %;
    the small values follow late and then overshoot. Twice the ratio gains little where signals are clear, and follows
    noise where they are not.
    """

    eta: float = 2.0
    prior_strength: float = 0.3
    # no share falls below this by a signal; one that the start sets lower keeps the lower
    floor: float = 0.02
    # most that the log of a share moves at one decision
    trust: float = 0.5
    # a signal moves its source only where it differs from the mix's mean by more standard errors than this; 0: always
    gate: float = 0.7
    # differences from the mix's mean that are smaller than this share of it move nothing, and others by the rest
    slack: float = 0.0
    # epochs of a source after which it is drawn no more: for all, or {source: epochs}
    max_epochs: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_number("eta", self.eta, low=0)
        check_number("prior_strength", self.prior_strength, low=0, high=1)
        check_number("floor", self.floor, low=0, high=0.5)
        check_number("gate", self.gate, low=0)
        check_number("slack", self.slack, low=0)
        if check_number("trust", self.trust, low=0, high=100) == 0:
            raise MixError(
                "`trust` must be positive: a mix that may not move is the policy 'static'. The default is 0.5."
            )
        check_epochs(self.max_epochs)

    def check(self, task: MixTask) -> None:
        """Refuse what can't hold for the sources of this run."""
        K = len(task.sources)
        if K * self.floor > 0.5:
            raise MixError(
                f"`floor` {self.floor:g} for {K} sources is a floor that cannot hold: together the floors must leave "
                f"half of the mix free. Give at most {math.floor(500 / K) / 1000:g}."
            )
        check_names("max_epochs", self.max_epochs, task.names, "source")

    @property
    def anchor(self) -> float:
        """How much of the log of the prior enters the next mix."""
        return self.prior_strength

    def move(
        self, weights: Array, prior: Array, signal: Array, error: Array, caps: Array, scale: float | None = None
    ) -> Moved:
        """Move a mix [K] by a signal [K] with standard errors [K].

        A signal that is nan says nothing of its source; an error that is nan is unknown, and lets its source move.
        caps [K]: most of each share (1: none). scale: what the signal is measured by, in its unit; None: the mix's mean
        of its magnitude.
        """
        z = self.pull(weights, signal, error, scale)
        return self.towards(weights, prior, self.eta * z, z, caps)

    def pull(self, weights: Array, signal: Array, error: Array, scale: float | None = None) -> Array:
        """Give z [K]: the signal against the mix's mean, in units of scale, less what noise explains."""
        known = np.isfinite(signal) & (weights > 0)
        if known.sum() < 2 or np.isinf(error[known]).any():
            return np.zeros(len(weights))
        share = np.where(known, weights, 0.0) / weights[known].sum()
        s = np.where(known, signal, 0.0)
        away = np.where(known, s - share @ s, 0.0)
        by = share @ np.abs(s) if scale is None else scale
        variance = np.where(known, np.nan_to_num(error, nan=0.0), 0.0) ** 2
        # of s_i - sum_k p_k s_k
        noise = np.sqrt((1 - 2 * share) * variance + share**2 @ variance)
        bound = np.where(np.isnan(error), 0.0, self.gate * noise)
        clear = np.abs(away) > bound
        z = np.where(clear, away / by, 0.0) if by > 0 else np.zeros(len(weights))
        z = np.sign(z) * np.maximum(np.abs(z) - self.slack, 0.0)
        kept = 1 - np.divide(bound, np.abs(away), out=np.zeros(len(weights)), where=clear) ** 2
        return np.clip(z, -CLIP, CLIP) * kept

    def towards(self, weights: Array, prior: Array, push: Array, z: Array, caps: Array) -> Moved:
        """Take the mirror step with `push` [K] added to the logs, and project it onto what is allowed."""
        live = (weights > 0) & (prior > 0)
        q = np.zeros(len(weights))
        g = self.anchor
        logs = (1 - g) * np.log(weights[live]) + g * np.log(prior[live]) + push[live]
        q[live] = np.exp(logs - logs.max())
        return self.within(weights, prior, q, z, caps)

    def within(
        self, weights: Array, prior: Array, q: Array, z: Array, caps: Array, trust: float | None = None
    ) -> Moved:
        """Project q [K] onto floors, caps and the trust region around `weights` (inf: without one)."""
        low, high, said = self.bounds(weights, prior, caps, trust)
        return Moved(project(np.where(high > 0, q, 0.0), low, high), z, said)

    def bounds(
        self, weights: Array, prior: Array, caps: Array, trust: float | None = None
    ) -> tuple[Array, Array, list[str]]:
        """Give the least and most of each share [K], [K]. Caps come before floors, and both before the trust region."""
        live = (weights > 0) & (prior > 0)
        most = np.where(live, np.minimum(caps, 1.0), 0.0)
        if most.sum() < 1 - 1e-12:
            # no mix keeps them all: by the room that they leave, and where they leave none as it was
            room = most if most.sum() > 0 else np.where(live, weights, 0.0) if live.any() else weights
            short = 100 * (1 - most.sum())
            said = f"the caps leave no source for {short:.0f} % of what is still to be drawn, and can't be kept"
            return room / room.sum(), room / room.sum(), [said]
        least = np.minimum(np.minimum(self.floor, prior), most)
        reach = math.exp(self.trust if trust is None else trust)
        low = np.clip(weights / reach, least, most)
        high = np.where(live, np.clip(np.where(live, weights, 1.0) * reach, least, most), 0.0)
        # a cap that fell takes more from its source than the trust region lets the others take up, or gives back
        return least if low.sum() > 1 else low, most if high.sum() < 1 else high, []


def project(q: Array, low: Array, high: Array) -> Array:
    """Find the mix p with low <= p <= high that is nearest to q [K] by KL(p || q): p = clip(c q, low, high), sum one.

    c is found exactly: the sum of the clipped shares is piecewise linear in it. Needs sum(low) <= 1 <= sum(high), up
    to rounding, and q > 0 where high > low.
    """
    free = q > 0
    knots = np.unique(np.concatenate([low[free] / q[free], high[free] / q[free]]))
    sums = np.array([np.clip(c * q, low, high).sum() for c in knots])
    at = int(np.searchsorted(sums, 1.0))
    if at == 0 or at == len(knots):
        p = np.clip(knots[min(at, len(knots) - 1)] * q, low, high) if len(knots) else low
        return p / p.sum()
    middle = (knots[at - 1] + knots[at]) / 2
    loose = free & (middle * q > low) & (middle * q < high)
    fixed = np.clip(middle * q, low, high)[~loose].sum()
    return np.where(loose, q * (1 - fixed) / q[loose].sum(), np.clip(middle * q, low, high))


def epoch_caps(task: MixTask, feedback: Feedback, max_epochs: float | Mapping[str, float] | None) -> Array:
    """Give the most of each share [K] that leaves every source within its epochs to the end of the run.

    (epochs * tokens of one - used) / tokens still to be drawn, which are those drawn so far / progress - drawn so far.
    """
    K = len(task.sources)
    drawn = math.fsum(feedback.used.values())
    if max_epochs is None or feedback.progress <= 0 or drawn <= 0:
        return np.ones(K)
    rest = drawn * (1 - feedback.progress) / feedback.progress
    caps = np.ones(K)
    for at, source in enumerate(task.sources):
        epochs = max_epochs.get(source.name, math.inf) if isinstance(max_epochs, Mapping) else max_epochs
        left = max(0.0, epochs * source.tokens - feedback.used[source.name])
        caps[at] = min(1.0, left / rest) if rest > 0 else float(left > 0)
    return caps


def sentence(
    names: Sequence[str], before: Array, after: Array, reason: Callable[[int], str], said: Sequence[str], held: str
) -> str:
    """Say a move: each source that moved, the largest first, with its reason; or that the mix is held, and why."""
    shares = [(f"{old:.2f}", f"{new:.2f}") for old, new in zip(before, after, strict=True)]
    order = np.argsort(-np.abs(after - before), kind="stable").tolist()
    moves = [at for at in order if shares[at][0] != shares[at][1]]
    parts = []
    for at in moves[:_SPOKEN]:
        way = "up" if after[at] > before[at] else "down"
        parts.append(f"{names[at]} {way} from {shares[at][0]} to {shares[at][1]}: {reason(at)}")
    if len(moves) > _SPOKEN:
        parts.append(f"{len(moves) - _SPOKEN} more moved")
    return "; ".join([*(parts or [f"held: {held}"]), *said]) + "."


def with_error(value: float, error: float) -> str:
    """Write a number with its standard error, to the digit that this leaves."""
    if not (math.isfinite(error) and error > 0):
        return f"{value:.2g}"
    size = math.floor(math.log10(error))
    digits = max(0, -size + (error / 10**size < 2))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def vector(names: Sequence[str], values: Mapping[str, float]) -> Array:
    """Put named numbers into an array [K], in the order of `names`."""
    return np.array([values[name] for name in names], dtype=np.float64)


def named(names: Sequence[str], values: Array) -> dict[str, float]:
    """Turn an array [K] into {name: number}."""
    return dict(zip(names, values.tolist(), strict=True))


def check_number(name: str, value: object, *, low: float, high: float = math.inf) -> float:
    """Refuse what is no number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (low <= value <= high):
        upper = "" if high == math.inf else f", at most {high:g}"
        raise MixError(f"`{name}` must be a number, at least {low:g}{upper}: got {value!r}.")
    return float(value)


def check_names(name: str, given: object, known: Sequence[str], noun: str) -> None:
    """Refuse a mapping that names what a run does not have."""
    for each in given if isinstance(given, Mapping) else ():
        if each not in known:
            raise MixError(
                f"`{name}` names {each!r}, which is no {noun} of the run: it has {', '.join(known)}. Mend the name."
            )


def check_epochs(max_epochs: object) -> None:
    """Refuse caps on epochs that are no positive numbers."""
    each = max_epochs.values() if isinstance(max_epochs, Mapping) else [] if max_epochs is None else [max_epochs]
    for epochs in each:
        if check_number("max_epochs", epochs, low=0) == 0:
            raise MixError("`max_epochs` must be positive: to leave a source out, give it a share of 0.")
