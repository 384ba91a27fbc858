"""Draw more for the abilities that are furthest from what they can reach, by validation losses alone."""

# K sources, J abilities

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastsft.mixing._steered import Steered
from fastsft.mixing.core import Array, check_names, check_number, named, sentence, vector
from fastsft.mixing.rates import Intervals
from fastsft.tasks import Decision, Feedback, MixError

# an ability whose curve tells nothing is taken to reach this share of its lowest loss so far
_FALLBACK = 0.8
_FEWEST = 4
# decay times tried, in units of the tokens so far: a curve that bends less over what was seen can't be told from a line
_TIMES = np.geomspace(0.1, 1.5, 25)


class Reach(NamedTuple):
    """A loss that an ability can reach, and where that is from."""

    loss: float
    origin: str


@dataclass(kw_only=True)
class Velocity(Steered):
    """Give shares to abilities by the way they have still to go.

        v_j = (L_j - L*_j) / (L_j(0) - L*_j) ,  s_i = sum_j M_ij w_j v_j

    Relative progress, as in Velocitune and LLM-Shearing. L*_j is `reachable` {ability: nats}: what the ability reaches
    when it is trained alone, best measured by a pilot. Without, it is read off a curve c + a exp(-t / T) fitted to the
    losses so far, or where that can't be told, 0.8 of the lowest; both are guesses, and a wrong L* costs most of what
    the policy can gain. M is 1 for a source and its ability; where sources carry none, it is measured: what the
    books say a token of source i does for ability j, against the source that does most.
    """

    reachable: Mapping[str, float] | None = None
    # a wrong guess of what can be reached is followed steadily: larger steps lost more on simulated worlds
    eta: float = 0.5
    decay: float = 0.8
    intervals: Intervals = field(init=False, repr=False, compare=False)
    curve: list[tuple[float, Array]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for ability, loss in (self.reachable or {}).items():
            check_number(f"reachable.{ability}", loss, low=0)
        if check_number("decay", self.decay, low=0) >= 1:
            raise MixError(f"`decay` must be below 1: got {self.decay}. 0 keeps the last interval only.")

    def reset(self) -> None:
        check_names("reachable", self.reachable, self.task.abilities, "ability with a target")
        self.intervals, self.curve = Intervals(self.task.names, self.task.abilities, self.decay), []

    def decide(self, feedback: Feedback) -> Decision:
        names, abilities = self.task.names, self.task.abilities
        self.intervals.add(feedback)
        initial, losses = vector(abilities, feedback.initial), vector(abilities, feedback.losses)
        if not self.curve:
            self.curve.append((0.0, initial))
        self.curve.append((float(sum(feedback.used.values())), losses))
        reach = [self._reach(at) for at in range(len(abilities))]
        way = np.maximum(initial - np.array([each.loss for each in reach]), 1e-12 * initial)
        left = np.maximum(losses - np.array([each.loss for each in reach]), 0) / way
        M, origin = self._links()
        signal = (M * (self.importance * left)[:, None]).sum(0)
        error = np.sqrt((M**2 * (self.importance * vector(abilities, feedback.errors) / way)[:, None] ** 2).sum(0))
        before, caps = vector(names, feedback.weights), self.caps(feedback)
        moved = self.move(before, self.prior, signal, error, caps)
        details = {
            "left": named(abilities, left),
            "reachable": {ability: each._asdict() for ability, each in zip(abilities, reach, strict=True)},
            "links": {ability: named(names, row) for ability, row in zip(abilities, M, strict=True)},
            "links_from": origin,
        }

        def reason(at: int) -> str:
            served = np.argmax(M[:, at] * self.importance * left)
            return f"{abilities[served]} has {100 * left[served]:.0f} % of its way left"

        held = f"no ability's way stands out by more than {self.gate:g} standard errors"
        why = sentence(names, before, moved.weights, reason, moved.said, held)
        return self.answer(moved, signal, error, why, details)

    def _reach(self, at: int) -> Reach:
        given = (self.reachable or {}).get(self.task.abilities[at])
        if given is not None:
            return Reach(float(given), "given")
        times, losses = [time for time, _ in self.curve], [values[at] for _, values in self.curve]
        fitted = asymptote(times, losses)
        return Reach(_FALLBACK * min(losses), "guess") if fitted is None else Reach(fitted, "curve")

    def _links(self) -> tuple[Array, str]:
        abilities, own = self.task.abilities, [source.ability for source in self.task.sources]
        if all(ability in abilities for ability in own):
            return np.array([[float(each == ability) for each in own] for ability in abilities]), "abilities of sources"
        A = np.nan_to_num(self.intervals.table()[0], nan=0.0)
        most = np.abs(A).max(1, keepdims=True)
        return np.divide(A, most, out=np.zeros_like(A), where=most > 0), "books"


def asymptote(times: Sequence[float], losses: Sequence[float]) -> float | None:
    """Fit loss = c + a exp(-t / T) by least squares and give c; None where the losses can't tell it.

    They can where there are four at least, they fall, and the best T lies inside the range tried and beats a straight
    line: T up to 1.5 times what was seen, so that the curve bends by a quarter.
    """
    t, y = np.asarray(times, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(t) < _FEWEST or t[-1] <= 0 or y[-1] >= y[0]:
        return None
    found = [_least_squares(np.exp(-t / (time * t[-1])), y) for time in _TIMES]
    at = int(np.argmin([rest for _, _, rest in found]))
    c, a, rest = found[at]
    straight = _least_squares(-t / t[-1], y)[2]
    if at == len(found) - 1 or a <= 0 or not 0 <= c < y.min() or rest >= 0.5 * straight:
        return None
    return c


def _least_squares(x: Array, y: Array) -> tuple[float, float, float]:
    """Fit y = c + a x: (c, a, sum of squared residuals)."""
    dx, dy = x - x.mean(), y - y.mean()
    a = float(dx @ dy / (dx @ dx))
    return float(y.mean() - a * x.mean()), a, float(((dy - a * dx) ** 2).sum())
