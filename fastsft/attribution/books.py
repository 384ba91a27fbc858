"""Keep the books of a run: see every batch, book every step, balance at every refresh.

`fastsft.attach` does this inside a trainer. A loop of your own does it in three lines (see `Books`).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsft import ops
from fastsft.attribution.in_run import Batch, Columns, SampleBook
from fastsft.attribution.journal import Journal
from fastsft.attribution.layout import Layout
from fastsft.attribution.ledger import Entry, Ledger
from fastsft.attribution.optimizer import rule_of
from fastsft.attribution.ranks import rank
from fastsft.attribution.settings import Attribution
from fastsft.attribution.step_store import StepSketches, StepStore, training_settings
from fastsft.attribution.targets import Targets, TargetState
from fastsft.capturing import Capture, Documents
from fastsft.record import SCHEMA, Record, versions

STATE_SCHEMA = 1


class Books:
    """The books of one run.

    ```python
    books = Books(model, optimizer, targets, sources=["gsm8k", "wikisql"], record=Record.create("runs/a"))
    for batch in loader:
        with books.batch(rows=batch["input_ids"].shape, samples=ids, sources=names):
            model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        books.after_step()
    books.finish()
    ```
    Training itself is the same bits with and without it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        targets: Targets,
        *,
        sources: Sequence[str],
        record: Record,
        settings: Attribution | None = None,
        total_steps: int | None = None,
        step: int = 0,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Follow `model` under `optimizer`.

        sources: the names that batches will use. record: an empty run directory. total_steps, where known: how long
        the last steps' momentum still acts. step: the optimizer steps taken before. details: what the report should
        say of the run beside what can be seen here (`seed`, `model`, `data` {source: {...}}, `settings` {...}).
        """
        self.model, self.optimizer, self.targets, self.record = model, optimizer, targets, record
        self.settings = settings or Attribution()
        self.sources, self.total_steps = list(sources), total_steps
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise ValueError(f"`sources` must be distinct names, at least one: got {self.sources}.")
        self.details = dict(details or {})
        self._started = self._noted = self._pending = False
        self._source_index = {name: index for index, name in enumerate(self.sources)}
        self.step = step
        self.capture = Capture(model, sink=self._see)
        self.rule = rule_of(optimizer)
        layers = self.capture.layers
        self.layout = Layout(model, optimizer, layers, narrow=self.settings.narrow, exact=self.settings.exact)
        self.ledger = Ledger(self.layout, self.rule, self.sources)
        self.samples = SampleBook(self.layout, layers, self.rule, self.settings, len(targets.abilities))
        self.state: TargetState | None = None
        self.refresh_every = self.settings.refresh_every
        self._probes = self._choose_probes()
        self._probe_sums: dict[int, Tensor] = {}
        self._sources_now: Tensor = torch.zeros(0, dtype=torch.int64)
        self.journal = Journal(record, self.sources, targets.abilities, self.layout.device)
        self._last_refresh = step
        self._resumed = False
        self.store: StepStore | None = None  # opened by the first refresh
        self._early: tuple[Tensor, ...] | None = None  # booked to samples after the last interval was closed
        self.own_seconds = self.refresh_seconds = 0.0
        self._began = time.perf_counter()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_optimizer),
            optimizer.register_step_post_hook(self._after_optimizer),
        ]
        # who steers the run by its books: told of every refresh (step, first step of the interval, the targets, the
        # entries; none where no interval closed), and of a step's Gram matrix [S, S] of its sources' gradients in the
        # optimizer's metric, for a factor each [S]
        self.on_refresh: Callable[[int, int, TargetState, dict[str, Entry]], None] | None = None
        self.weigh: Callable[[Tensor], Tensor] | None = None

    def start(self) -> None:
        """Write down what this run is; the first batch does so if nobody has."""
        if self._started:
            return
        self._started = True
        parameters = list(self.model.parameters())
        group = self.optimizer.param_groups[0]
        plain = {key: value for key, value in group.items() if isinstance(value, int | float | str | bool | tuple)}
        start = {
            "event": "start",
            "step": self.step,
            "schema": SCHEMA,
            "abilities": self.targets.abilities,
            "sources": self.sources,
            "settings": {**dataclasses.asdict(self.settings), **self.details.get("settings", {})},
            "versions": versions(),
            "seed": self.details.get("seed"),
            "optimizer": {"name": type(self.optimizer).__name__, **plain},
            "method": self._method,
            "model": {
                "name": self._model_name,
                "parameters": sum(p.numel() for p in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            },
            "data": self.details.get("data", {}),
            "targets": {
                ability: {"rows": len(rows), "tokens": sum(self.targets.tokens[ability])}
                for ability, rows in self.targets.rows.items()
            },
        }
        self.journal.write([start])

    @property
    def _method(self) -> str:
        if hasattr(self.model, "gated_adapters"):
            return "gated adapters"
        return "lora" if hasattr(self.model, "peft_config") else "full"

    @property
    def _model_name(self) -> str:
        name = getattr(getattr(self.model, "config", None), "name_or_path", "") or type(self.model).__name__
        return str(self.details.get("model", name))

    # seeing

    @contextmanager
    def batch(
        self,
        *,
        samples: Sequence[str],
        sources: Sequence[str],
        rows: tuple[int, int] | None = None,
        lengths: Sequence[Sequence[int]] | None = None,
        row_length: int | None = None,
    ) -> Iterator[None]:
        """See the forward and backward pass of one micro-batch: `rows` = (B, T), one document a row, or `lengths` of
        the documents packed in each row of `row_length` tokens; `samples` and `sources` name them in order."""
        if rows is not None:
            documents, sizes = Documents.rows(*rows), [rows[1]] * rows[0]
            if lengths is not None:
                sizes = [size for row in lengths for size in row]
        elif lengths is not None and row_length is not None:
            documents, sizes = Documents.packed(lengths, row_length), [size for row in lengths for size in row]
        else:
            raise ValueError("give `rows=(B, T)`, or `lengths=[[...], ...]` with `row_length`.")
        unknown = [name for name in sources if name not in self._source_index]
        if unknown:
            raise ValueError(f"source {unknown[0]!r} is not among the run's sources {self.sources}.")
        where = torch.tensor([self._source_index[name] for name in sources], dtype=torch.int64)
        documents = documents.to(self.layout.device)
        batch = Batch(documents, list(samples), where, sizes)
        self._sources_now = where.to(self.layout.device)
        self.journal.draw(where, sizes)
        self._pending = True
        if self.state is None:
            self.refresh()
        if self.settings.samples:
            self.samples.batch(batch)
        with self.capture.batch(documents):
            yield

    def add_loss(self, loss: Tensor) -> None:
        """Tell the training loss of this micro-batch, as it adds up over the step."""
        self.journal.add_loss(loss)

    def _see(self, index: int, x: Tensor, dy: Tensor, documents: Documents) -> None:
        began = time.perf_counter()
        x, dy = x.detach(), dy.detach()
        slot = self.layout.exact_of[index]
        if slot is not None:
            sums = self.ledger.parts[slot][: len(self.sources)].view(-1, *self.capture.layers[index].shape)
            if self.settings.samples:
                self.samples.see_exact(index, x, dy, self._sources_now, sums)
            else:
                ops.influence_dot(x, dy, documents.offsets, groups=self._sources_now, sums=sums)
        else:
            if index in self._probes:
                total = dy.to(self.layout.dtype).T @ x.to(self.layout.dtype)
                self._probe_sums[index] = self._probe_sums[index] + total if index in self._probe_sums else total
            if self.settings.samples:
                self.samples.see_wide(index, x, dy)
        self.own_seconds += time.perf_counter() - began

    @property
    def _remaining(self) -> int | None:
        return None if self.total_steps is None else max(self.total_steps - self.step, 0)

    # the optimizer's step

    def _choose_probes(self) -> list[int]:
        """Layers on which the captured gradient is compared with the trainer's: the last two booked ones, or the
        smallest where none is booked exactly."""
        exact = [index for index, booked in enumerate(self.layout.is_exact) if booked]
        layers = self.capture.layers
        return exact[-2:] or [min(range(len(layers)), key=lambda index: layers[index].weight.numel())]

    def _probe(self) -> tuple[Tensor, Tensor]:
        """What the trainer multiplied the captured gradient by, and the share of its gradient that this misses.

        The least-squares factor takes in loss scaling, averaging over ranks and clipping, whoever does them.
        """
        seen, used = [], []
        for index in self._probes:
            slot = self.layout.layer_slots[index]
            if slot.parameter.grad is None:
                continue
            exact = self.layout.exact_of[index]
            if exact is not None:
                total = self.ledger.parts[exact].sum(0)
            else:
                total = self._probe_sums.pop(index, torch.zeros_like(slot.parameter)).view(-1)
            seen.append(total)
            used.append(slot.parameter.grad.reshape(-1).to(self.layout.dtype))
        if not seen:
            return self.layout.zeros(1)[0] + 1, self.layout.zeros(1)[0]
        captured, gradient = torch.cat(seen), torch.cat(used)
        if dist.is_initialized():
            dist.all_reduce(captured)
        tiny = torch.finfo(captured.dtype).tiny
        scale = (captured @ gradient) / (captured @ captured).clamp_min(tiny)
        error = (gradient - scale * captured).norm() / gradient.norm().clamp_min(tiny)
        return scale, error

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Weigh the sources' gradients in the step that is about to be taken, and in what is booked of it."""
        if self.weigh is None:
            return
        with torch.no_grad():
            scale, _ = self._probe()
            S = len(self.sources)
            parts = [part[:S] * scale for part in self.ledger.parts]
            if dist.is_initialized():
                for part in parts:
                    dist.all_reduce(part)
            gram = self.layout.zeros(S, S)
            for slot, part in zip(self.layout.exact_slots, parts, strict=True):
                metric = self.rule.scale(slot.parameter, slot.group)
                gram += (part if metric is None else part * metric.reshape(-1)) @ part.T
            factors = self.weigh(gram).to(gram)
            for slot, part in zip(self.layout.exact_slots, parts, strict=True):
                if slot.parameter.grad is not None:
                    change = (factors - 1.0) @ part
                    slot.parameter.grad += change.view_as(slot.parameter).to(slot.parameter.grad.dtype)
            self.ledger.weigh_step(factors)
            self.samples.weigh_step(factors)

    def metric(self) -> Tensor | None:
        """The optimizer's elementwise scale over all trainable weights [N]; None before its first step, and of SGD."""
        scales = [self.rule.scale(slot.parameter, slot.group) for slot in self.layout.slots]
        if all(scale is None for scale in scales):
            return None
        return torch.cat(
            [
                torch.ones_like(slot.parameter, dtype=self.layout.dtype).reshape(-1)
                if scale is None
                else scale.reshape(-1)
                for slot, scale in zip(self.layout.slots, scales, strict=True)
            ]
        )

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        began = time.perf_counter()
        self._pending = False
        self.step += 1
        self.rule.stepped()
        with torch.no_grad():
            scale, error = self._probe()
            self.ledger.book_step(scale)
            if self.settings.samples:
                self.samples.book_step(self.step, scale, self._remaining)
                self._note_crowding()
        self.journal.add_step(self.step, float(self.optimizer.param_groups[0]["lr"]), scale, error)
        self.own_seconds += time.perf_counter() - began

    def _note_crowding(self) -> None:
        """Say once that samples of the first steps are known less well than they could be."""
        if self.samples.crowded and not self._noted:
            self._noted = True
            limit = self.settings.keep_bytes / 2**30
            text = (
                f"Kept gradients passed keep_bytes ({limit:.2g} GiB) in step {self.step}: influence in the "
                f"first {self.settings.warm_steps} steps is sketched from there on, with more noise on samples."
            )
            self.journal.write([{"event": "note", "step": self.step, "text": text}])

    def drop_step(self) -> None:
        """Forget what was seen since the last step, if anything: the trainer skipped it."""
        if not self._pending:
            return
        self._pending = False
        self.ledger.forget_step()
        self.samples.drop_step()
        self._probe_sums = {}
        self.journal.forget()

    # refreshing

    def after_step(self) -> None:
        """Refresh if it is due; call it when the step is done and the gradients are cleared."""
        # early steps are long and curved, and second moments young: intervals grow from one step
        if self.step - self._last_refresh >= min(self.refresh_every, self._last_refresh // 2 + 1):
            self.refresh()

    def refresh(self, *, settle: bool = False) -> dict[str, Entry]:
        """Measure the targets at the present weights, close the interval that ends here and start the next.

        `settle` books at once what is still to come of every sample, so that nothing is left open.
        """
        if self.state is not None and self.step == self._last_refresh:
            if settle and self.samples.has_open:  # measured here already: only the samples' echo is left to book
                columns, *booked = self._close_samples(self.state, settle)
                self.journal.write_influence(columns)
                self._early = tuple(booked)
            return {}
        began = time.perf_counter()
        state = self.targets.measure(self.model, self.layout.parameters, self.layout.dtype, self.metric())
        entries: dict[str, Entry] = {}
        events = self.journal.flush()
        self.start()
        self._store_sketches()
        if self.state is not None:
            columns, total, wide = self._close_samples(state, settle)
            if self._early is not None:
                total, wide, self._early = total + self._early[0], wide + self._early[1], None
            entries, gap = self.ledger.balance(state, wide, total)
            self.journal.write_influence(columns)
            events.append(
                {
                    "event": "interval",
                    "step": self.step,
                    "from": self._last_refresh,
                    "to": self.step,
                    "displacement_error": gap,
                    "abilities": {ability: entry.as_dict() for ability, entry in entries.items()},
                }
            )
            self._adapt(entries)
        elif not self._resumed:
            self.ledger.carry()
        seconds = time.perf_counter() - began
        self.refresh_seconds += seconds
        if not self._resumed:  # a resumed run measures again where it stopped, and has that event already
            events.append(
                {
                    "event": "refresh",
                    "step": self.step,
                    "losses": state.losses,
                    "errors": {ability: state.error(ability) for ability in state.losses},
                    "gram": state.gram.tolist(),
                    "norms": state.same_batch_gram.diagonal().tolist(),
                    "seconds": seconds,
                }
            )
        self.journal.write(events)
        first, resumed = self._last_refresh, self._resumed
        self._resumed = False
        self.state, self._last_refresh = state, self.step
        self.ledger.begin(state)
        if self.settings.samples:
            self.samples.begin(state.gradient)
        if self.on_refresh is not None and not resumed:
            self.on_refresh(self.step, first, state, entries)
        return entries

    def _store_sketches(self) -> None:
        """Hand the sketches of the steps since the last refresh to the store."""
        if not self.settings.store:
            return
        if self.store is None:
            self.store = self._open_store()
        self.store.append(
            [
                StepSketches(
                    step, sketches, batch.samples, [self.sources[n] for n in batch.sources.tolist()], batch.lengths
                )
                for step, batch, sketches in self.samples.take_sketches()
            ]
        )

    def _open_store(self) -> StepStore:
        layers = self.capture.layers
        exact = [layer.name for layer, booked in zip(layers, self.layout.is_exact, strict=True) if booked]
        if not exact:
            raise ValueError(
                "`store` keeps sketches of exactly followed layers, and `narrow` and `exact` leave none: let them take "
                "in more, or leave `store` out."
            )
        settings = training_settings(
            size=self.settings.sketch_size,
            seed=self.settings.seed,
            format=self.settings.store_format,
            adam=isinstance(self.optimizer, torch.optim.Adam),
            sources=self.sources,
            name=self._model_name,
            about={
                "run": os.path.join("..", ".."),
                "optimizer": type(self.optimizer).__name__,
                "layers": exact,
                "layers_followed": len(layers),
            },
        )
        folder = self.record.out / "store" / "training"
        store = StepStore(folder, settings, resume_at=self.step if self._resumed else None)
        if store.is_late:
            text = f"the store of sketches begins after step {self.step}: the run kept none before."
            self.journal.write([{"event": "note", "step": self.step, "text": text}])
        return store

    def _close_samples(self, state: TargetState, settle: bool) -> tuple[list[Columns], Tensor, Tensor]:
        if not self.settings.samples:
            nothing = torch.zeros(len(self.sources), len(self.targets.abilities), dtype=torch.float64)
            return [], nothing, nothing
        columns, total, wide = self.samples.close(state.gradient, len(self.sources), self._remaining, settle=settle)
        if dist.is_initialized():
            for sums in (total, wide):
                moved = sums.to(self.layout.device)
                dist.all_reduce(moved)
                sums.copy_(moved)
        return columns, total, wide

    def _adapt(self, entries: dict[str, Entry]) -> None:
        """Halve the interval when the residual's share is above the bound, double it when far below.

        The trapezoid's error grows with the square of the interval for each step covered.
        """
        bound = self.settings.residual_bound
        if bound is None:
            return
        share = max(abs(entry.residual) / max(entry.gross, 1e-12) for entry in entries.values())
        if share > bound:
            self.refresh_every = max(1, self.refresh_every // 2)
        elif share < bound / 4:
            self.refresh_every = min(4 * self.settings.refresh_every, 2 * self.refresh_every)

    def finish(self) -> None:
        """Close the last interval and the record."""
        self.refresh(settle=True)
        seconds = time.perf_counter() - self._began
        end = {
            "event": "end",
            "step": self.step,
            "seconds": seconds,
            "step_seconds": seconds - self.refresh_seconds,
            "own_seconds": self.own_seconds if self.layout.device.type == "cpu" else None,
            "refresh_seconds": self.refresh_seconds,
        }
        self.journal.write([end])
        self.close()

    def close(self) -> None:
        """Take all hooks off the model and the optimizer, and finish the store."""
        self.capture.close()
        for handle in self._handles:
            handle.remove()
        self.on_refresh = self.weigh = None
        self._handles = []
        if self.store is not None:
            self.store.close()

    # resuming

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the trainer's own checkpoint. The interval is closed first."""
        self.refresh(settle=True)
        if self.store is not None:
            self.store.save()
        moment = self.ledger.moment.clone()
        if dist.is_initialized():
            # this run goes on as a resumed one begins, with all of it on the first rank: sums then round alike
            dist.all_reduce(moment)
            self.ledger.moment.copy_(moment if rank() == 0 else torch.zeros_like(moment))
        return {
            "schema": STATE_SCHEMA,
            "step": self.step,
            "sources": self.sources,
            "abilities": self.targets.abilities,
            "refresh_every": self.refresh_every,
            "moment": moment.cpu(),
            "early": [sums.tolist() for sums in self._early or ()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on a model and optimizer loaded from the same checkpoint."""
        for key, mine in (("schema", STATE_SCHEMA), ("sources", self.sources), ("abilities", self.targets.abilities)):
            if state[key] != mine:
                raise ValueError(
                    f"the checkpoint's books have {key} {state[key]}, this run has {mine}: resume with the same "
                    f"sources and targets, or start a new run."
                )
        if tuple(state["moment"].shape) != tuple(self.ledger.moment.shape):
            raise ValueError(
                f"the checkpoint's books cover {tuple(state['moment'].shape)} (rows, parameters), this model has "
                f"{tuple(self.ledger.moment.shape)}: are the adapters the same?"
            )
        self.step = self._last_refresh = int(state["step"])
        self.refresh_every = int(state["refresh_every"])
        self._early = tuple(torch.tensor(sums, dtype=torch.float64) for sums in state["early"]) or None
        self._resumed = self._started = True
        if rank() == 0:
            self.ledger.moment.copy_(state["moment"])
