"""A trainer's run under attribution, as the callback and the wrapped training step drive it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch.distributed as dist
from torch import Tensor

from fastsft.attribution import Attribution, Books, Targets
from fastsft.attribution.ranks import rank
from fastsft.record import Record, write_table
from fastsft.train.checkpoint import load_books, save_books
from fastsft.train.samples import SampleTable, decoder
from fastsft.train.steerer import Steerer
from fastsft.train.tags import DOCUMENTS, read_tags

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState, TrainingArguments


class AttachError(ValueError):
    """A trainer that can't be followed, with the way out."""


class Run:
    """A trainer's run under attribution. `record` is its run directory; `report()` writes the page."""

    def __init__(
        self,
        trainer: Trainer,
        targets: Targets,
        table: SampleTable,
        out: Path,
        settings: Attribution,
        details: Mapping[str, Any],
        steerer: Steerer | None = None,
    ) -> None:
        self.trainer: Any = trainer
        self.steerer = steerer
        self.targets, self.table, self.settings = targets, table, settings
        self.details = dict(details)
        self.record = Record(out)
        self.books: Books | None = None
        self.resumed_from: Path | None = None  # the checkpoint that the trainer loaded
        self._drawn: set[int] = set()

    def report(self) -> Path:
        """Write report.html and report.json into the run directory; return the page's path."""
        from fastsft.report import write_report

        return write_report(self.record.out)

    # what the callback and the wrapped training step call

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Open the record and the books when the optimizer exists."""
        step = int(state.global_step)
        main = rank() == 0
        checkpoint = self.resumed_from or Path(str(args.output_dir)) / f"checkpoint-{step}"
        loaded = load_books(checkpoint) if step else None
        if main:
            self._open_record(step, resumed=loaded is not None, checkpoint=checkpoint)
        if dist.is_initialized():
            dist.barrier()
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        self.books = Books(
            self.trainer.model,
            optimizer,
            self.targets,
            sources=self.table.source_names,
            record=self.record,
            settings=self.settings,
            total_steps=int(state.max_steps),
            step=step,
            details=self._details(),
        )
        if loaded is not None:
            self.books.load_state_dict(loaded)
            self._remember_drawn()
        elif step and self.steerer is not None:
            raise AttachError(
                f"{checkpoint} holds no books, so nobody knows what its mix was: steer a run from its first step."
            )
        if self.steerer is not None:
            self.steerer.begin(self.books, self.record, checkpoint if loaded is not None else None)
        if main and loaded is None:
            self.books.start()
            notes = list(self.details.get("notes", []))
            if step:
                notes.append(f"{checkpoint} holds no books: what its momentum does is `carried`.")
            for note in notes:
                self.record.append("note", step, text=note)

    def _open_record(self, step: int, *, resumed: bool, checkpoint: Path) -> None:
        if not resumed:
            self.record = Record.create(self.record.out)
            return
        self.record = Record.open(self.record.out)
        self.record.truncate(step)
        self.record.append("resume", step, checkpoint=checkpoint.name)

    def _details(self) -> dict[str, Any]:
        """What only the trainer and the run file know of the run."""
        args = self.trainer.args
        rows = {name: {"rows": self.table.sources.count(name)} for name in self.table.source_names}
        return {
            "seed": args.seed,
            "data": self.details.get("data") or rows,
            "settings": {
                "steps": int(self.trainer.state.max_steps),
                "batch_size": args.per_device_train_batch_size,
                "accumulation": args.gradient_accumulation_steps,
                "max_grad_norm": args.max_grad_norm,
                **self.details.get("settings", {}),
            },
            **({"model": self.details["model"]} if "model" in self.details else {}),
        }

    def _remember_drawn(self) -> None:
        numbers = {name: number for number, name in enumerate(self.table.ids)}
        seen = set(self.record.influence().column("sample_id").to_pylist())
        self._drawn = {numbers[name] for name in seen if name in numbers}

    def training_step(self, step: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Tensor:
        """Run the trainer's own step inside the books."""
        tags = inputs.pop(DOCUMENTS, None)
        if self.books is None or tags is None:
            raise RuntimeError(
                "a training batch came without the numbers of its samples: was the dataset or the collator replaced "
                "after `fastsft.attach`? Attach last."
            )
        if self.settings.tokens and not inputs.get("attention_mask", inputs["input_ids"].new_ones(1, 1))[:, 0].all():
            raise AttachError(
                "scores of tokens need rows padded on the right, and this batch is padded on the left: set "
                "`padding_side='right'` in the tokenizer or collator, or attribute with tokens=False."
            )
        shape = inputs["input_ids"].shape
        numbers, lengths = read_tags(tags, shape)
        self._drawn.update(numbers)
        packed = any(len(row) != 1 for row in lengths)
        names = [self.table.ids[number] for number in numbers]
        sources = [self.table.sources[number] for number in numbers]
        place = {"row_length": shape[1]} if packed else {"rows": (shape[0], shape[1])}
        try:
            with (
                self.books.batch(samples=names, sources=sources, lengths=lengths, **place),
                self._steered(sources, lengths, inputs.get("labels"), packed=packed),
            ):
                loss = step(model, inputs, *rest, **named)
        except BaseException:
            # a run that is interrupted in a notebook can be resumed there
            if self.books.store is not None:
                self.books.store.abandon()
            raise
        self.books.add_loss(loss)
        return loss

    def _steered(
        self, sources: list[str], lengths: list[list[int]], labels: Tensor | None, *, packed: bool
    ) -> AbstractContextManager[None]:
        if self.steerer is None:
            return nullcontext()
        order = {name: index for index, name in enumerate(self.table.source_names)}
        # a padding-free row is one row with every document in it
        return self.steerer.batch([order[name] for name in sources], lengths, labels, packed=packed)

    def save(self, checkpoint: Path) -> None:
        if self.books is not None:
            state = self.books.state_dict()
            if rank() == 0:
                if self.steerer is not None:
                    self.steerer.save(checkpoint)
                save_books(checkpoint, state)
            self.write_samples()

    def finish(self) -> None:
        if self.books is not None:
            self.books.finish()
            self.write_samples()
        if self.steerer is not None:
            if self.steerer.why_ended and rank() == 0:
                step = int(self.trainer.state.global_step)
                self.record.append("note", step, text=f"the run ended at step {step}: {self.steerer.why_ended}")
            self.steerer.close()

    def write_samples(self) -> None:
        """Write the texts of all samples drawn so far (and their tokens, where tokens were attributed)."""
        drawn = self._drawn
        if dist.is_initialized():
            shares: list[set[int]] = [set() for _ in range(dist.get_world_size())]
            dist.all_gather_object(shares, drawn)
            drawn = set().union(*shares)
            if rank() > 0:
                return
        order = sorted(drawn)
        self.record.write_samples((self.table.ids[n], self.table.sources[n], *self.table.text(n)) for n in order)
        if self.settings.tokens:
            decode = decoder(self.trainer)
            tokens = [[decode([token]) for token in self.table.tokens(number)] for number in order]
            columns = {"sample_id": [self.table.ids[number] for number in order], "tokens": tokens}
            write_table(self.record.out / "token_text.parquet", pa.table(columns))
