"""Build small run directories with known numbers, through `fastsft.record.Record`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fastsft.record import SCHEMA, Record, write_table

ABILITIES = ("maths", "code", "general")
SOURCES = ("gsm8k", "wikisql", "chat", "end")  # a source may be named like a line of the ledger
SCRIPT = "<script>window.injected = 1; alert(1)</script>"
CLOSE = "</script><!-- <b>bold</b> & 'quotes' \"double\""
ARABIC = "مرحبا بالعالم"


def _make_run(
    out: Path,
    *,
    abilities: tuple[str, ...] = ABILITIES,
    sources: tuple[str, ...] = SOURCES,
    intervals: int = 6,
    samples: int = 12,
    influence: bool = True,
    tokens: bool = False,
    planted: bool = False,
    end: bool = True,
    seed: int = 0,
) -> Record:
    """Write a run whose residual is 1 % of each measured change, and whose samples add up to 90 % of their source."""
    generator = np.random.default_rng(seed)
    every = 5
    record = Record.create(out)
    record.append(
        "start",
        0,
        schema=SCHEMA,
        abilities=list(abilities),
        sources=list(sources),
        settings={"refresh_every": every, "layers": {"include": ["q_proj", "v_proj"]}},
        versions={"fastsft": "0.1.0", "torch": "2.11.0"},
        seed=seed,
        optimizer={"name": "AdamW", "lr": 1e-3},
        model={"name": "tiny-llama", "parameters": 4_000_000, "trainable": 90_000, "digest": "ab" * 32},
        method="lora",
        data={source: {"rows": samples, "sha256": "cd" * 32, "ability": None} for source in sources},
        targets={ability: {"rows": 64, "tokens": 900} for ability in abilities},
    )
    losses = {ability: 2.0 + 0.5 * number for number, ability in enumerate(abilities)}
    errors = dict.fromkeys(abilities, 0.05)
    record.append("refresh", 0, losses=dict(losses), errors=errors, seconds=0.1)
    base = generator.normal(-0.02, 0.03, (len(abilities), len(sources)))
    drawn: dict[str, list[Any]] = {name: [] for name in ("step", "sample_id", "source", "ability", "phi")}
    for number in range(intervals):
        first, last = number * every, (number + 1) * every
        for step in range(first + 1, last + 1):
            record.append(
                "step", step, loss=2.5 - 0.03 * step, lr=1e-3, scale=1.0, identity_error=1e-6 * (1 + step % 3),
                documents=dict.fromkeys(sources, 4), tokens=dict.fromkeys(sources, 200),
            )  # fmt: skip
        entries = {}
        for a, ability in enumerate(abilities):
            by_source = dict(zip(sources, (base[a] * generator.uniform(0.5, 1.5, len(sources))).tolist(), strict=True))
            decay, unfollowed, carried = 1e-4, 2e-4, 1e-5
            predicted = sum(by_source.values()) + decay + unfollowed + carried
            residual = 0.01 * predicted
            entries[ability] = {
                "measured": predicted + residual, "error": 0.004, "by_source": by_source, "decay": decay,
                "unfollowed": unfollowed, "carried": carried, "residual": residual,
                "gross": sum(map(abs, by_source.values())),
                "start_only": {source: 1.4 * value for source, value in by_source.items()},
            }  # fmt: skip
            # a run that books no samples writes zeros
            share = 0.9 if influence else 0.0
            entries[ability]["samples"] = {source: share * value for source, value in by_source.items()}
            losses[ability] += predicted + residual
            if influence:
                for s, source in enumerate(sources):
                    weights = generator.normal(1.0, 2.0, 4)
                    for position in range(4):
                        drawn["step"].append(first + 1 + position)
                        drawn["sample_id"].append(f"{source}-{(4 * number + position + s) % samples}")
                        drawn["source"].append(source)
                        drawn["ability"].append(ability)
                        drawn["phi"].append(0.9 * by_source[source] * weights[position] / weights.sum())
        record.append("interval", last, **{"from": first, "to": last}, displacement_error=1e-7, abilities=entries)
        record.append("refresh", last, losses=dict(losses), errors=errors, seconds=0.1)
    rows = _texts(sources, samples)
    if influence:
        if tokens:
            drawn["tokens"] = [[0.25 * phi, 0.75 * phi] for phi in drawn["phi"]]
            texts = pa.table(
                {"sample_id": [row[0] for row in rows], "tokens": [[f"{row[2]} ", row[3]] for row in rows]}
            )
            write_table(out / "token_text.parquet", texts)
        record.write_influence(1, intervals * every, drawn)
        record.write_samples(rows)
    if planted:
        truth = {
            "harmful": [f"{sources[0]}-1"],
            "duplicates": [[f"{sources[0]}-2", f"{sources[0]}-3"], [f"{sources[0]}-4", f"{sources[0]}-5"]],
            "useless_source": sources[-1], "helper_source": sources[0], "helps": list(abilities[:2]),
        }  # fmt: skip
        (out / "planted.json").write_text(json.dumps(truth), encoding="utf-8")
    record.append("note", 3, text=f"the learning rate was lowered {SCRIPT}")
    if end:
        record.append("end", intervals * every, seconds=30.0, step_seconds=20.0, own_seconds=4.0, refresh_seconds=2.0)
    return record


def _texts(sources: tuple[str, ...], samples: int) -> list[tuple[str, str, str, str]]:
    odd = {0: ("What does this do?", SCRIPT), 1: (CLOSE, ARABIC), 2: ("same", "text"), 3: ("same", "text")}
    plain = [(number, f"question {number} é 漢字", f"answer {number}") for number in range(samples)]
    return [
        (f"{source}-{number}", source, *odd.get(number, (prompt, response)))
        for source in sources
        for number, prompt, response in plain
    ]


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Record]:
    return _make_run


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Record]:
    return lambda **settings: _make_run(tmp_path / "run", **settings)
