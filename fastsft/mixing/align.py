"""Draw more from the sources of which one more token lowers the abilities' losses most, by the run's own books."""

# K sources, J abilities

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fastsft.mixing._steered import Steered
from fastsft.mixing.core import CLIP, Array, check_number, named, sentence, vector, with_error
from fastsft.mixing.horizon import ahead
from fastsft.mixing.rates import Intervals, Rates
from fastsft.tasks import Decision, Feedback, Mix, MixError

# intervals before the first move: one has no standard error
_FEWEST = 2


@dataclass(kw_only=True)
class Align(Steered):
    """Equalise marginal returns: move the mix towards the sources whose next tokens help most.

    The books' entry of source i for ability j is the optimizer's own displacement by i's tokens, dotted with j's target
    gradients: what i did to j's loss, in nats. So A_ij, minus the entries by the tokens that made them, is what another
    token of i does now. s = A w weighs the abilities; sources above the mix's mean gain shares. If returns diminish and
    add up, the best fixed mix ends with equal returns, and giving to the highest leads there; where abilities conflict,
    equal returns are a stationary point of the weighted loss.

    horizon: the share of the rest of the run over which a return is taken (`horizon.ahead`), 0 for now alone. Without
    one, abilities that are learnt and only kept from being forgotten take the shares of those still to be learnt. What
    pays late, along directions that are learnt slowly, it does not see.

    As DoGE, DGA and FastMix, by alignment of gradients; theirs are those of a batch, in the metric of SGD, and these of
    every sample of the interval, in that of the optimizer.

    objective: "relative", ability j counts priority / initial loss, so that losses on different scales are alike, and
    the goal is a fixed one (the mean of L_j / L_j(0)). A column norm sum_i |A_ij| would make them alike too, but it
    lifts an ability that is learnt, whose column is noise, to the height of one that is not. "nats": priorities alone.
    balance: "fixed", or "rate": w_j <- w_j exp(-eta_balance * r_j), r_j the ability's rate of improvement against the
    mean of all, in the mean's magnitude: slow abilities gain weight (GRAPE, group DRO).
    """

    # small steps: a source's returns answer to its own share, and larger ones go to and fro between two mixes
    eta: float = 0.2
    prior_strength: float = 0.03
    # the same where the start is a mix that was given, by hand or by a plan: it is worth holding to
    held_strength: float = 0.1
    # returns that differ by less than this from the mix's mean are not worth a move: on worlds where nothing can be
    # gained, following them cost 2.8 % of the loss, and .8 % with it (three seeds; docs/log.md)
    slack: float = 0.6
    # what an interval weighs against the next
    decay: float = 0.5
    horizon: float = 0.5
    objective: Literal["relative", "nats"] = "relative"
    balance: Literal["fixed", "rate"] = "fixed"
    eta_balance: float = 0.2
    intervals: Intervals = field(init=False, repr=False, compare=False)
    moving: Array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_number("decay", self.decay, low=0) >= 1:
            raise MixError(f"`decay` must be below 1: got {self.decay}. 0 keeps the last interval only.")
        check_number("eta_balance", self.eta_balance, low=0)
        check_number("horizon", self.horizon, low=0, high=1)
        check_number("held_strength", self.held_strength, low=0, high=1)
        for name, allowed in (("objective", ("relative", "nats")), ("balance", ("fixed", "rate"))):
            if getattr(self, name) not in allowed:
                raise MixError(f"`{name}` must be one of {', '.join(allowed)}: got {getattr(self, name)!r}.")

    @property
    def anchor(self) -> float:
        given = isinstance(self.start, Mix | Mapping)
        return max(self.prior_strength, self.held_strength) if given else self.prior_strength

    def reset(self) -> None:
        self.intervals = Intervals(self.task.names, self.task.abilities, self.decay)
        self.moving = self.importance

    def decide(self, feedback: Feedback) -> Decision:
        names, abilities = self.task.names, self.task.abilities
        self.intervals.add(feedback)
        if self.balance == "rate":
            self.moving = self._rebalanced(feedback)
        importance = importance_of(self.objective, self.moving, abilities, feedback)
        weights, caps = vector(names, feedback.weights), self.caps(feedback)
        rates = self.intervals.rates(importance) if self.horizon == 0 else self._ahead(feedback, importance, weights)
        if len(self.intervals) < _FEWEST:
            rates = Rates(rates.signal, np.full(len(names), np.inf), rates.scale)
        moved = self.move(weights, self.prior, rates.signal, rates.error, caps, rates.scale)
        held = (
            f"{len(self.intervals)} interval of the books has no standard error yet"
            if len(self.intervals) < _FEWEST
            else f"none stands out by more than {self.gate:g} standard errors and {self.slack:g} of the mean return"
        )
        A, errors = self.intervals.table()
        details = {
            "importance": named(abilities, importance),
            "nats_per_thousand": {ability: named(names, row) for ability, row in zip(abilities, A, strict=True)},
            "errors": {ability: named(names, row) for ability, row in zip(abilities, errors, strict=True)},
        }
        said = [*_mean(weights, rates), *moved.said]
        why = sentence(names, weights, moved.weights, lambda at: worth(rates, moved.z, at), said, held)
        return self.answer(moved, rates.signal, rates.error, why, details)

    def _ahead(self, feedback: Feedback, importance: Array, weights: Array) -> Rates:
        """Rates over the rest of the run, as far as the horizon sees; their scale is the mix's mean magnitude."""
        A, errors = self.intervals.table()
        drawn = float(sum(feedback.used.values()))
        rest = drawn * (1 - feedback.progress) / feedback.progress if feedback.progress > 0 else 0.0
        losses = vector(self.task.abilities, feedback.losses)
        tokens = max(self.horizon * rest, 1.0)
        found = ahead(A / 1000, errors / 1000, losses, weights, importance, tokens)
        known = np.isfinite(A).any(0)
        signal = np.where(known, 1000 * found.signal, np.nan)
        share = np.where(known, weights, 0.0)
        scale = float(share @ np.abs(np.where(known, signal, 0.0)) / share.sum()) if share.sum() > 0 else 0.0
        return Rates(signal, 1000 * found.error, scale)

    def _rebalanced(self, feedback: Feedback) -> Array:
        gain = -vector(self.task.abilities, feedback.measured) / vector(self.task.abilities, feedback.initial)
        size = np.abs(gain).mean()
        rate = np.clip((gain - gain.mean()) / size, -CLIP, CLIP) if size > 0 else np.zeros(len(gain))
        live, g = self.importance > 0, self.prior_strength * self.eta_balance
        new = np.zeros(len(gain))
        logs = (1 - g) * np.log(self.moving[live]) + g * np.log(self.importance[live])
        new[live] = np.exp(logs - self.eta_balance * rate[live])
        return new / new.sum()


def importance_of(objective: str, weights: Array, abilities: Sequence[str], feedback: Feedback) -> Array:
    """Give what a nat of each ability's loss counts [J], the sum one: weights [J], for "relative" by initial losses."""
    each = weights if objective == "nats" else weights / vector(abilities, feedback.initial)
    return each / each.sum()


def worth(rates: Rates, z: Array, at: int) -> str:
    """Say what a source's next tokens do, and how sure that is."""
    signal, error = rates.signal[at], rates.error[at]
    if not np.isfinite(signal):
        return "the books know nothing of it yet"
    verb = "lower" if signal >= 0 else "raise"
    said = f"a thousand more of its tokens {verb} the loss by {with_error(abs(signal), error)} nats on average"
    return said if z[at] else f"{said}, which does not stand out"


def _mean(weights: Array, rates: Rates) -> list[str]:
    """Say what the mix as it is does, which sources are compared with."""
    known = np.isfinite(rates.signal)
    if not known.any():
        return []
    mean = weights[known] @ rates.signal[known]
    return [f"a thousand of the mix as it was {'lower' if mean >= 0 else 'raise'} it by {abs(mean):.2g}"]
