"""Draw by a linear law of what tokens do to losses, learnt from books and measured losses, within limits on losses."""

# K sources, J abilities, C protected abilities

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastsft.mixing._steered import Steered
from fastsft.mixing.align import importance_of, worth
from fastsft.mixing.core import Array, check_names, check_number, named, project, sentence, vector
from fastsft.mixing.rates import Intervals, Rates
from fastsft.mixing.ridge import Ridge
from fastsft.tasks import Decision, Feedback, MixError

# how far the books may be from what is measured, against the ability's mean entry: their residual is second order
_DOUBT = 0.5
# a multiplier beyond this moves shares as far as they go
_MOST = 2.0**40


class Limit(NamedTuple):
    """A protected ability: a thousand tokens of each source change its loss by slopes [K]; `room` nats are left."""

    ability: str
    slopes: Array
    room: float


@dataclass(kw_only=True)
class Slope(Steered):
    """Learn Theta in dL = Theta tokens + noise, and move to the mix that it says is best.

    Theta's prior is what the books say of a token (as in `Align`), doubted by half the ability's mean entry; measured
    losses teach it by Bayesian ridge regression with `forgetting`, their noise the standard error of a loss. With
    s = -w Theta the step is that of the core, which rests at the p of most

        <p, s> / scale - (prior_strength / eta) KL(p || p0) ,

    and it is taken subject to

        L_c now + (Theta p)_c * tokens to the end <= L_c(0) + slack_c   for `protected` {ability c: slack in nats},

    judged by the mean of Theta, by multipliers on the limits; as at every decision anew, what was foretold wrongly is
    made up for. Where no mix inside floors, caps and trust region keeps a limit, it goes as far as these allow.
    A mixing law as in Aioli and DynaMiCS, which learn it from probes; here a `jitter` of the mix, seeded by (task.seed,
    decision), keeps the sources from being drawn in step.
    """

    protected: Mapping[str, float] = field(default_factory=dict)
    # .9 remembers the steep start of a run: on simulated worlds it closed half as much of the gap as .7
    forgetting: float = 0.7
    # standard deviation of the noise on log shares
    jitter: float = 0.05
    # of the books: what an interval weighs against the next
    decay: float = 0.3
    intervals: Intervals = field(init=False, repr=False, compare=False)
    ridges: list[Ridge] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for ability, slack in self.protected.items():
            check_number(f"protected.{ability}", slack, low=0)
        check_number("jitter", self.jitter, low=0)
        if not 0 < check_number("forgetting", self.forgetting, low=0) <= 1:
            raise MixError(f"`forgetting` must be above 0, at most 1, which forgets nothing: got {self.forgetting}.")
        if check_number("decay", self.decay, low=0) >= 1:
            raise MixError(f"`decay` must be below 1: got {self.decay}. 0 keeps the last interval only.")

    def reset(self) -> None:
        check_names("protected", self.protected, self.task.abilities, "ability with a target")
        self.intervals = Intervals(self.task.names, self.task.abilities, self.decay)
        self.ridges = [Ridge(len(self.task.sources), self.forgetting) for _ in self.task.abilities]

    def decide(self, feedback: Feedback) -> Decision:
        names, abilities = self.task.names, self.task.abilities
        self.decided += 1
        self.intervals.add(feedback)
        theta, covariance = self._learn(feedback)
        importance = importance_of("relative", self.importance, abilities, feedback)
        signal = -importance @ theta
        error = np.sqrt(importance**2 @ np.diagonal(covariance, axis1=1, axis2=2))
        scale = self.intervals.rates(importance).scale
        before, caps = vector(names, feedback.weights), self.caps(feedback)
        z = self.pull(before, signal, error, scale)
        limits = self._limits(feedback, theta)
        free = self.towards(before, self.prior, self.eta * z + self._noise(), z, np.ones(len(names)))
        low, high, said = self.bounds(before, self.prior, caps)
        weights, multipliers, broken = within_limits(np.where(high > 0, free.weights, 0.0), low, high, limits)
        said += [
            f"the limit of {limit.ability} "
            + ("can't be kept by any mix in reach" if limit.ability in broken else "holds the mix back")
            for limit, multiplier in zip(limits, multipliers, strict=True)
            if multiplier > 0
        ]
        rates = Rates(signal, error, scale)
        held = f"no source stands out by more than {self.gate:g} standard errors"
        why = sentence(names, before, weights, lambda at: worth(rates, z, at), said, held)
        deviations = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        details = {
            "theta": {ability: named(names, row) for ability, row in zip(abilities, theta, strict=True)},
            "theta_errors": {ability: named(names, row) for ability, row in zip(abilities, deviations, strict=True)},
            "multipliers": {limit.ability: each for limit, each in zip(limits, multipliers, strict=True)},
            "foretold": {limit.ability: float(limit.slopes @ weights - limit.room) for limit in limits},
        }
        return self.answer(free._replace(weights=weights), signal, error, why, details)

    def _learn(self, feedback: Feedback) -> tuple[Array, Array]:
        """Take in an interval; give Theta [J, K], nats a thousand tokens, and its covariances [J, K, K]."""
        tokens = vector(self.task.names, feedback.credited) / 1000
        A, errors = self.intervals.table()
        means, covariances = [], []
        for at, ability in enumerate(self.task.abilities):
            error = feedback.errors[ability]
            if np.isfinite(error):  # a target of one row has none, and teaches nothing
                self.ridges[at].add(
                    tokens, feedback.measured[ability], max(error, 1e-9 * feedback.initial[ability]) ** 2
                )
            booked = np.nan_to_num(A[at], nan=0.0)
            doubt = max(_DOUBT * float(np.abs(booked).mean()), 1e-12)
            unsure = np.where(np.isfinite(errors[at]), np.nan_to_num(errors[at], nan=0.0, posinf=0.0), 2 * doubt)
            mean, covariance = self.ridges[at].posterior(-booked, np.hypot(doubt, unsure))
            means.append(mean)
            covariances.append(covariance)
        return np.stack(means), np.stack(covariances)

    def _limits(self, feedback: Feedback, theta: Array) -> list[Limit]:
        drawn = sum(feedback.used.values())
        rest = drawn * (1 - feedback.progress) / feedback.progress / 1000 if feedback.progress > 0 else 0.0
        return [
            Limit(
                ability,
                theta[self.task.abilities.index(ability)] * rest,
                feedback.initial[ability] + slack - feedback.losses[ability],
            )
            for ability, slack in self.protected.items()
        ]

    def _noise(self) -> Array:
        key = np.array([self.task.seed % 2**64, self.decided], dtype=np.uint64)
        return self.jitter * np.random.Generator(np.random.Philox(key=key)).standard_normal(len(self.task.sources))


def within_limits(q: Array, low: Array, high: Array, limits: list[Limit]) -> tuple[Array, list[float], list[str]]:
    """Find the mix nearest to q [K] by KL(p || q) inside low, high and the limits: slopes_c . p <= room_c.

    p = project(q exp(-sum_c multiplier_c slopes_c)), each multiplier the least that keeps its limit, found in turn by
    halving until all are kept. Gives p, the multipliers, and the abilities whose limit no p in the bounds keeps.
    """
    multipliers = [0.0] * len(limits)
    sizes = [float(np.ptp(limit.slopes)) or 1.0 for limit in limits]

    def mix() -> Array:
        push = -sum((m * limit.slopes / size for m, limit, size in zip(multipliers, limits, sizes, strict=True)), 0 * q)
        live = q > 0
        logs = np.where(live, push, -np.inf) + np.log(np.where(live, q, 1.0))
        # shares below e^-600 of the largest are moved by their bounds alone
        return project(np.where(live, np.exp(np.maximum(logs - logs[live].max(), -600.0)), 0.0), low, high)

    def kept(at: int, multiplier: float) -> bool:
        multipliers[at] = multiplier
        return bool(limits[at].slopes @ mix() <= limits[at].room)

    broken: list[str] = []
    for _ in range(20):
        before, broken = list(multipliers), []
        for at, limit in enumerate(limits):
            if kept(at, 0.0):
                continue
            top = 1.0
            while not kept(at, top) and top < _MOST:
                top *= 2
            if not kept(at, top):
                broken.append(limit.ability)
                continue
            bottom = 0.0
            for _ in range(60):
                middle = (bottom + top) / 2
                bottom, top = (bottom, middle) if kept(at, middle) else (middle, top)
            multipliers[at] = top
        if np.allclose(multipliers, before, rtol=1e-9, atol=1e-12):
            break
    return mix(), multipliers, broken
