"""Ask rivals for their scores on a case: `python -m benchmarks.rivals.score CASE --rivals kronfluence --out scores/`.

Each method of a rival runs in a process of its own in the rival's environment and leaves RIVAL-METHOD.npy [N, Q] and
RIVAL-METHOD.json (provider, version, method, seconds, settings) in --out. One that fails leaves the JSON alone, with
the sentence it failed with. Positive scores help: training on the sample lowers the query's loss. On the CPU, with
OMP_NUM_THREADS threads, one unless it is set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT
from benchmarks.rivals.environments import DEFAULT_CACHE, ENVIRONMENTS, python_of
from benchmarks.rivals.scores._base import Adapter, load_case

RIVALS = ("kronfluence", "bergson", "dattri", "traker")


def methods_of(rival: str) -> dict[str, Adapter]:
    found: dict[str, Adapter] = importlib.import_module(f"benchmarks.rivals.scores.{rival}").METHODS
    return found


def run_here(rival: str, method: str, case_folder: Path, out: Path) -> dict[str, Any]:
    """Score in this process, which is the rival's environment -> what was done; writes the .npy."""
    import numpy

    case = load_case(case_folder)
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        scored = methods_of(rival)[method](case, Path(place))
        seconds = time.perf_counter() - begin
    scores = scored.scores.detach().cpu()
    wanted = (len(case.rows), len(case.queries))
    if tuple(scores.shape) != wanted or not bool(scores.isfinite().all()):
        lost = int((~scores.isfinite()).sum())
        raise ValueError(f"{rival} {method} gave scores {list(scores.shape)}, {lost} not finite, for {list(wanted)}.")
    numpy.save(out / f"{rival}-{method}.npy", scores.numpy())
    return {
        "seconds": round(seconds, 2),
        "parts": {name: value._asdict() for name, value in scored.parts.items()},
        "settings": scored.settings,
        "shape": case.shape,
        "samples": len(case.rows),
        "versions": {name: version(name) for name in (rival, "torch", "transformers")},
    }


def ask(rival: str, method: str, case: Path, out: Path, *, cache: Path = DEFAULT_CACHE, timeout: float = 3600) -> dict:
    """Run one method of a rival in its environment -> its row, also written as JSON; a failure's row has `error`."""
    package, _, number = ENVIRONMENTS[rival].rival.partition("==")
    told: dict[str, Any] = {"provider": package, "version": number, "method": method}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{rival}-{method}.npy").unlink(missing_ok=True)  # an old one must not stand for a failed new one
    row = told | _child(rival, method, case, out, cache, timeout)
    (out / f"{rival}-{method}.json").write_text(json.dumps(row, indent=1))
    return row


def _child(rival: str, method: str, case: Path, out: Path, cache: Path, timeout: float) -> dict[str, Any]:
    try:
        python = python_of(rival, cache)
    except subprocess.CalledProcessError as error:
        return {"error": f"can't be installed: {' '.join(error.cmd[1:])} failed"}
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    env = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    told = [str(case.resolve()), "--here", f"{rival}:{method}", "--out", str(out.resolve())]
    command = [str(python), "-m", "benchmarks.rivals.score", *told]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"error": _why(done.returncode, done.stderr)}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _why(status: int, stderr: str) -> str:
    if status < 0:  # its last line is whatever it was at, a progress bar perhaps
        return f"ended by signal {-status}" + (", of which want of memory is the usual cause" if status == -9 else "")
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask rivals for their scores on a case.")
    parser.add_argument("case", type=Path)
    parser.add_argument("--rivals", default=",".join(RIVALS), help="with commas; NAME:METHOD for one of its methods")
    parser.add_argument("--out", type=Path, required=True, help="folder for the scores")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a method may take")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the rivals' environments")
    parser.add_argument("--here", help="NAME:METHOD, in this very environment; prints what was done as JSON")
    args = parser.parse_args()
    if args.here:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        rival, method = args.here.split(":")
        row = run_here(rival, method, args.case, args.out)
        sys.stdout.flush()
        print(json.dumps(row))
        return
    for wanted in args.rivals.split(","):
        rival, _, only = wanted.partition(":")
        if rival not in RIVALS:
            raise SystemExit(f"there is no rival {rival!r} that scores: name {', '.join(RIVALS)}.")
        for method in [only] if only else methods_of(rival):
            row = ask(rival, method, args.case, args.out, cache=args.cache, timeout=args.timeout)
            said = f"failed: {row['error']}" if "error" in row else f"{row['seconds']} s, {json.dumps(row['settings'])}"
            print(f"{rival} {method}: {said}", flush=True)


if __name__ == "__main__":
    main()
