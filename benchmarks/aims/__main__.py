"""Measure the aims: `python -m benchmarks.aims [--only NAME ...] [--json FILE] [--list]`.

Each row is a ratio, its two sides interleaved in one process, one thread, CPU time. Slow rows are printed too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks.aims import load
from benchmarks.harness import signed, write_rows


def show(row: dict[str, object]) -> str:
    aim = "no aim" if row["aim"] is None else f"aim {row['aim']:<7} {'met' if row['met'] else 'NOT MET'}"
    spread = f"[{row['p20']:.3f}, {row['p80']:.3f}]"
    return f"{row['case']!s:24} {row['ratio']:8.3f} {row['unit']!s:4} {spread:20} {aim}"


def main() -> None:
    aims = load()
    parser = argparse.ArgumentParser(description="Measure the ratios this project aims at.")
    parser.add_argument("--only", nargs="+", choices=list(aims), metavar="NAME", help="these rows alone")
    parser.add_argument("--json", type=Path, help="keep the rows here, as JSON lines")
    parser.add_argument("--list", action="store_true", help="say what the rows are, and stop")
    args = parser.parse_args()
    if args.list:
        for aim in aims.values():
            limit = "printed only" if aim.at_most is None else f"at most {aim.at_most} {aim.unit}".strip()
            print(f"{aim.name:24} {aim.what}, against {aim.against}: {limit}")
        return
    if os.environ.get("OMP_NUM_THREADS") != "1":
        print("OMP_NUM_THREADS is not 1: libraries that torch calls may use more threads than are timed.")
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name in args.only or aims:
        rows.append(aims[name].row())
        print(show(rows[-1]), flush=True)
    if args.json:
        write_rows(args.json, signed(rows))


if __name__ == "__main__":
    main()
