"""A run's steering at work: the controller of its mix and the weights on its gradients, as the books drive them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsft.attribution import Books
from fastsft.attribution.ledger import Entry
from fastsft.attribution.targets import TargetState
from fastsft.record import Record, RecordError, write_text
from fastsft.tasks import MixError
from fastsft.train.controller import Controller
from fastsft.train.logits import LogitsTap
from fastsft.train.reweigh import Reweigher
from fastsft.train.samples import SampleTable
from fastsft.train.steering import Steering, own_abilities, put_stream, stream_of, task_of

# beside the books in a checkpoint
NAME = "fastsft_steering.json"


class Steerer:
    """Put a `Steering` into a trainer, and carry it out while the trainer runs."""

    def __init__(
        self,
        steering: Steering,
        trainer: Any,
        table: SampleTable,
        abilities: Sequence[str],
        data: Mapping[str, Any],
        record: Record,
    ) -> None:
        self.steering = steering
        policy, resolver = steering.policy, steering.resolver
        own = own_abilities(table.source_names, abilities, steering.abilities, data)
        wants_losses = bool(getattr(policy, "needs_train_losses", False))
        lagged = resolver is not None and steering.apply == "lagged"
        self.tap: LogitsTap | None = None
        if wants_losses or lagged:
            self.tap = LogitsTap(trainer.model, len(table.source_names), losses=wants_losses)
        self.controller: Controller | None = None
        if policy is not None:
            stream = stream_of(trainer, table, None, steering.draws)
            task = task_of(stream, table, own, abilities)
            stream.start_with(policy.begin(task))
            put_stream(trainer, stream)
            self.controller = Controller(policy, stream, task, record, self.tap if wants_losses else None)
        self.reweigher: Reweigher | None = None
        if resolver is not None:
            self.reweigher = Reweigher(
                resolver,
                apply=steering.apply,
                abilities=abilities,
                own=[own[name] for name in table.source_names],
                smoothing=steering.smoothing,
                limits=steering.limits,
                record=record,
                tap=self.tap,
            )

    def begin(self, books: Books, record: Record, checkpoint: Path | None) -> None:
        """Follow `books`, anew or from a checkpoint's state."""
        for part in (self.controller, self.reweigher):
            if part is not None:
                part.record = record
        if checkpoint is not None:
            self._load(checkpoint)
        books.on_refresh = self._refreshed
        if self.controller is not None:
            books.journal.also = self.controller.drawn
            self.controller.echo = books.rule.echo()
        if self.reweigher is not None and self.steering.apply == "exact":
            layout = books.layout
            left = layout.num_all - layout.num_exact
            if left:
                raise MixError(
                    f"apply='exact' weighs gradients that are booked by source, and {left} of {layout.num_all} "
                    f"trainable numbers are not (embeddings, norms, layers followed by factors): "
                    f"train LoRA, or use apply='lagged'."
                )
            books.weigh = self.reweigher.weigh

    def _refreshed(self, step: int, first: int, state: TargetState, entries: dict[str, Entry]) -> None:
        if self.reweigher is not None:
            self.reweigher.refreshed(step, state)
        if self.controller is None:
            return
        if not self.controller.initial:
            self.controller.start(state.losses, step)
        if entries:
            self.controller.refreshed(step, first, state, entries)

    def batch(
        self, sources: Sequence[int], lengths: Sequence[Sequence[int]], labels: Tensor | None, *, packed: bool
    ) -> AbstractContextManager[None]:
        """See one micro-batch: source of each document, lengths of each row's documents."""
        if self.tap is None:
            return contextlib.nullcontext()
        if labels is None:
            raise MixError("weighing documents needs `labels` in the batch: use a collator that makes them.")
        return self.tap.batch(sources, lengths, labels, packed=packed)

    @property
    def why_ended(self) -> str:
        """Why the draws ended before the last step that was asked for; empty where they did not."""
        return "" if self.controller is None else self.controller.stream.why_ended

    def close(self) -> None:
        if self.tap is not None:
            self.tap.close()

    # resuming

    def save(self, checkpoint: Path) -> None:
        """Write what a resume needs, whole, into the checkpoint's folder."""
        parts = {"controller": self.controller, "reweigher": self.reweigher}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        write_text(checkpoint / NAME, json.dumps(state))

    def _load(self, checkpoint: Path) -> None:
        path = checkpoint / NAME
        if not path.exists():
            raise RecordError(
                f"{path} is missing: {checkpoint.name} was not steered. Resume the run without steering, or start it "
                f"again."
            )
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{path} can't be read ({error}): delete {checkpoint.name} and resume from an earlier one."
            ) from None
        for name, part in (("controller", self.controller), ("reweigher", self.reweigher)):
            if (part is not None) != (name in state):
                raise MixError(
                    f"{path} holds {', '.join(state) or 'nothing'}, and this run steers "
                    f"{'by' if part is not None else 'without'} a {name}: resume with the steering it began with."
                )
            if part is not None:
                part.load_state_dict(state[name])
