"""Build small run directories with known numbers, through `fastsft.record.Record`."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import zip_longest
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
LATE = 2  # steps that a mix decided anew has to wait
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
    mix: bool = False,
    end: bool = True,
    seed: int = 0,
) -> Record:
    """Write a run whose residual is 1 % of each measured change, and whose samples add up to 90 % of their source.

    mix: a policy moves the mix at every refresh, LATE steps after it has decided, and a resolver weighs the abilities.
    """
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
        data={
            source: {"rows": samples, "sha256": "cd" * 32, "ability": owner if mix else None}
            for source, owner in zip_longest(sources, abilities[: len(sources)])
        },
        targets={ability: {"rows": 64, "tokens": 900} for ability in abilities},
    )
    losses = {ability: 2.0 + 0.5 * number for number, ability in enumerate(abilities)}
    errors = dict.fromkeys(abilities, 0.05)
    record.append("refresh", 0, losses=dict(losses), errors=errors, seconds=0.1, **(_gram(abilities, 0) if mix else {}))
    mixes = [_decide(sources, 0, None)]
    if mix:
        record.append("mix", 0, **mixes[0])
    base = generator.normal(-0.02, 0.03, (len(abilities), len(sources)))
    drawn: dict[str, list[Any]] = {name: [] for name in ("step", "sample_id", "source", "ability", "phi")}
    for number in range(intervals):
        first, last = number * every, (number + 1) * every
        for step in range(first + 1, last + 1):
            held = [event["weights"] for event in mixes if event["from_step"] <= step][-1]
            record.append(
                "step", step, loss=2.5 - 0.03 * step, lr=1e-3, scale=1.0, identity_error=1e-6 * (1 + step % 3),
                documents=dict.fromkeys(sources, 4), tokens=dict.fromkeys(sources, 200),
                **({"supervised": {source: round(800 * held[source]) for source in sources}} if mix else {}),
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
        gram = _gram(abilities, number + 1) if mix else {}
        record.append("refresh", last, losses=dict(losses), errors=errors, seconds=0.1, **gram)
        if mix:
            mixes.append(_decide(sources, number + 1, mixes[-1]["weights"], last))
            record.append("mix", last, **mixes[-1])
            record.append("conflict", last, **_resolve(abilities, number))
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


def _decide(sources: tuple[str, ...], version: int, before: dict[str, float] | None, step: int = 0) -> dict[str, Any]:
    """A mix that moves to the first source from all others, less each time, and every third time not at all."""
    share = 1 / len(sources)
    weights = before or dict.fromkeys(sources, share)
    if before is not None and version % 3:
        step_down = {source: weight * (1 - 0.3 / version) for source, weight in before.items() if source != sources[0]}
        weights = {sources[0]: 1 - sum(step_down.values()), **step_down}
    signal = {source: 0.1 / (1 + version) - 0.02 * number for number, source in enumerate(sources)}
    return {
        "version": version, "draw": 16 * (step + LATE) if version else 0,
        "from_step": step + 1 + LATE if version else 1,
        "policy": "align", "weights": weights, "before": before, "signal": signal if version else {},
        "error": {source: None if source == sources[-1] else 0.01 for source in signal} if version else {},
        "why": f"{sources[0]} lowers its ability's loss most per token {SCRIPT}" if version else "the start.",
        "details": {},
    }  # fmt: skip


def _gram(abilities: tuple[str, ...], number: int) -> dict[str, Any]:
    """Squared norms of 4 and a bit; the first two abilities oppose each other, with a product of -1.5, others agree."""
    norms = [4.0 + 0.1 * place for place in range(len(abilities))]
    gram = np.full((len(abilities), len(abilities)), 0.5) + 0.1 * (-1) ** number
    gram[:2, :2] = -1.5 + 0.2 * (-1) ** number
    np.fill_diagonal(gram, 3.0)
    return {"gram": gram.tolist(), "norms": norms}


def _resolve(abilities: tuple[str, ...], number: int) -> dict[str, Any]:
    factors = {ability: 1 + (0.1 + 0.02 * number) * (-1) ** place for place, ability in enumerate(abilities)}
    table = np.eye(len(abilities)).tolist()
    weights = [1 / len(abilities)] * len(abilities)
    return {
        "resolver": "upgrad", "apply": "lagged", "abilities": list(abilities), "gram": table, "cosines": table,
        "weights": weights, "factors": factors,
    }  # fmt: skip


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
