"""What importing costs."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.aims import Measured, aim
from benchmarks.harness import ROOT, ratio


def wall(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
    return time.perf_counter() - began


def against_torch(statement: str) -> Measured:
    times: dict[str, list[float]] = {statement: [], "import torch": []}
    for number in range(8):
        for each in list(times)[:: -1 if number % 2 else 1]:
            took = wall(each)
            if number:  # the first round reads the files from disk
                times[each].append(took)
    return Measured(*ratio(times[statement], times["import torch"]))


@aim("import_fastsft", what="`import fastsft` in a new process, wall time", against="`import torch`", at_most=1.1)
def import_fastsft() -> Measured:
    return against_torch("import fastsft")


@aim("import_rooms", what="importing ops, capturing, sketch and store", against="`import torch`", at_most=None)
def import_rooms() -> Measured:
    return against_torch("from fastsft import capturing, ops, sketch, store")
