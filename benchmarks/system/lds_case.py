"""The runs that attribution is judged on: three sources that the model has never seen, LoRA or all weights.

The model is the base of the shared data after 11 % of its pretraining: fine-tuning moves its loss by half a nat and
more. (The whole base has read so much of the like that 480 rows move it by a tenth, or make it forget.) Where the
shared data are absent there is `world`, a generated one.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import ROOT
from fastsft.attribution import Attribution
from fastsft.data import Sample, tokenize
from fastsft.train import FinishedRun, run
from fastsft.train.config import ConfigError, RunConfig, SourceConfig, TrainConfig
from fastsft.train.demo import demo
from fastsft.train.loop import load_model

SOURCES = {
    "gsm8k": ("maths", "maths/gsm8k"),
    "keon": ("code", "code/keon_algorithms"),
    "clinc": ("general", "general/clinc150"),
}
# of a row
LONGEST = 160
_LONG: dict[str, Any] = {"steps": 120, "batch_size": 16, "max_length": LONGEST, "save_every": 20, "keep_checkpoints": 6}
_SHORT: dict[str, Any] = {"steps": 24, "batch_size": 8, "max_length": LONGEST, "save_every": 4}


class Setting(NamedTuple):
    """How the run is trained, and the rows and queries of each source."""

    train: TrainConfig
    rows: int = 160
    queries: int = 16


SETTINGS = {
    "lora": Setting(TrainConfig(method="lora", rank=8, learning_rate=5e-3, **_LONG)),
    "full": Setting(TrainConfig(method="full", learning_rate=1e-3, **_LONG)),
    # for methods that go through every step of a run and every query
    "short": Setting(TrainConfig(method="lora", rank=8, learning_rate=5e-3, **_SHORT), rows=32, queries=8),
}


def data_folder() -> Path:
    """Find the shared data, or say how to do without."""
    for place in (os.environ.get("FASTSFT_DATA"), ROOT.parent / "shared" / "data"):
        if place is not None and (Path(place) / "base-model" / "checkpoint-192").is_dir():
            return Path(place)
    raise ConfigError("the shared data are not there (FASTSFT_DATA): take --setting world, a generated one.")


def make_config(
    setting: str, place: Path, from_where: Mapping[str, tuple[str, str]] = SOURCES, model: str = "checkpoint-192"
) -> RunConfig:
    """Write the model, the sources and the queries of a setting into `place`, and the run file for them.

    Of LoRA every query is a target of its own, so that the run's books know each; of all weights, whose books of many
    targets are slow, an ability's queries are one.
    """
    chosen, data, base = SETTINGS[setting], data_folder(), place / "base"
    if not base.exists():
        base.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(data / "base-model" / model / file, base)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(data / "base-model" / file, base)
    _, tokenizer = load_model(str(base.resolve()), None)
    sources, targets = {}, {}
    for name, (ability, folder) in from_where.items():
        rows = _draw(data / folder / "train.jsonl.gz", chosen.rows, tokenizer, in_base=False)
        _write(place / f"{name}.jsonl", rows)
        sources[name] = SourceConfig(path=f"{name}.jsonl", ability=ability)
        held = _draw(data / folder / "validation.jsonl.gz", chosen.queries, tokenizer)
        _write(place / f"{name}-queries.jsonl", held)
        one: dict[str, Any] = {"path": f"{name}-queries.jsonl", "ability": ability}
        if setting == "full":
            targets[ability] = SourceConfig(**one)
        else:
            targets |= {f"{ability}/{row['id']}": SourceConfig(**one, where={"id": row["id"]}) for row in held}
    attribution = Attribution(refresh_every=10)
    return RunConfig(
        model="base", sources=sources, targets=targets, out="run", train=chosen.train, attribution=attribution
    )


def prepared_run(setting: str, place: Path) -> FinishedRun:
    """Train the setting's run under attribution, or open it where it was trained before."""
    out = place / "run"
    if not (out / "checkpoints").exists():
        place.mkdir(parents=True, exist_ok=True)
        if setting == "world":
            demo(out, quick=True)
        else:
            run(make_config(setting, place), root=place)
    return FinishedRun.open(out)


def _draw(path: Path, number: int, tokenizer: Any, *, in_base: bool | None = None) -> list[dict[str, Any]]:
    """Draw rows of at most LONGEST tokens, the same every time."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if in_base is None or row["in_base"] is in_base]
    random.Random(0).shuffle(rows)
    return list(itertools.islice((row for row in rows if _fits(row, tokenizer)), number))


def _fits(row: dict[str, Any], tokenizer: Any) -> bool:
    sample = Sample.from_row(row, where=str(row["id"]))
    return len(tokenize(sample, tokenizer, max_length=10**6).input_ids) <= LONGEST


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
