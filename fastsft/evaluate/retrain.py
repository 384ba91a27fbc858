"""Train a finished run again, on some of its samples and with another seed, and measure its queries' losses.

A job runs anywhere torch, transformers and peft do: it reads the run's config.yaml, its data and its base model, and
writes nothing.
"""

# N samples, Q queries

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsft.data import IGNORED, DataError, Row, collate, read_source, tokenize_all, told_labels
from fastsft.record import Record
from fastsft.tasks import Mix
from fastsft.train.config import RunConfig
from fastsft.train.finished import FinishedRun
from fastsft.train.loop import Prepared, load_model, make_trainer, padding_id, prepare
from fastsft.train.steering import steer_static

WORK = "fastsft.evaluate.retrain:retrain"


@dataclass(frozen=True, eq=False)
class Query:
    """A held-out row that is a query, and the ability whose target it is of."""

    ability: str
    row: Row

    @property
    def name(self) -> str:
        return f"{self.ability}/{self.row.id}"


@dataclass(frozen=True, eq=False)
class Study:
    """What every retraining of a run shares: its settings, its rows, its model before step 1."""

    config: RunConfig
    prepared: Prepared
    base: nn.Module
    tokenizer: Any
    root: Path | None

    @property
    def pad_id(self) -> int:
        return padding_id(self.tokenizer)

    def queries(self, wanted: int | str | None) -> list[Query]:
        """Take the run's target rows (so many of each ability, evenly spaced; None: all), or read a file of rows.

        Rows of a file are grouped by their own `ability`.
        """
        if isinstance(wanted, str):
            samples = read_source("queries", wanted, root=self.root)
            rows = tokenize_all(samples, self.tokenizer, max_length=self.config.train.max_length, over_long="drop").rows
            ability = {sample.id: sample.ability or "queries" for sample in samples}
            return [Query(ability[row.id], row) for row in rows]
        return [
            Query(ability, row)
            for ability, rows in self.prepared.targets.items()
            for row in (rows if wanted is None else evenly(rows, wanted))
        ]


def evenly(rows: Sequence[Row], number: int) -> list[Row]:
    """Take `number` rows at even distances, all of them where there are no more."""
    if number < 1:
        raise DataError(f"the number of queries of an ability must be 1 or more: got {number}.")
    return [rows[at * len(rows) // number] for at in range(number)] if number < len(rows) else list(rows)


def study_of(run: str, root: str | None) -> Study:
    """Read a run's settings, data and base model, once a process and config.yaml."""
    path = Path(run) / "config.yaml"
    return _study(run, root, path.read_text(encoding="utf-8") if path.exists() else "")


@functools.lru_cache(maxsize=1)
def _study(run: str, root: str | None, written: str) -> Study:
    finished = FinishedRun.open(run, root=None if root is None else Path(root))
    model, tokenizer = load_model(finished.config.model, finished.root)
    return Study(finished.config, prepare(finished.config, tokenizer, finished.root), model, tokenizer, finished.root)


def retrain(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the run did on the samples to keep -> each query's loss before and after, nats per response token.

    job: `run` (its folder) and `root` (or null), `keep` (sample ids, or null for all), `seed` (of the order of the
    data and, for LoRA, of the adapter), `queries` (see `Study.queries`). Steps and warm-up are scaled by the share
    that is kept, so that a kept sample is seen as often as in the run. On CUDA where there is one.
    """
    study = study_of(job["run"], job["root"])
    start = time.perf_counter()  # without what is loaded once a process
    rows = kept_rows(study.prepared.rows, job["keep"])
    queries = [query.row for query in study.queries(job["queries"])]
    config = _config_of(study.config, len(rows) / len(study.prepared.rows), int(job["seed"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet(make_trainer(config, rows, copy.deepcopy(study.base), study.tokenizer, Path(folder)))  # type: ignore[arg-type]
        if study.config.steered:
            steer_as_before(trainer, Path(job["run"]), config)
        before = query_losses(trainer.model, queries, study.pad_id)
        trainer.train()
        after = query_losses(trainer.model, queries, study.pad_id)
    return {
        "before": before.tolist(),
        "after": after.tolist(),
        "steps": config.train.steps,
        "rows": len(rows),
        "seconds": time.perf_counter() - start,
    }


def kept_rows(rows: Sequence[Row], keep: Sequence[str] | None) -> list[Row]:
    """Choose rows by id, in the run's order; an id that the run has no row of is refused."""
    if keep is None:
        return list(rows)
    wanted = set(keep)
    kept = [row for row in rows if row.id in wanted]
    if len(kept) != len(wanted) or not kept:
        absent = sorted(wanted - {row.id for row in kept})[:3]
        raise DataError(
            f"`keep` must name training rows of the run, at least one: got {len(wanted)} ids, of which "
            f"{len(wanted) - len(kept)} are of no row ({', '.join(absent)} ...). Was its data changed since?"
        )
    return kept


def _config_of(config: RunConfig, share: float, seed: int) -> RunConfig:
    train = config.train
    scaled = dataclasses.replace(
        train,
        steps=max(1, round(share * train.steps)),
        warmup_steps=round(share * train.warmup_steps),
        seed=seed,
        workers=0,
    )
    return dataclasses.replace(config, train=scaled)


def quiet(trainer: Any) -> Any:
    """Take from a trainer all that it says and saves."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.args.save_strategy = trainer.args.logging_strategy = "no"
    return trainer


def steer_as_before(trainer: Any, run: Path, config: RunConfig) -> None:
    """Let a trainer draw by the mixes that a run's record holds, each over the same share of the steps.

    Sources of which no row is kept leave their shares to the others.
    """
    if config.conflict.resolver != "none":
        raise DataError(
            f"{run} weighed abilities' gradients by {config.conflict.resolver!r}, and a retraining can't repeat that: "
            f"judge scores on a run without a resolver."
        )
    record = Record.open(run)
    events = list(record.events("mix"))
    stream = steer_static(trainer, _left(events[0], trainer), config.mix.draws(config.train.seed))
    share = config.train.steps / record.start["settings"]["steps"]
    for event in events[1:]:
        steps_before = round((event["from_step"] - 1) * share)
        stream.set_mix_at(steps_before * stream.batch, _left(event, trainer))


def _left(event: dict[str, Any], trainer: Any) -> Mix:
    """A recorded mix over the sources that have rows; uniform where it gave none of them a share."""
    present = sorted({row.source for row in trainer.train_dataset.rows})
    weights = {source: event["weights"][source] for source in present}
    total = sum(weights.values())
    return Mix({source: w / total for source, w in weights.items()}) if total else Mix.uniform(present)


def query_losses(model: nn.Module, rows: Sequence[Row], pad_id: int, *, max_tokens: int = 8192) -> Tensor:
    """Measure each row's loss with dropout off -> [Q] nats per response token, float64 on the CPU."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    training = model.training
    model.eval()
    with torch.no_grad():
        for places in _batches(rows, max_tokens):
            found[places] = _row_losses(model, [rows[at] for at in places], pad_id)
    model.train(training)
    return found


def _batches(rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
    """Put rows of like lengths together, in at most `max_tokens` padded tokens."""
    batches: list[list[int]] = []
    for at in sorted(range(len(rows)), key=lambda at: -len(rows[at].input_ids)):
        if not batches or len(rows[batches[-1][0]].input_ids) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(at)
    return batches


def _row_losses(model: nn.Module, rows: Sequence[Row], pad_id: int) -> Tensor:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(rows, pad_id).items()}
    labels = batch.pop("labels")
    with told_labels(labels):
        logits = model(**batch, use_cache=False).logits[:, :-1]
    wanted = labels[:, 1:]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return (losses.double().sum(1) / (wanted != IGNORED).sum(1)).cpu()
