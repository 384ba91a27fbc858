"""The real case of the benchmark of mixing: three abilities, five sources, and a small model that knows little yet.

The model is the base of the shared data after 11 % of its pretraining (see lds_case.py). Two of the sources bear the
name of an ability and are of little use to it: Python is not the SQL that is asked for, and answers of a forum are not
instructions. The instructions are few: a fifth of the run goes through them more than twice.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.system.lds_case import LONGEST, data_folder
from benchmarks.system.mixing_worlds import Data
from fastsft.data import Row, read_source, tokenize_all
from fastsft.train.config import TrainConfig

MODEL = "base-model/checkpoint-192"
SOURCES = {
    "gsm8k": ("maths", "maths/gsm8k"),
    "python_stdlib": ("code", "code/python_stdlib"),
    "wikisql": ("code", "code/wikisql"),
    "instructions": ("general", "general/rasbt_instructions"),
    "stackexchange": ("general", "general/stackexchange"),
}
# where each ability's held-out rows are from
ABILITIES = {"maths": "maths/gsm8k", "code": "code/wikisql", "general": "general/rasbt_instructions"}
# rows at most, of each source and of each ability
ROWS, VALIDATION, TEST = 1200, 32, 64


class Setting(NamedTuple):
    """How the case is trained: LoRA, for so many supervised tokens: some 200 steps of the uniform mix."""

    train: TrainConfig
    tokens: int = 96000
    refresh_every: int = 10


SETTING = Setting(
    TrainConfig(method="lora", rank=8, learning_rate=2e-3, batch_size=16, warmup_steps=8, max_length=LONGEST)
)


def load() -> tuple[Data, Any, Any]:
    """Read the rows, the model, and the tokenizer of all its checkpoints."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = data_folder()
    model = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL.partition("/")[0])
    sources = {
        name: _rows(name, folder / place / "train.jsonl.gz", ROWS, tokenizer) for name, (_, place) in SOURCES.items()
    }
    held = {
        part: {
            ability: _rows(f"{part} of {ability}", folder / place / f"{part}.jsonl.gz", number, tokenizer)
            for ability, place in ABILITIES.items()
        }
        for part, number in (("validation", VALIDATION), ("test", TEST))
    }
    ability_of = {name: ability for name, (ability, _) in SOURCES.items()}
    return Data(sources, ability_of, held["validation"], held["test"]), model, tokenizer


def _rows(name: str, path: Path, number: int, tokenizer: Any) -> list[Row]:
    """Draw rows of at most LONGEST tokens, the same every time; of training rows those that are new to the model."""
    # the forum's answers were all in the model's text, of which this checkpoint has seen a ninth
    new = path.name.startswith("train") and name != "stackexchange"
    samples = read_source(name, str(path), where={"in_base": False} if new else None)
    random.Random(0).shuffle(samples)
    found: list[Row] = []
    size = max(number, 64)  # of which some are short enough
    for start in range(0, len(samples), size):
        found += tokenize_all(samples[start : start + size], tokenizer, max_length=LONGEST, over_long="drop").rows
        if len(found) >= number:
            break
    return found[:number]
