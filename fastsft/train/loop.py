"""`fastsft run`: read the data, fine-tune with transformers' Trainer under attribution, write the report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from fastsft.data import (
    PackedDataset,
    Row,
    RowDataset,
    Sample,
    check_unique,
    collate,
    collate_packed,
    file_digest,
    find_file,
    pack,
    read_source,
    tokenize_all,
)
from fastsft.record import Record, versions, write_text
from fastsft.train.attach import Run, attach
from fastsft.train.checkpoint import latest_checkpoint
from fastsft.train.config import ConfigError, RunConfig, SourceConfig, TrainConfig
from fastsft.train.samples import table_of_rows
from fastsft.train.steering import Steering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything a run trains on, read and tokenised."""

    samples: list[Sample]
    rows: list[Row]
    targets: dict[str, list[Row]]
    data: dict[str, dict[str, Any]]
    notes: list[str]


def run(config: RunConfig, *, root: Path | None = None, resume: bool = False, steering: Steering | None = None) -> Run:
    """Run what a run file says; `root` is where its relative paths start. Returns the finished run, report written.

    steering: the policy and the resolver that its sections `mix` and `conflict` name; `fastsft.run` makes them.
    """
    _check_steered(config, steering)
    out = _under(root, config.out)
    if not resume:
        Record.create(out)  # a folder that holds a run is refused before anything is loaded
    checkpoint = latest_checkpoint(out / "checkpoints") if resume else None
    if resume and checkpoint is None:
        raise ConfigError(
            f"{out / 'checkpoints'} holds no whole checkpoint to resume from: start the run without resume."
        )
    if checkpoint is not None and int(checkpoint.name.split("-")[1]) >= config.train.steps:
        raise ConfigError(
            f"{checkpoint} holds all {config.train.steps} steps of this run, so nothing is left to resume: "
            f"write its page with `fastsft report {out}`."
        )
    model, tokenizer = load_model(config.model, root)
    prepared = prepare(config, tokenizer, root)
    home = None if root is None else root.resolve()
    return fine_tune(config, prepared, model, tokenizer, out=out, checkpoint=checkpoint, root=home, steering=steering)


def _check_steered(config: RunConfig, steering: Steering | None) -> None:
    if config.steered and steering is None:
        raise ConfigError(
            f"the run is steered (mix.policy {config.mix.policy!r}, conflict.resolver {config.conflict.resolver!r}), "
            f"and no policy or resolver was handed over: start it by fastsft.run or `fastsft run`, which make them, or "
            f"hand over `steering`."
        )


def model_places(name: str, root: Path | None) -> list[Path]:
    """Where a model's folder is looked for, before its name is taken for a hub id."""
    return [Path(folder) / name for folder in (root, os.environ.get("FASTSFT_DATA"), ".") if folder]


def load_model(name: str, root: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a folder (looked up like data) or the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    places = model_places(name, root)
    place = next((str(folder) for folder in places if folder.is_dir()), name)  # else a hub id
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"model {name!r} can't be loaded ({reason}). Looked for the folders {', '.join(map(str, places))}, then on "
            f"the hub: correct the name, or name its folder with `root` or FASTSFT_DATA."
        ) from error


def prepare(config: RunConfig, tokenizer: PreTrainedTokenizerBase, root: Path | None) -> Prepared:
    """Read and tokenise sources and targets; say what was dropped or cut for its length."""
    samples: list[Sample] = []
    data: dict[str, dict[str, Any]] = {}
    for name, source in config.sources.items():
        read = _read(name, source, root)
        samples += read
        data[name] = {"path": source.path, "rows": len(read), "ability": source.ability or read[0].ability}
        data[name]["sha256"] = _digest(source.path, root)
    check_unique(samples)
    kept = tokenize_all(samples, tokenizer, max_length=config.train.max_length, over_long=config.train.over_long)  # type: ignore[arg-type]
    out = set(kept.dropped)
    notes = []
    if kept.dropped or kept.truncated:
        notes.append(
            f"over {config.train.max_length} tokens: {len(kept.dropped)} training samples dropped, "
            f"{len(kept.truncated)} cut."
        )
    targets = {}
    for ability, source in config.targets.items():
        found = tokenize_all(
            _read(ability, source, root), tokenizer, max_length=config.train.max_length, over_long="drop"
        )
        if found.dropped:
            notes.append(f"target {ability}: {len(found.dropped)} rows over {config.train.max_length} tokens dropped.")
        targets[ability] = found.rows
    return Prepared([sample for sample in samples if sample.id not in out], kept.rows, targets, data, notes)


def _read(name: str, source: SourceConfig, root: Path | None) -> list[Sample]:
    return read_source(name, source.path, ability=source.ability, limit=source.limit, where=source.where, root=root)


def _digest(path: str, root: Path | None) -> str | None:
    try:
        return file_digest(find_file(path, root))
    except ValueError:
        return None  # a hub id: its revision is the hub's to keep


def fine_tune(
    config: RunConfig,
    prepared: Prepared,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    out: Path,
    checkpoint: Path | None = None,
    root: Path | None = None,
    steering: Steering | None = None,
    report: bool = True,
) -> Run:
    """Fine-tune `model` on prepared rows with the books kept, then write the report (unless `report` is False).

    root: where the relative paths of `config` start, for the run's config.yaml; a relative one starts at `out`.
    """
    _check_steered(config, steering)
    if checkpoint is None:
        Record.create(out)
    _check_rows(config, prepared, steering)
    trainer = make_trainer(config, prepared.rows, model, tokenizer, out)
    settings = {"packing": config.train.packing}
    followed = attach(
        trainer,
        prepared.targets,
        out=out,
        settings=config.attribution,
        samples=table_of_rows(prepared.samples, [row.input_ids for row in prepared.rows]),
        details={"data": prepared.data, "model": config.model, "settings": settings, "notes": prepared.notes},
        steering=steering,
    )
    main = trainer.is_world_process_zero()
    if main:
        resolved = {**config.as_dict(), "versions": versions(), "root": None if root is None else str(root)}
        write_text(out / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if main and report:
        followed.report()
    return followed


def _check_rows(config: RunConfig, prepared: Prepared, steering: Steering | None) -> None:
    """Refuse to steer by an ability without a target, and to mix a source of which no row is left."""
    if steering is None:
        return
    for name, source in config.sources.items():
        if source.ability is not None and source.ability not in config.targets:
            raise ConfigError(
                f"sources.{name}.ability is {source.ability!r}, which has no target, so nothing says what the source "
                f"is good for: the targets are {', '.join(config.targets)}. Name one of them, or leave `ability` out."
            )
    if steering.policy is None:
        return
    present = {row.source for row in prepared.rows}
    empty = [name for name in config.sources if name not in present]
    if empty:
        raise ConfigError(
            f"source {empty[0]!r} has no row left to draw (over train.max_length, {config.train.max_length} tokens?): "
            f"raise train.max_length, set train.over_long to truncate, or leave the source out."
        )


def make_trainer(
    config: RunConfig, rows: Sequence[Row], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path
) -> Trainer:
    """A plain transformers Trainer for the run file: LoRA by PEFT or all weights, padded or packed batches."""
    from transformers import Trainer, TrainingArguments

    train = config.train
    if train.method == "lora" and not hasattr(model, "peft_config"):
        model = with_adapter(model, train)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # the newer name of the two; the older one warns where both are known
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    checkpointing: dict[str, Any] = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    args = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup_steps,
        lr_scheduler_type=train.schedule,
        optim={"adamw": "adamw_torch", "sgd": "sgd"}[train.optimizer],
        max_grad_norm=train.max_grad_norm,
        bf16=train.precision == "bf16",
        **(checkpointing if train.gradient_checkpointing else {}),
        save_steps=train.save_every,
        save_total_limit=train.kept,
        dataloader_num_workers=train.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        seed=train.seed,
        logging_steps=10,
        report_to=[],
    )
    model.config.use_cache = False
    dataset: RowDataset | PackedDataset = RowDataset(rows)
    if train.packing:
        dataset = PackedDataset(rows, _lines(rows, config))
    pad_id = 0 if tokenizer is None else padding_id(tokenizer)
    return Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Padding(pad_id, train.max_length if train.packing else None),
        processing_class=tokenizer,
    )


def _lines(rows: Sequence[Row], config: RunConfig) -> list[list[int]]:
    """Pack rows into lines; each source by itself where a mix draws lines."""
    train = config.train
    if not config.mix.steered:
        return pack(rows, train.max_length, seed=train.seed)
    places: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        places.setdefault(row.source, []).append(at)
    return [
        [own[at] for at in line]
        for own in places.values()
        for line in pack([rows[at] for at in own], train.max_length, seed=train.seed)
    ]


def with_adapter(model: PreTrainedModel, train: TrainConfig) -> PreTrainedModel:
    """Wrap a model in the run's LoRA by PEFT, drawn from the run's seed alone."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(train.seed)
    alpha = train.alpha if train.alpha is not None else 2.0 * train.rank
    lora = LoraConfig(r=train.rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")  # type: ignore[arg-type]
    return get_peft_model(model, lora)  # type: ignore[return-value]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's, or its end of text."""
    found: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found)


@dataclass(frozen=True)
class Padding:
    """Pad items on the right: rows to the longest, with a mask; packed lines to `width`, told apart by position_ids."""

    pad_id: int
    width: int | None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [Row("", "", list(feature["input_ids"]), list(feature["labels"])) for feature in features]
        if self.width is None:
            return collate(rows, self.pad_id)
        batch = collate_packed([[row] for row in rows], self.width, self.pad_id)  # lines that are laid already
        lines = [[*feature["position_ids"], *range(self.width - len(feature["position_ids"]))] for feature in features]
        return {name: batch[name] for name in ("input_ids", "labels")} | {"position_ids": torch.tensor(lines)}


def _under(root: Path | None, path: str) -> Path:
    return Path(path) if root is None or Path(path).is_absolute() else root / path
