"""Shape the page's tables: source x ability cells, the samples with their text, the provenance lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastsft.report.flows import SampleFlow
from fastsft.report.run import Run, read_tokens
from fastsft.report.words import places, signed

# per ability and sign; the page says how many there are in all
MAX_SAMPLES = 300
MAX_CHARACTERS = 4000


def source_cells(summary: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Give one row per source with a cell per ability: number, interval, sign, and weight in % for the colour.

    key: `by_source` or `per_1k_tokens`.
    """
    ledger = {ability: entry for ability, entry in summary["ledger"].items() if entry["intervals"]}
    values = [value for entry in ledger.values() for value in entry[key].values() if value is not None]
    decimals, limit = places(values, 2), max(map(abs, values), default=0.0) or 1.0
    rows = []
    for source in summary["sources"]:
        cells = []
        for ability, entry in ledger.items():
            value = entry[key].get(source)
            interval = entry["by_source_interval"].get(source) if key == "by_source" else None
            cells.append(
                {
                    "ability": ability,
                    "said": signed(value, decimals),
                    "interval": f"{signed(interval[0], decimals)} to {signed(interval[1], decimals)}"
                    if interval
                    else "",
                    "weight": round(100 * abs(value) / limit) if value is not None else 0,
                    "sign": "harms" if (value or 0.0) > 0 else "helps",
                }
            )
        rows.append({"source": source, "cells": cells})
    return rows


def extremes(run: Run, flows: Mapping[str, SampleFlow]) -> dict[str, dict[str, Any]]:
    """List per ability the ids of the most helpful and the most harmful samples, at most MAX_SAMPLES of each sign."""
    lists = {}
    for ability in run.abilities:
        order = sorted((flow.phi[ability], sample) for sample, flow in flows.items() if ability in flow.phi)
        helpful = [sample for phi, sample in order if phi < 0]
        harmful = [sample for phi, sample in reversed(order) if phi > 0]
        lists[ability] = {
            "helpful": helpful[:MAX_SAMPLES],
            "harmful": harmful[:MAX_SAMPLES],
            "num_helpful": len(helpful),
            "num_harmful": len(harmful),
        }
    return lists


def sample_rows(run: Run, flows: Mapping[str, SampleFlow], lists: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Give text, draws and phi of every listed sample, and its token scores where the run kept them."""
    wanted = {sample for both in lists.values() for sign in ("helpful", "harmful") for sample in both[sign]}
    texts = _texts(run, wanted)
    rows: dict[str, Any] = {}
    for sample in sorted(wanted):
        flow = flows[sample]
        prompt, response = texts.get(sample, (None, None))
        rows[sample] = {
            "source": flow.source,
            "draws": flow.draws,
            "phi": flow.phi,
            "prompt": _cut(prompt),
            "response": _cut(response),
            "missing": sample not in texts,
        }
    scores, token_texts = read_tokens(run.record, wanted)
    for (ability, sample), draws in scores.items():
        # a draw cut to another length has other tokens: only draws as long as the text are added up
        fitting = [draw for draw in draws if len(draw) == len(token_texts.get(sample, ()))]
        if fitting:
            heat = rows[sample].setdefault("heat", {"text": token_texts[sample], "phi": {}, "draws": {}})
            heat["phi"][ability] = [sum(column) for column in zip(*fitting, strict=True)]
            heat["draws"][ability] = len(fitting)
    return rows


def _texts(run: Run, wanted: set[str]) -> dict[str, tuple[str, str]]:
    columns = (run.samples[name].to_pylist() for name in ("id", "prompt", "response"))
    return {sample: (prompt, response) for sample, prompt, response in zip(*columns, strict=True) if sample in wanted}


def _cut(text: str | None) -> str:
    if text is None or len(text) <= MAX_CHARACTERS:
        return text or ""
    return f"{text[:MAX_CHARACTERS]} … [{len(text) - MAX_CHARACTERS} more characters in samples.parquet]"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested settings into dotted names and their values."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, str(value)
