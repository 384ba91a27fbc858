"""EK-FAC scores raced against kronfluence: `python -m benchmarks.rivals.estimator_race --samples 2000 --queries 100`.

Rows of maths and code on the base model, LoRA r=8 or its full weights, empirical Fisher, damping 0.1 of the mean
eigenvalue, one thread. Ours and theirs run in turn, each in a process of its own that fits and scores; loading the
model is not counted. Our factors come from 512 of the samples unless --documents says otherwise, theirs from all.
With --rival-samples below --samples kronfluence runs on that many rows and on half as many, and its time is the
straight line through the two; its row says so. How far the scores agree stands in the row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.harness import ROOT, ratio, signed, write_rows
from benchmarks.rivals.environments import DEFAULT_CACHE
from benchmarks.rivals.score import ask
from benchmarks.rivals.scores._base import Case, load_case, load_model, timed, write_case
from benchmarks.system.index_case import BATCH_TOKENS, IndexCase, Line
from benchmarks.system.index_case import load_model as untrained
from benchmarks.system.index_data import material
from fastsft.attribution.methods import Checkpoint
from fastsft.attribution.methods._checkpoints import trainable
from fastsft.attribution.methods.ekfac import EkFac
from fastsft.data import Row
from fastsft.sketch.passes import Batching

RIVAL, METHOD = "kronfluence", "ekfac_empirical"


def rows_of(lines: Sequence[Line]) -> list[Row]:
    return [Row(line.id, line.source, line.input_ids, line.labels) for line in lines]


def make_cases(place: Path, settings: Sequence[str], samples: Sequence[int], queries: int) -> str:
    """Write the case of every setting and number of samples, the same queries in all -> the material's name."""
    found = material(max(samples) + queries + 2)  # sources give equal parts, and may be short of a row
    if len(found.rows) < max(samples) + queries:
        raise SystemExit(
            f"there are {len(found.rows)} rows; {max(samples)} samples and {queries} queries were asked for."
        )
    found.model.save_pretrained(place / "model")
    asked, rest = found.rows[:queries], found.rows[queries:]
    for setting in settings:
        model = untrained(IndexCase(place, setting, [], found.pad_id))
        checkpoint = Checkpoint("base model", trainable(model))
        for number in samples:
            folder = place / f"{setting}-{number}"
            write_case(folder, model, [checkpoint], rest[:number], asked, base=place / "model", pad_id=found.pad_id)
    return found.name


def ours(folder: Path, out: Path, documents: int | None) -> dict[str, Any]:
    """Fit and score in this process -> seconds; writes the scores."""
    case = load_case(folder)
    model = load_model(case)
    method = EkFac(damping=0.1, max_documents=documents, batching=Batching(max_tokens=BATCH_TOKENS, pad_id=case.pad_id))
    found: list[torch.Tensor] = []
    fit = timed(lambda: method.fit(model, [], rows_of(case.rows)))
    score = timed(lambda: found.append(method.score(rows_of(case.queries)).matrix()))
    numpy.save(out / "ours.npy", found[0].numpy())
    return {"parts": {"fit": fit._asdict(), "score": score._asdict()}}


def ours_apart(folder: Path, out: Path, documents: int) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.rivals.estimator_race", "--ours", str(folder), "--out", str(out)]
    command += ["--documents", str(documents)]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def race(place: Path, setting: str, samples: int, rival_samples: Sequence[int], args: argparse.Namespace) -> list[dict]:
    """Run both in turn -> our row and the rival's."""
    out = place / "scores"
    out.mkdir(exist_ok=True)
    full = load_case(place / f"{setting}-{samples}")
    mine: list[dict[str, Any]] = []
    theirs: list[list[dict[str, Any]]] = []
    told = {"op": "rivals.estimator_race", "case": f"ekfac_{setting}", "shape": full.shape, "threads": 1}
    for turn in range(args.repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            if side == 0:
                mine.append(ours_apart(full.folder, out, args.documents))
                continue
            folders = [place / f"{setting}-{number}" for number in rival_samples]
            found = [ask(RIVAL, METHOD, each, out, cache=args.cache, timeout=args.timeout) for each in folders]
            if failed := [each["error"] for each in found if "error" in each]:
                return [told | {"provider": RIVAL, "error": failed[0]}]
            theirs.append(found)
    scored = load_case(place / f"{setting}-{rival_samples[-1]}")
    agreement = agree(out, scored)
    return [
        told
        | {
            "provider": "fastsft",
            "factors_from": min(args.documents or samples, samples),
            "parts": [each["parts"] for each in mine],
            **of_rival(mine, theirs, samples),
        },
        told
        | {
            "provider": f"{RIVAL}=={theirs[0][0]['version']}",
            "settings": theirs[0][0]["settings"],
            "parts": [[each["parts"] for each in found] for found in theirs],
            "samples_run": list(rival_samples),
            "note": _note(rival_samples, samples),
            "correlation_with_ours": agreement,
        },
    ]


def of_rival(mine: list[dict[str, Any]], theirs: list[list[dict[str, Any]]], samples: int) -> dict[str, object]:
    """Seconds of both at `samples` rows, and ours as a share of theirs, on the wall and of the CPU."""
    row: dict[str, object] = {}
    for clock in ("wall", "cpu"):
        a = [_total(each["parts"], clock) for each in mine]
        b = [at(samples, [(each["samples"], _total(each["parts"], clock)) for each in turn]) for turn in theirs]
        row[f"{clock}_s"], row[f"rival_{clock}_s"] = a, [round(value, 2) for value in b]
        row[f"{clock}_to_rival"] = ratio(a, b)._asdict()
    return row


def at(samples: int, measured: Sequence[tuple[int, float]]) -> float:
    """The time of `samples` rows: measured, or on the straight line through two smaller numbers of rows."""
    if len(measured) == 1:
        return measured[0][1]
    (few, short), (many, long) = measured
    return long + (samples - many) * (long - short) / (many - few)


def _total(parts: dict[str, dict[str, float]], clock: str) -> float:
    return round(sum(seconds[clock] for seconds in parts.values()), 3)


def _note(rival_samples: Sequence[int], samples: int) -> str:
    if len(rival_samples) == 1:
        return "ran on all samples"
    few, many = rival_samples
    return f"ran on {few} and {many} of {samples} samples, all queries; its time is the straight line through the two"


def agree(out: Path, case: Case) -> dict[str, object] | str:
    """The least of the queries' correlations of the two's scores, where both scored the same samples."""
    mine, theirs = numpy.load(out / "ours.npy"), numpy.load(out / f"{RIVAL}-{METHOD}.npy")
    if mine.shape != theirs.shape:
        return f"not taken: theirs are of {len(case.rows)} samples, and their curvature too"
    values = [float(numpy.corrcoef(mine[:, q], theirs[:, q])[0, 1]) for q in range(mine.shape[1])]
    return {"least_of_queries": round(min(values), 6), "mean": round(sum(values) / len(values), 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Race EK-FAC scores against kronfluence.")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--rival-samples", type=int, help="where fewer are to be run and scaled up; all unless given")
    parser.add_argument("--setting", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--repeats", type=int, default=2, help="2 or more, ours and theirs in turn")
    parser.add_argument("--documents", type=int, default=512, help="samples that our factors are fitted on; 0 for all")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one run of the rival may take")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the rivals' environments")
    parser.add_argument("--json", type=Path, help="keep the rows here, as JSON lines")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # a case: our side alone, in this process
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        torch.set_num_threads(1)
        print(json.dumps(ours(args.ours, args.out, args.documents or None)))
        return
    few = args.rival_samples or args.samples
    rival = [few] if few >= args.samples else [few // 2, few]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        name = make_cases(place, args.setting, sorted({args.samples, *rival}), args.queries)
        rows = [row for setting in args.setting for row in race(place, setting, args.samples, rival, args)]
    rows = signed([row | {"material": name} for row in rows])
    for row in rows:
        print(json.dumps(row))
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
