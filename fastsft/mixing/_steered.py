"""What steered policies share: a start that is also the prior, what the run is made of, what abilities weigh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastsft.mixing.core import Array, Moved, Steps, check_names, check_number, epoch_caps, named, vector
from fastsft.mixing.static import Start, start_mix
from fastsft.tasks import Decision, Feedback, Mix, MixError, MixTask


@dataclass(kw_only=True)
class Steered(Steps):
    """A policy over the shared step.

    start: the mix to begin with and the prior that decisions are anchored to. priorities {ability: weight}: what an
    ability counts, 1 where it is not named.
    """

    start: Start = None
    priorities: Mapping[str, float] | None = None
    task: MixTask = field(init=False, repr=False, compare=False)
    prior: Array = field(init=False, repr=False, compare=False)
    decided: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for ability, weight in (self.priorities or {}).items():
            check_number(f"priorities.{ability}", weight, low=0)

    def begin(self, task: MixTask) -> Mix:
        self.check(task)
        check_names("priorities", self.priorities, task.abilities, "ability with a target")
        given = np.array([(self.priorities or {}).get(ability, 1.0) for ability in task.abilities], dtype=np.float64)
        if given.sum() <= 0:
            raise MixError("`priorities` must leave one ability with a positive weight: all are 0.")
        mix = start_mix(self.start, task)
        self.task, self.prior, self.decided = task, vector(task.names, mix.weights), 0
        self.importance = given / given.sum()
        self.reset()
        return mix

    def reset(self) -> None:
        """Forget what another run told."""

    def caps(self, feedback: Feedback) -> Array:
        """Give the most of each share [K], by epochs."""
        return epoch_caps(self.task, feedback, self.max_epochs)

    def answer(self, moved: Moved, signal: Array, error: Array, why: str, details: Mapping[str, object]) -> Decision:
        """Put a move into words that a record holds; a source of which nothing is known has signal 0, error nan."""
        names = self.task.names
        known = np.isfinite(signal)
        return Decision(
            weights=named(names, moved.weights),
            signal=named(names, np.where(known, signal, 0.0)),
            error=named(names, np.where(known & np.isfinite(error), error, np.nan)),
            why=why,
            details={"z": named(names, moved.z), **details},
        )
