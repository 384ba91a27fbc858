"""What an estimator's scores cost: `python -m benchmarks.system.estimators --method ekfac --samples N --queries Q`.

Rows of maths and code, N to be scored for Q others each a query, on the base model with LoRA r=8 or its full weights. A
row holds the seconds of `fit` and of `score`, on the wall and of the CPU, and samples * queries a second of the two
together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import signed, write_rows
from benchmarks.system.index_build import rows_of
from benchmarks.system.index_case import BATCH_TOKENS, IndexCase, load_case, load_model
from benchmarks.system.index_data import write_case
from fastsft.attribution.methods.ekfac import EkFac
from fastsft.attribution.methods.grad_cos import GradCos
from fastsft.attribution.methods.grad_dot import GradDot
from fastsft.sketch.passes import Batching

METHODS: dict[str, Callable[..., Any]] = {
    "grad_dot": GradDot,
    "grad_cos": GradCos,
    "ekfac": EkFac,
    "ekfac_true": lambda **settings: EkFac(fisher="true", **settings),
}


class Seconds(NamedTuple):
    """Of the wall and of the CPU."""

    wall: float
    cpu: float


def timed(run: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Seconds(round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3))


def measure(case: IndexCase, method: str, samples: int, queries: int) -> dict[str, object]:
    """Fit on the case's first rows and score them for the rest."""
    rows = rows_of(case)
    if len(rows) < samples + queries:
        raise ValueError(f"the case has {len(rows)} rows, {samples} samples and {queries} queries were asked for.")
    model = load_model(case)
    estimator = METHODS[method](batching=Batching(max_tokens=BATCH_TOKENS, pad_id=case.pad_id))
    fit = timed(lambda: estimator.fit(model, [], rows[:samples]))
    score = timed(estimator.score(rows[samples : samples + queries]).matrix)
    return {
        "op": "system.estimators",
        "case": f"{method}_{case.method}",
        "shape": f"N{samples}, Q{queries}, {sum(len(row.input_ids) for row in rows[:samples])} tokens, {case.method}",
        "provider": "fastsft",
        "threads": torch.get_num_threads(),
        "fit_s": fit._asdict(),
        "score_s": score._asdict(),
        "pairs_per_s": round(samples * queries / (fit.wall + score.wall), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a method's fit and scores.")
    parser.add_argument("--json", type=Path, help="keep the rows here, as JSON lines")
    parser.add_argument("--method", nargs="+", default=["ekfac"], choices=list(METHODS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--setting", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        # sources give equal parts, and may be short of a row
        name = write_case(Path(folder), args.samples + args.queries + 2)
        measured = [
            measure(load_case(Path(folder), setting), method, args.samples, args.queries)
            for setting in args.setting
            for method in args.method
        ]
    rows = signed([row | {"model": name} for row in measured])
    for row in rows:
        print(row["case"], row["shape"], "fit", row["fit_s"], "score", row["score_s"], f"{row['pairs_per_s']} pairs/s")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
