"""The real text and model that system benchmarks run on, or the generated world where there is none.

Looked up in FASTSFT_DATA, then in ../shared/data: base-model/, maths/gsm8k and code/python_stdlib.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT
from benchmarks.system.index_case import Line
from fastsft.data import Row, Sample, make_world, read_source, small_model, tokenize_all, train_base

SOURCES = {"gsm8k": "maths/gsm8k/train.jsonl.gz", "python_stdlib": "code/python_stdlib/train.jsonl.gz"}


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """A trained model, its tokenizer, and rows of maths and code of 32 to 256 tokens; `name` says which."""

    name: str
    model: Any
    tokenizer: Any
    rows: list[Row]

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def material(num_rows: int) -> Material:
    """Load the base model and rows it has not seen; without them, the generated world's own."""
    folder = data_folder()
    return real(folder, num_rows) if folder else generated(num_rows)


def data_folder() -> Path | None:
    places = [os.environ.get("FASTSFT_DATA"), ROOT.parent / "shared" / "data"]
    return next((Path(place) for place in places if place and (Path(place) / "base-model").is_dir()), None)


def real(folder: Path, num_rows: int) -> Material:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base-model")
    model = AutoModelForCausalLM.from_pretrained(folder / "base-model", dtype=torch.float32)
    rows: list[Row] = []
    for name, path in SOURCES.items():
        samples = read_source(name, folder / path, limit=2 * num_rows, where={"in_base": False})
        found = tokenize_all(samples, tokenizer, max_length=256, over_long="drop").rows
        rows += [row for row in found if len(row.input_ids) >= 32][: num_rows // 2]
    random.Random(0).shuffle(rows)
    return Material("base-model (4 M)", model, tokenizer, rows)


def generated(num_rows: int) -> Material:
    """The generated world's model after 300 steps; four samples of a source make a row, so that rows are long."""
    world = make_world(seed=0, quick=True)
    tokenizer = world.tokenizer()
    model = small_model(tokenizer)
    train_base(model, tokenize_all(world.base, tokenizer, max_length=256).rows, steps=300)
    rows = []
    for name, samples in world.sources.items():
        groups = [samples[at : at + 4] for at in range(0, len(samples), 4)]
        joined = [_join(name, number, group) for number, group in enumerate(groups)]
        rows += tokenize_all(joined, tokenizer, max_length=256, over_long="truncate").rows
    random.Random(0).shuffle(rows)
    return Material("generated world (0.7 M)", model, tokenizer, rows[:num_rows])


def _join(source: str, number: int, group: list[Sample]) -> Sample:
    prompt = " ".join(f"{sample.prompt} {sample.response}" for sample in group[:-1])
    last = (("user", f"{prompt} {group[-1].prompt}"), ("assistant", group[-1].response))
    return dataclasses.replace(group[-1], id=f"{source}-joined-{number}", source=source, messages=last)


def write_case(folder: Path, num_rows: int) -> str:
    """Write the index-build case for ourselves and rivals alike -> the name of its material."""
    given = material(num_rows)
    given.model.save_pretrained(folder / "model")
    rows = [dataclasses.asdict(Line(row.id, row.source, row.input_ids, row.labels)) for row in given.rows]
    (folder / "rows.json").write_text(json.dumps({"pad_id": given.pad_id, "rows": rows}))
    return given.name
