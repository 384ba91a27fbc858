"""Mixes that follow no feedback: a fixed one, a schedule by progress, and two stages. Baselines, and recipes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastsft.tasks import Decision, Feedback, Mix, MixError, MixTask

Start = Mix | Literal["uniform", "proportional"] | Mapping[str, float] | None


def start_mix(start: Start | str, task: MixTask, temperature: float = 1.0) -> Mix:
    """Give the mix that `start` says for a run's sources; None is uniform. Proportional is by supervised tokens."""
    if start is None or start == "uniform":
        return Mix.uniform(task.names)
    if start == "proportional":
        return Mix.proportional({source.name: source.tokens for source in task.sources}, temperature)
    if isinstance(start, Mix):
        return start.over(task.names)
    if isinstance(start, Mapping):
        return Mix(start).over(task.names)
    raise MixError(f"`start` must be 'uniform', 'proportional' or {{source: share}}: got {start!r}.")


@dataclass(kw_only=True)
class Static:
    """Draw by one mix from start to end.

    start: "uniform", "proportional" (tokens^(1 / temperature)), or shares; None is uniform.
    """

    start: Start = None
    temperature: float = 1.0
    _mix: Mix = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise MixError(f"`temperature` must be positive: got {self.temperature}. 1 is by size, large is uniform.")
        if self.temperature != 1 and self.start != "proportional":
            raise MixError(f"`temperature` tempers a proportional start, and `start` is {self.start!r}: leave one out.")

    def begin(self, task: MixTask) -> Mix:
        self._mix = start_mix(self.start, task, self.temperature)
        return self._mix

    def decide(self, feedback: Feedback) -> Decision:
        return Decision(weights=self._mix.weights, signal={}, error={}, why="static.")


@dataclass
class Schedule:
    """Draw by one mix after another: `stages` [(progress from which it holds, {source: share})], the first from 0."""

    stages: Sequence[tuple[float, Mapping[str, float] | Mix]]
    _mixes: list[Mix] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        pairs = isinstance(self.stages, Sequence) and all(
            isinstance(stage, Sequence) and len(stage) == 2 and isinstance(stage[1], Mapping | Mix)
            for stage in self.stages
        )
        if not pairs or not self.stages:
            raise MixError(
                f"`stages` must list pairs of a progress and a mix, [[0, {{a: 0.5, b: 0.5}}], ...]: got "
                f"{self.stages!r}."
            )
        starts = [stage[0] for stage in self.stages]
        in_order = all(a < b for a, b in itertools.pairwise(starts))
        if starts[0] != 0 or not in_order or not all(0 <= start < 1 for start in starts):
            raise MixError(
                f"`stages` must begin at progress 0 and rise, all below 1: they begin at {', '.join(map(str, starts))}."
            )

    def begin(self, task: MixTask) -> Mix:
        self._mixes = [start_mix(stage[1], task) for stage in self.stages]
        return self._mixes[0]

    def decide(self, feedback: Feedback) -> Decision:
        at = sum(start <= feedback.progress for start, _ in self.stages) - 1
        weights = self._mixes[at].weights
        why = f"stage {at + 1} of {len(self.stages)}, from progress {self.stages[at][0]:g} on."
        return Decision(weights=weights, signal={}, error={}, why=why, details={"stage": at})


@dataclass(kw_only=True)
class TwoStage:
    """Train specialised abilities first, then general ones with a share of the first replayed.

    Dual-stage mixed fine-tuning (Dong et al. 2023, arXiv 2310.05492): one epoch of the sources `first`, by size; then
    one epoch of the others with `replay` (the paper's k) of the first. The stages change where the first epoch ends,
    as a share of both; the first decision after that takes it up.
    """

    first: Sequence[str]
    replay: float = 1 / 256
    _schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.first, str) or not isinstance(self.first, Sequence) or not self.first:
            raise MixError(f"`first` must list the sources of the first stage: got {self.first!r}.")
        if not 0 <= self.replay <= 1:
            raise MixError(f"`replay` must be a share of the first stage's data, 0 to 1: got {self.replay}.")

    def begin(self, task: MixTask) -> Mix:
        unknown = [name for name in self.first if name not in task.names]
        if unknown or len(set(self.first)) == len(task.sources):
            wrong = f"names {unknown[0]!r}, which is none" if unknown else "holds all"
            raise MixError(
                f"`first` {wrong} of the run's sources {', '.join(task.names)}: list those of the first stage, and "
                f"leave some for the second."
            )
        early = {source.name: float(source.tokens) for source in task.sources if source.name in self.first}
        late = {source.name: float(source.tokens) for source in task.sources if source.name not in self.first}
        total = math.fsum(early.values())
        second = {name: self.replay * tokens for name, tokens in early.items()} | late
        stages = [
            {name: early.get(name, 0.0) / total for name in task.names},
            {name: second[name] / math.fsum(second.values()) for name in task.names},
        ]
        change = total / (total + math.fsum(second.values()))
        self._schedule = Schedule([(0.0, stages[0]), (change, stages[1])])
        return self._schedule.begin(task)

    def decide(self, feedback: Feedback) -> Decision:
        return self._schedule.decide(feedback)
