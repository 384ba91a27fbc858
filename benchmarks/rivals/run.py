"""Race one rival on our cases, in an environment of its own: `python -m benchmarks.rivals.run bergson --out FILE`.

The environment is made once in a cache folder. Data and model are written to a temporary folder here; the rival and the
plain training step (for scans: torch) are timed in turn in one process there. A rival that cannot run gives a row with
`error`. Our own row for the same case is `python -m benchmarks.system.index_build`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import ROOT, signed, write_rows
from benchmarks.rivals.environments import DEFAULT_CACHE, ENVIRONMENTS, python_of

INDEX = ("index_lora", "index_full")


def cases_of(name: str) -> tuple[str, ...]:
    return ("scan",) if name == "faiss" else INDEX


def race(name: str, case: str, folder: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    """Run the adapter in its environment -> its rows, or one row with `error`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    told = {"op": "rivals", "rival": ENVIRONMENTS[name].rival, "case": case}
    try:
        python = python_of(name, args.cache)
    except subprocess.CalledProcessError as error:
        return [{**told, "provider": name, "error": f"can't be installed: {' '.join(error.cmd[1:])} failed"}]
    command = [str(python), "-m", "benchmarks.rivals.child", name, case, str(folder), str(args.repeats)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return [{**told, "provider": name, "error": f"not done after {args.timeout} s"}]
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        return [{**told, "provider": name, "error": reason}]
    return [{**told, **row} for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Race a rival in an environment of its own.")
    parser.add_argument("name", choices=list(ENVIRONMENTS))
    parser.add_argument("--case", choices=[*INDEX, "scan"], help="one case; all that the rival has, unless given")
    parser.add_argument("--rows", type=int, default=128, help="samples of the index cases")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a case may take")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, help="keep the rows here, as JSON lines")
    args = parser.parse_args()
    if args.case and args.case not in cases_of(args.name):
        raise SystemExit(f"{args.name} has the cases {', '.join(cases_of(args.name))}, not {args.case}.")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        material = "random numbers"
        if args.name != "faiss":
            from benchmarks.system.index_data import write_case

            material = write_case(Path(place), args.rows)
        for case in [args.case] if args.case else cases_of(args.name):
            rows += [row | {"material": material} for row in race(args.name, case, Path(place), args)]
    for row in rows:
        print(json.dumps(row))
    if args.out:
        write_rows(args.out, signed(rows))


if __name__ == "__main__":
    main()
