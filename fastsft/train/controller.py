"""Between the books and the draws: tell a policy what each interval did, and draw by what it answers.

Every rank asks its own copy of the policy, with the first rank's numbers, and compares what it decided. A resumed run
tells its policy everything again, and checks that it decides as it did.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist

from fastsft.attribution.ledger import Entry
from fastsft.attribution.optimizer import Echo
from fastsft.attribution.ranks import rank
from fastsft.attribution.targets import TargetState
from fastsft.record import Record
from fastsft.tasks import Decision, Feedback, Mix, MixError, MixPolicy, MixTask
from fastsft.train.logits import LogitsTap
from fastsft.train.sampler import MixStream, Stamped

# what is left of a gradient in the momentum that counts as nothing
_SILENT = 1e-9


class Controller:
    """Let `policy` decide the mix of `stream` at every refresh of the books, each decision an event of the record."""

    def __init__(
        self, policy: MixPolicy, stream: MixStream, task: MixTask, record: Record, tap: LogitsTap | None = None
    ) -> None:
        self.policy, self.stream, self.task, self.record, self.tap = policy, stream, task, record, tap
        self.name = str(getattr(policy, "name", type(policy).__name__.lower()))
        # how a step's gradient lives on in the optimizer's momentum; None: it does not
        self.echo: Echo | None = None
        self.initial: dict[str, float] = {}
        self._told: list[dict[str, Any]] = []
        self._decided: list[dict[str, float]] = []

    def drawn(self, step: int) -> dict[str, Any]:
        """Say how many supervised tokens of each source a step had."""
        now, before = self.stream.spent(step), self.stream.spent(step - 1)
        return {"supervised": {name: now[name][1] - before[name][1] for name in now}}

    def start(self, losses: Mapping[str, float], step: int) -> None:
        """Take the losses before the first step, and write down the mix that the run begins with."""
        self.initial = dict(losses)
        first = self.stream.log[0]
        self._write(step, first, None, Decision(weights=self._named(first), signal={}, error={}, why="the start."))

    def refreshed(self, step: int, first: int, state: TargetState, entries: Mapping[str, Entry]) -> None:
        """Take what the interval from step `first` to `step` did, ask the policy and draw by its answer."""
        told = self._same_on_all_ranks(self._tell(step, first, state, entries))
        decision = self._ask(told)
        self._told.append(told)
        before = self.stream.mix.weights
        self._decided.append(dict(decision.weights))
        entry = self.stream.set_mix(Mix(decision.weights))
        self._compare(step)
        if entry.draw < len(self.stream):  # the last steps are drawn already
            self._write(step, entry, before, decision)

    def _tell(self, step: int, first: int, state: TargetState, entries: Mapping[str, Entry]) -> dict[str, Any]:
        now, before = self.stream.spent(step), self.stream.spent(first)
        used = {name: spent[1] for name, spent in now.items()}
        limit = self.stream.draws.max_tokens
        progress = step / self.task.steps
        losses: dict[str, float] = {}
        if self.tap is not None:
            found = self.tap.take_losses(state.gradient.device)
            losses = dict(zip(self.stream.names, found, strict=True))
        return dataclasses.asdict(
            Feedback(
                step=step,
                first=first,
                progress=min(1.0, progress if limit is None else max(progress, sum(used.values()) / limit)),
                initial=self.initial,
                losses=state.losses,
                errors={ability: state.error(ability) for ability in state.losses},
                measured={ability: entry.measured for ability, entry in entries.items()},
                entries={ability: entry.by_source for ability, entry in entries.items()},
                tokens={name: used[name] - before[name][1] for name in used},
                credited=self._credited(first, step),
                used=used,
                weights=dict(self.stream.mix.weights),
                train_losses=losses,
            )
        )

    def _credited(self, first: int, last: int) -> dict[str, float]:
        """Supervised tokens by source whose gradients the steps after `first` up to `last` turned into displacement."""
        echo = self.echo or Echo(first=1.0, decay=0.0, extra=0.0)
        whole = echo.first / (1.0 - echo.decay) + echo.extra
        heard = math.ceil(math.log(_SILENT) / math.log(echo.decay)) if echo.decay else 0
        begin = max(0, first - heard)
        counts = [[row[1] for row in self.stream.spent(step).values()] for step in range(begin, last + 1)]
        moment, found = np.zeros(len(self.stream.names)), np.zeros(len(self.stream.names))
        for step, drawn in enumerate(np.diff(counts, axis=0).astype(np.float64), start=begin + 1):
            moment = echo.decay * moment + echo.first * drawn
            if step > first:
                found += (moment + echo.extra * drawn) / whole
        return dict(zip(self.stream.names, found.tolist(), strict=True))

    def _ask(self, told: Mapping[str, Any]) -> Decision:
        decision = self.policy.decide(Feedback(**told))
        try:
            weights = Mix(decision.weights).over(self.stream.names).weights
        except MixError as error:
            raise MixError(f"the policy {self.name!r} decided at step {told['step']}: {error}") from None
        return dataclasses.replace(decision, weights=weights)

    def _same_on_all_ranks(self, told: dict[str, Any]) -> dict[str, Any]:
        """The first rank's numbers: a sum that rounds otherwise elsewhere must not lead to another mix there."""
        if not dist.is_initialized():
            return told
        box = [told]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _compare(self, step: int) -> None:
        if not dist.is_initialized():
            return
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, self.stream.digest())
        if len(set(digests)) > 1:
            raise MixError(
                f"ranks disagree on the mix after step {step} ({', '.join(digests)}): the policy {self.name!r} must "
                f"decide from its feedback and `task.seed` alone, and all ranks must have the same data."
            )

    def _named(self, entry: Stamped) -> dict[str, float]:
        return dict(zip(self.stream.names, entry.weights, strict=True))

    def _write(self, step: int, entry: Stamped, before: Mapping[str, float] | None, decision: Decision) -> None:
        if rank() > 0:
            return
        self.record.append(
            "mix",
            step,
            version=entry.version,
            draw=entry.draw,
            from_step=entry.draw // self.stream.batch + 1,
            policy=self.name,
            weights=self._named(entry),
            before=before,
            signal=dict(decision.signal),
            error=dict(decision.error),
            why=decision.why,
            details=dict(decision.details),
            unit=self.stream.draws.unit,
        )

    # resuming

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.name,
            "stream": self.stream.state_dict(),
            "initial": self.initial,
            "told": self._told,
            "decided": self._decided,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Tell the policy everything again; refused where it decides otherwise than it did."""
        if state["policy"] != self.name:
            raise MixError(f"the checkpoint's mix was steered by {state['policy']!r}, this run has {self.name!r}.")
        self.stream.load_state_dict(state["stream"])
        self.initial = dict(state["initial"])
        for told, decided in zip(state["told"], state["decided"], strict=True):
            again = dict(self._ask(told).weights)
            if again != decided:
                worst = max(decided, key=lambda name: abs(again[name] - decided[name]))
                raise MixError(
                    f"the policy {self.name!r} decides otherwise than before the run was stopped: at step "
                    f"{told['step']} it gave {worst} {decided[worst]:.6g}, now {again[worst]:.6g}. Resume with the "
                    f"policy's settings and the fastsft that the run began with; a policy of one's own must be a "
                    f"function of what it is told."
                )
        self._told, self._decided = list(state["told"]), list(state["decided"])
