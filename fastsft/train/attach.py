"""Attach the books to a trainer you already have: transformers' Trainer or TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import IterableDataset

from fastsft.attribution import Attribution
from fastsft.record import Record
from fastsft.train.followed import AttachError, Run
from fastsft.train.samples import SampleTable, decoder, table_of_dataset
from fastsft.train.steerer import Steerer
from fastsft.train.steering import Steering
from fastsft.train.tags import COLUMNS, Numbered, TaggingCollator
from fastsft.train.targets import TargetRows, read_targets

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


def attach(
    trainer: Trainer,
    targets: Mapping[str, TargetRows],
    *,
    out: str | Path,
    settings: Attribution | None = None,
    store: bool = False,
    samples: SampleTable | None = None,
    details: Mapping[str, Any] | None = None,
    steering: Steering | None = None,
) -> Run:
    """Keep the books of `trainer.train()`: who moved which ability, sample by sample.

    targets: {ability: held-out rows}, each row {prompt, response}, {messages: [...]}, or {input_ids, labels}.
    out: the run directory, new (or the one a resumed training wrote). Sources and ids come from the columns `source`
    and `id` of the training set where it has them. store: also keep a sketch of every sample and step in
    OUT/store/training, to search later (`fastsft search`). steering: a policy that moves the mix of sources by what the
    books say, and a resolver of conflicts between abilities. Call it last, when dataset, collator and optimizer
    settings stand.

    Without steering, training gives the same weights, to the bit, with and without it (a rounding apart for gated
    adapters whose silent experts are skipped: books must see them). Raises ValueError where the trainer can't be
    followed: a streaming dataset, torch.compile, DataParallel, sharded weights; when training begins, an optimizer
    other than AdamW, Adam and SGD, or a model without a trainable linear layer.
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
    settings = replace(settings, store=settings.store or store)
    table = samples or table_of_dataset(trainer.train_dataset, decoder(trainer))
    measured, notes = read_targets(trainer, targets, settings)
    details["notes"] = [*details.get("notes", []), *notes]
    steerer = None
    if steering is not None:
        steerer = Steerer(steering, trainer, table, measured.abilities, details.get("data") or {}, Record(out))
    run = Run(trainer, measured, table, out, settings, details, steerer)
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
    if args.auto_find_batch_size:
        raise AttachError("auto_find_batch_size=True may begin a run again in its middle: set the batch size yourself.")
    if args.n_gpu > 1:
        raise AttachError("the model is split by DataParallel: start one process a GPU instead (torchrun, accelerate).")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise AttachError("FSDP and DeepSpeed shard what the books read: train on one process or under DDP.")


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
    load = trainer._load_optimizer_and_scheduler

    def load_optimizer(checkpoint: str | None) -> None:
        run.resumed_from = Path(checkpoint) if checkpoint else None
        load(checkpoint)

    trainer._load_optimizer_and_scheduler = load_optimizer

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


__all__ = ["AttachError", "Run", "attach"]
