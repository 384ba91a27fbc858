"""Run one adapter inside its rival's environment; the last line of stdout is a JSON list of rows.

`python -m benchmarks.rivals.child NAME CASE FOLDER REPEATS`, started by benchmarks.rivals.run. Case index_lora or
index_full: FOLDER holds the case, and the plain training step is timed in the same rounds. Case scan: torch is.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.harness import ratio, rounds
from benchmarks.memory import watch
from benchmarks.rivals._base import Contestant
from benchmarks.system.index_case import load_case, training_step
from benchmarks.system.scan_case import TOP, make_rows, torch_topk

SCAN = {"num_rows": 100_000, "size": 1024}


def index_rows(name: str, case_name: str, folder: Path, repeats: int) -> list[dict[str, object]]:
    case = load_case(folder, case_name.removeprefix("index_"))
    with tempfile.TemporaryDirectory() as place:
        found = importlib.import_module(f"benchmarks.rivals.{name}").contestants(case, Path(place))
        steps = {order: training_step(case, order) for order in ("sorted", "random")}
        times = rounds({**{key: each.run for key, each in found.items()}, **steps}, repeats=repeats, warmup=1)
        rows = []
        for key, each in found.items():
            scale = len(case.rows) / (each.num_samples or len(case.rows))
            scaled = [scale * value for value in times[key]]
            row = {"provider": key, "what": each.describe, "shape": case.shape, **each.facts}
            row |= {f"to_{order}_step": ratio(scaled, times[order])._asdict() for order in steps}
            row["extra_peak_mib"] = round(_peak(sys.argv[1:]) / 2**20, 1)
            row["bytes_a_sample"] = round(each.stored()) if each.stored else None
            rows.append(row)
    return rows


def scan_rows(name: str, repeats: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    module = importlib.import_module(f"benchmarks.rivals.{name}")
    for num_queries in (1, 16, 64):
        stored, queries = make_rows(SCAN["num_rows"], SCAN["size"], num_queries)
        found: dict[str, Contestant] = module.contestants(stored, queries)
        halved = stored.bfloat16()
        variants = {key: each.run for key, each in found.items()}
        variants["torch float32"] = lambda queries=queries, stored=stored: torch_topk(queries, stored)
        times = rounds(
            {**variants, "torch bf16": lambda queries=queries, halved=halved: torch_topk(queries, halved)}, repeats, 1
        )
        for key in variants:
            shape = f"N{SCAN['num_rows']} K{SCAN['size']} Q{num_queries} top-{TOP}, largest only"
            against = {"to_torch_bf16": ratio(times[key], times["torch bf16"])._asdict()}
            rows.append({"provider": key, "shape": shape, **against})
    return rows


def _peak(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "benchmarks.rivals.child", *arguments, "--memory"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def memory_of(name: str, case_name: str, folder: Path) -> int:
    case = load_case(folder, case_name.removeprefix("index_"))
    with tempfile.TemporaryDirectory() as place:
        (each,) = importlib.import_module(f"benchmarks.rivals.{name}").contestants(case, Path(place)).values()
        return watch(each.run)


def main() -> None:
    name, case, folder, repeats = sys.argv[1:5]
    torch.set_num_threads(1)
    if "--memory" in sys.argv:
        print(memory_of(name, case, Path(folder)))
        return
    rows = scan_rows(name, int(repeats)) if case == "scan" else index_rows(name, case, Path(folder), int(repeats))
    package = {"faiss": "faiss-cpu"}.get(name, name)
    versions = {key: version(key) for key in (package, "torch", "numpy")} | {"python": platform.python_version()}
    sys.stdout.flush()
    print(json.dumps([{**row, "rival_versions": versions, "process": os.path.basename(sys.prefix)} for row in rows]))


if __name__ == "__main__":
    main()
