"""A guard around any policy: stop drawing from a source that its own ability has overfitted, and keep epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastsft.mixing.core import Array, check_epochs, check_names, check_number, epoch_caps, named, project, vector
from fastsft.tasks import Decision, Feedback, Mix, MixError, MixPolicy, MixTask


@dataclass
class Lowest:
    """An ability's lowest loss so far, its standard error, decisions in a row above it, and entries since then."""

    loss: float
    error: float
    above: int
    since: dict[str, float]


@dataclass
class Guard:
    """Let `policy` decide, and take out of its mix what overfits; like mSFT (arXiv 2603.21606), without going back.

    An ability overfits when its target loss lies more than `standard_errors` of a loss above its lowest for `patience`
    decisions in a row. Of the sources that were gathered for it, those that raised it since, by the books, get no share
    from then on; theirs goes to the others in proportion. The last source that is left is kept. `max_epochs` caps
    sources as `Steps` does, for policies that have no caps; sources that carry no ability are capped only.
    """

    policy: MixPolicy
    patience: int = 2
    standard_errors: float = 1.0
    max_epochs: float | Mapping[str, float] | None = None
    task: MixTask = field(init=False, repr=False, compare=False)
    lowest: dict[str, Lowest] = field(init=False, repr=False, compare=False, default_factory=dict)
    stopped: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, MixPolicy):
            raise MixError(f"`policy` must have `begin` and `decide`: got {type(self.policy).__name__}.")
        if type(self.patience) is not int or self.patience < 1:
            raise MixError(f"`patience` must be a whole number of decisions, at least 1: got {self.patience!r}.")
        check_number("standard_errors", self.standard_errors, low=0)
        check_epochs(self.max_epochs)

    @property
    def name(self) -> str:
        """What a record calls it."""
        return f"{getattr(self.policy, 'name', type(self.policy).__name__.lower())}, guarded"

    @property
    def needs_train_losses(self) -> bool:
        return bool(getattr(self.policy, "needs_train_losses", False))

    def begin(self, task: MixTask) -> Mix:
        check_names("max_epochs", self.max_epochs, task.names, "source")
        self.task, self.lowest, self.stopped = task, {}, {}
        return self.policy.begin(task)

    def decide(self, feedback: Feedback) -> Decision:
        decision = self.policy.decide(feedback)
        names = self.task.names
        wanted = vector(names, Mix(decision.weights).over(names).weights)
        said = self._watch(feedback, wanted)
        caps = epoch_caps(self.task, feedback, self.max_epochs)
        caps[[at for at, name in enumerate(names) if name in self.stopped]] = 0.0
        weights, left = capped(wanted, caps)
        if not left:
            said.append("the caps leave too little for what is still to be drawn, and can't be kept")
        for at, name in enumerate(names):
            if weights[at] < wanted[at] and name not in self.stopped:
                said.append(f"{name} capped at {weights[at]:.2f} by its epochs")
        why = " ".join([decision.why, *([f"Guard: {'; '.join(said)}."] if said else [])])
        details = {**decision.details, "guard": {"stopped": dict(self.stopped), "wanted": named(names, wanted)}}
        return Decision(
            weights=named(names, weights), signal=decision.signal, error=decision.error, why=why, details=details
        )

    def _watch(self, feedback: Feedback, wanted: Array) -> list[str]:
        """Follow each ability's lowest loss, and stop the sources that raise it."""
        for ability in self.task.abilities:
            self._follow(ability, feedback)
        said = []
        for ability, low in self.lowest.items():
            if low.above < self.patience:
                continue
            for source in self.task.sources:
                raised = low.since[source.name]
                others = [
                    share
                    for name, share in zip(self.task.names, wanted, strict=True)
                    if name != source.name and name not in self.stopped
                ]
                if source.ability != ability or source.name in self.stopped or raised <= 0 or not sum(others) > 0:
                    continue
                self.stopped[source.name] = ability
                over = feedback.losses[ability] - low.loss
                said.append(
                    f"{source.name} is drawn no more: {ability} has lain {over:.2g} nats above its lowest loss for "
                    f"{low.above} decisions, and {source.name} raised it by {raised:.2g}"
                )
        return said

    def _follow(self, ability: str, feedback: Feedback) -> None:
        loss, error = feedback.losses[ability], feedback.errors[ability]
        low = self.lowest.get(ability)
        if low is None or loss <= low.loss:
            self.lowest[ability] = Lowest(loss, error, 0, dict.fromkeys(self.task.names, 0.0))
            return
        for name in self.task.names:
            low.since[name] += feedback.entries[ability][name]
        # an error that is nan, of a target with one row, is never passed
        bound = self.standard_errors * float(np.maximum(error, low.error))
        low.above = low.above + 1 if loss > low.loss + bound else 0


def capped(wanted: Array, caps: Array) -> tuple[Array, bool]:
    """Scale what caps [K] leave free, in proportion, until the mix sums to one; False where they leave too little."""
    high = np.where(wanted > 0, np.minimum(caps, 1.0), 0.0)
    room = math.fsum(high)
    if room < 1 - 1e-12:
        return (high / room, False) if room > 0 else (wanted, False)
    return project(np.where(high > 0, wanted, 0.0), np.zeros(len(wanted)), high), True
