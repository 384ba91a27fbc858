"""Timing that can be repeated: variants interleaved in one process, medians, rows that say where and when.

On a CPU everything runs on one thread and CPU time is counted, so that a shared machine disturbs all variants alike;
differences under 3 % are noise. On a GPU, CUDA events are.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def machine(device: str = "cpu") -> str:
    """Name the machine in one line."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
        widest = (
            "avx512"
            if "avx512f" in fields.get("flags", "")
            else "avx2"
            if "avx2" in fields.get("flags", "")
            else "base"
        )
        name = f"{fields.get('model name', name)}, {family}, {widest}"
    return f"{name}, {os.cpu_count()} logical CPUs, 1 thread used"


def commit() -> str:
    """Name the commit, with + where the tree differs from it; "unknown" outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("fastsft", "torch", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def gemm_rate(device: str = "cpu", size: int = 1024) -> float:
    """Measure this machine's float32 FLOP/s on a square torch.mm, a yardstick for other products."""
    a, b = torch.randn(2, size, size, device=device)
    (row,) = interleave({"mm": lambda: a @ b}, repeats=9, warmup=3, device=device)
    return 2 * size**3 / (row["median_ms"] / 1e3)


def interleave(
    variants: dict[str, Callable[[], object]], repeats: int = 15, warmup: int = 3, device: str = "cpu"
) -> list[dict[str, object]]:
    """Time the variants in turn, `repeats` times after `warmup` rounds -> a row per variant, in milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(warmup + repeats):
            for name, run in variants.items():
                elapsed = _time_cuda(run) if device == "cuda" else _time_cpu(run)
                if number >= warmup:
                    times[name].append(elapsed)
    finally:
        torch.set_num_threads(threads)
    return [{"provider": name, **_quantiles(values)} for name, values in times.items()]


def _time_cpu(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1e3


def _time_cuda(run: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _quantiles(values: list[float]) -> dict[str, object]:
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {
        "median_ms": round(statistics.median(values), 4),
        "p20_ms": round(p20, 4),
        "p80_ms": round(p80, 4),
        "repeats": len(values),
    }


def signed(rows: list[dict[str, object]], device: str = "cpu") -> list[dict[str, object]]:
    """Add to each row where, with what and when it was measured."""
    signature = {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    return [row | signature for row in rows]


def write_rows(path: str | Path, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON lines: whole under a temporary name, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.rename(path)
