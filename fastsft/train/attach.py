"""Attach the books to a trainer you already have: transformers' Trainer or TRL's SFTTrainer."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset

from fastsft.attribution import Attribution, Books, Targets
from fastsft.data import Row, Sample, Tokenized, tokenize_all
from fastsft.record import Record, RecordError, write_table
from fastsft.train.checkpoint import load_books, save_books
from fastsft.train.samples import SampleTable, integers, table_of_dataset
from fastsft.train.tags import COLUMNS, DOCUMENTS, Numbered, TaggingCollator, read_tags

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

TargetRows = Sequence[Any]  # rows {prompt, response}, {messages}, or tokenised {input_ids, labels}


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
    ) -> None:
        self.trainer: Any = trainer
        self.targets, self.table, self.settings = targets, table, settings
        self.details = dict(details)
        self.record = Record(out)
        self.books: Books | None = None
        self._drawn: set[int] = set()

    def report(self) -> Path:
        """Write report.html and report.json into the run directory; return the page's path."""
        from fastsft.report import write_report

        return write_report(self.record.out)

    # what the callback and the wrapped training step call

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Open the record and the books when the optimizer exists."""
        step = int(state.global_step)
        main = not dist.is_initialized() or dist.get_rank() == 0
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{step}"
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
        )
        if loaded is not None:
            self.books.load_state_dict(loaded)
            self._remember_drawn()
        if main and loaded is None:
            self.record.append("start", step, **self._start_fields(optimizer))
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

    def _start_fields(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        model = self.trainer.model
        parameters = list(model.parameters())
        group = optimizer.param_groups[0]
        plain = {key: value for key, value in group.items() if isinstance(value, int | float | str | bool | tuple)}
        args = self.trainer.args
        return {
            "schema": 1,
            "abilities": self.targets.abilities,
            "sources": self.table.source_names,
            "settings": {
                **self.settings.__dict__,
                "steps": int(self.trainer.state.max_steps),
                "batch_size": args.per_device_train_batch_size,
                "accumulation": args.gradient_accumulation_steps,
                "max_grad_norm": args.max_grad_norm,
                **self.details.get("settings", {}),
            },
            "versions": versions(),
            "seed": args.seed,
            "optimizer": {"name": type(optimizer).__name__, **plain},
            "method": "lora" if hasattr(model, "peft_config") else "full",
            "model": {
                "name": self.details.get("model", getattr(model.config, "name_or_path", "") or type(model).__name__),
                "parameters": sum(p.numel() for p in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            },
            "data": self.details.get("data")
            or {name: {"rows": self.table.sources.count(name)} for name in self.table.source_names},
            "targets": {
                ability: {"rows": len(rows), "tokens": sum(self.targets.tokens[ability])}
                for ability, rows in self.targets.rows.items()
            },
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
        shape = inputs["input_ids"].shape
        numbers, lengths = read_tags(tags, shape)
        self._drawn.update(numbers)
        packed = any(len(row) != 1 for row in lengths)
        names = [self.table.ids[number] for number in numbers]
        sources = [self.table.sources[number] for number in numbers]
        place = {"row_length": shape[1]} if packed else {"rows": (shape[0], shape[1])}
        with self.books.batch(samples=names, sources=sources, lengths=lengths, **place):
            loss = step(model, inputs, *rest, **named)
        self.books.add_loss(loss)
        return loss

    def save(self, checkpoint: Path) -> None:
        if self.books is not None:
            state = self.books.state_dict()
            if not dist.is_initialized() or dist.get_rank() == 0:
                save_books(checkpoint, state)
            self.write_samples()

    def finish(self) -> None:
        if self.books is not None:
            self.books.finish()
            self.write_samples()

    def write_samples(self) -> None:
        """Write the texts of all samples drawn so far (and their tokens, where tokens were attributed)."""
        drawn = self._drawn
        if dist.is_initialized():
            shares: list[set[int]] = [set() for _ in range(dist.get_world_size())]
            dist.all_gather_object(shares, drawn)
            drawn = set().union(*shares)
            if dist.get_rank() > 0:
                return
        order = sorted(drawn)
        self.record.write_samples((self.table.ids[n], self.table.sources[n], *self.table.text(n)) for n in order)
        if self.settings.tokens:
            decode = _decoder(self.trainer)
            tokens = [[decode([token]) for token in self.table.tokens(number)] for number in order]
            columns = {"sample_id": [self.table.ids[number] for number in order], "tokens": tokens}
            write_table(self.record.out / "token_text.parquet", pa.table(columns))


def attach(
    trainer: Trainer,
    targets: Mapping[str, TargetRows],
    *,
    out: str | Path,
    settings: Attribution | None = None,
    samples: SampleTable | None = None,
    details: Mapping[str, Any] | None = None,
) -> Run:
    """Keep the books of `trainer.train()`: who moved which ability, sample by sample.

    targets: {ability: held-out rows}, each row {prompt, response}, {messages: [...]}, or {input_ids, labels}.
    out: the run directory, new (or the one a resumed training wrote). Sources and ids come from the columns `source`
    and `id` of the training set where it has them. Call it last, when dataset, collator and optimizer settings stand.

    Training gives the same weights, to the bit, with and without it. Raises ValueError where the trainer can't be
    followed: a streaming dataset, torch.compile, DataParallel, sharded weights, an optimizer
    other than AdamW, Adam and SGD.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"`trainer` must be a transformers Trainer (or TRL's SFTTrainer): got {type(trainer).__name__}. "
            f"For a loop of your own see fastsft.Books."
        )
    _check(trainer)
    out = Path(out)
    if (out / "record.jsonl").exists():
        Record.open(out)  # another schema is refused before anything is trained
    settings, details = settings or Attribution(), dict(details or {})
    table = samples or table_of_dataset(trainer.train_dataset, _decoder(trainer))
    measured, notes = _targets(trainer, targets, settings)
    details["notes"] = [*details.get("notes", []), *notes]
    run = Run(trainer, measured, table, out, settings, details)
    _tag(trainer, table)
    _wrap(trainer, run)
    return run


def _check(trainer: Any) -> None:
    dataset, args = trainer.train_dataset, trainer.args
    numbered = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not numbered or isinstance(dataset, IterableDataset):
        raise AttachError(
            f"the books need a training set with a length and numbered rows: got {type(dataset).__name__}. "
            f"Load it without streaming, or into a list."
        )
    if args.torch_compile:
        raise AttachError("torch_compile=True leaves out module hooks, which the books need: train with it off.")
    if args.n_gpu > 1:
        raise AttachError("the model is split by DataParallel: start one process a GPU instead (torchrun, accelerate).")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise AttachError("FSDP and DeepSpeed shard what the books read: train on one process or under DDP.")


def _decoder(trainer: Any) -> Any:
    tokenizer = trainer.processing_class

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens) if tokenizer is not None else " ".join(map(str, tokens))

    return decode


def _targets(trainer: Any, targets: Mapping[str, TargetRows], settings: Attribution) -> tuple[Targets, list[str]]:
    """Tokenise the targets; the notes say what was cut for its length."""
    tokenizer: Any = trainer.processing_class
    config = trainer.model.config
    longest: Any = getattr(trainer.args, "max_length", None) or getattr(config, "max_position_embeddings", 2048)
    rows: dict[str, list[Row]] = {}
    notes: list[str] = []
    for ability, given in targets.items():
        found = _rows(ability, given, tokenizer, longest)
        rows[ability] = found.rows
        if found.dropped or found.truncated:
            notes.append(
                f"target {ability}, over {longest} tokens: {len(found.dropped)} rows dropped, "
                f"{len(found.truncated)} cut."
            )
    pad_id: int | None = getattr(tokenizer, "pad_token_id", None)
    if pad_id is None:
        pad_id = getattr(config, "pad_token_id", None)
    return Targets(rows, pad_id=pad_id or 0, batch_tokens=settings.target_batch_tokens), notes


def _rows(ability: str, given: TargetRows, tokenizer: Any, longest: int) -> Tokenized:
    rows = list(given)
    if not rows:
        raise ValueError(f"target {ability!r} has no rows: give it held-out samples or leave it out.")
    if isinstance(rows[0], Row):
        return Tokenized(rows, [], [])
    if isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
        tokenised = [
            Row(str(number), ability, integers(row["input_ids"]), integers(row.get("labels", row["input_ids"])))
            for number, row in enumerate(rows)
        ]
        return Tokenized(tokenised, [], [])
    if tokenizer is None:
        raise ValueError(f"target {ability!r} is text, and the trainer has no processing_class to tokenise it with.")
    samples = [
        row
        if isinstance(row, Sample)
        else Sample.from_row(_renamed(row), source=ability, where=f"target {ability!r}, row {n}")
        for n, row in enumerate(rows, start=1)
    ]
    return tokenize_all(samples, tokenizer, max_length=longest, over_long="truncate")


def _renamed(row: Any) -> Any:
    """TRL calls the response `completion`."""
    if not isinstance(row, Mapping):
        return row
    fields = dict(row)
    if "completion" in fields and "response" not in fields:
        fields["response"] = fields.pop("completion")
    return fields


def _tag(trainer: Any, table: SampleTable) -> None:
    """Number the items of the training loader alone: evaluation, the dataset and the collator stay as found."""
    make_loader = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        with _tagging(trainer, table):
            return make_loader()

    trainer.get_train_dataloader = get_train_dataloader


@contextmanager
def _tagging(trainer: Any, table: SampleTable) -> Iterator[None]:
    trainer._set_signature_columns_if_needed()
    found = trainer.train_dataset, trainer.data_collator, trainer._signature_columns
    dataset, collator, columns = found
    trainer.train_dataset = dataset if _tagged(dataset) else _numbered(dataset)
    trainer.data_collator = TaggingCollator(collator, table.first_document)
    trainer._signature_columns = [*columns, *(name for name in COLUMNS if name not in columns)]
    try:
        yield
    finally:
        trainer.train_dataset, trainer.data_collator, trainer._signature_columns = found


def _numbered(dataset: Any) -> Any:
    if hasattr(dataset, "add_column"):
        return dataset.add_column("fastsft_row", list(range(len(dataset))))
    return Numbered(dataset)


def _tagged(dataset: Any) -> bool:
    return any(name in dataset[0] for name in ("fastsft_row", "fastsft_rows"))


def _wrap(trainer: Any, run: Run) -> None:
    from transformers import TrainerCallback

    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Tensor:
        return run.training_step(step, model, inputs, *rest, **named)

    trainer.training_step = training_step

    class Callback(TrainerCallback):
        """Tells the run when the trainer begins, steps, saves and ends."""

        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            run.begin(args, state)

        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            if run.books is not None:
                run.books.drop_step()  # gradients of a step that fp16's scaler skipped

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            if run.books is not None:
                run.books.after_step()

        def on_save(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            run.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

        def on_train_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            run.finish()

    trainer.add_callback(Callback())


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("fastsft", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


__all__ = ["AttachError", "RecordError", "Run", "attach", "versions"]
