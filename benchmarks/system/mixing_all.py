"""The whole benchmark of mixing on one machine: `python -m benchmarks.system.mixing_all --out FOLDER --budget 9m`.

The worlds on processor cores and the real case on the GPU, side by side. Needs FASTSFT_DATA for the real case, which is
left out where there is no GPU unless --real is given. FOLDER gets mixing_worlds.jsonl and mixing_real.jsonl, rewritten
while they grow; a log of each; and every training, so that a second call with more time goes on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import ROOT
from fastsft.evaluate.budget import seconds_of

# over the budget: the trainings that are under way end, and the last rows are written
_GRACE = 30.0


def command(kind: str, out: Path, budget: float, processes: int, more: list[str]) -> list[str]:
    """Write the call that races one kind of setting."""
    call = [sys.executable, "-m", "benchmarks.system.mixing", "--setting", kind]
    call += ["--processes", str(processes), "--budget", f"{budget:.0f}s", "--work", str(out / kind)]
    return [*call, "--out", str(out / f"mixing_{kind}.jsonl"), *more]


def start(kind: str, call: list[str], out: Path) -> subprocess.Popen[bytes]:
    """Start a race; of the worlds without a GPU, since their models are too small for one."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if kind == "worlds" else {}
    environment = {**os.environ, **hidden, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (out / f"{kind}.log").open("wb") as log:
        return subprocess.Popen(call, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait(races: dict[str, subprocess.Popen[bytes]], end: float) -> None:
    """Wait for all until `end`, then stop those that are left: their rows are written already."""
    for kind, race in races.items():
        try:
            race.wait(max(1.0, end - time.time()))
        except subprocess.TimeoutExpired:
            race.terminate()
            race.wait()
            print(f"{kind}: stopped after its time; see its log.", flush=True)


def summary_of(log: str) -> str:
    """Take the summary out of a log that ends with it and its details, or the log's end where there is none."""
    _, found, rest = log.partition("\n- ")
    return f"- {rest.partition(chr(10) + '### ')[0]}" if found else log[-1500:]


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, logs and trainings")
    parser.add_argument("--budget", default="9m", help="wall time of all")
    parser.add_argument("--gpu-processes", type=int, default=6, help="that share the GPU")
    parser.add_argument("--cpu-processes", type=int, help="of the worlds; the cores that are left unless told")
    parser.add_argument("--real", action="store_true", help="the real case without a GPU too, which is slow")
    args, more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out, budget, begun = args.out.resolve(), seconds_of(args.budget) - _GRACE, time.time()
    processes = {"real": args.gpu_processes if torch.cuda.is_available() or args.real else 0}
    processes["worlds"] = args.cpu_processes or max(1, len(os.sched_getaffinity(0)) - processes["real"])
    races = {
        kind: start(kind, command(kind, out, budget, number, more), out) for kind, number in processes.items() if number
    }
    if not processes["real"]:
        print("real: left out, there is no GPU; --real runs it all the same.", flush=True)
    wait(races, begun + budget + _GRACE)
    for kind, race in races.items():
        print(f"## {kind} (exit code {race.returncode})\n", flush=True)
        print(summary_of((out / f"{kind}.log").read_text(errors="replace")), flush=True)


if __name__ == "__main__":
    main()
