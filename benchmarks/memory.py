"""Peak extra memory of a piece of work, in a process of its own so that no earlier allocation hides it."""

import ctypes
import gc
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT


def extra_peak(prepare: str, **arguments: Any) -> int:
    """Run `prepare` ("module:function", JSON-able arguments) in a child, then what it returns -> extra peak bytes.

    The peak of the resident set during the work, less the resident set just before it; Linux only. One thread.
    """
    command = [sys.executable, "-m", "benchmarks.memory", prepare, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def watch(run: Callable[[], object]) -> int:
    """Peak of this process's resident set while `run` runs, less what it held before, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def main() -> None:
    module, function = sys.argv[1].split(":")
    torch.set_num_threads(1)
    print(watch(getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
