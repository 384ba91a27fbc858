"""Timing that can be repeated: variants interleaved in one process, medians, rows that say where and when.

On a CPU everything runs on one thread and CPU time is counted, so that a shared machine disturbs all variants alike;
differences under 3 % are noise. On a GPU, CUDA events are. Ratios are taken round by round, then their median.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

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


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """Measure this machine's FLOP/s on a square torch.mm, a yardstick for other products."""
    size = size or (8192 if device == "cuda" else 1024)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    (row,) = interleave({"mm": lambda: a @ b}, repeats=9, warmup=3, device=device)
    return 2 * size**3 / (float(str(row["median_ms"])) / 1e3)


class Bandwidth(NamedTuple):
    """Bytes a second of this machine, one thread: `read` alone, and `copy`, which counts what it reads and writes."""

    read: float
    copy: float


def bandwidth(device: str = "cpu", megabytes: int | None = None) -> Bandwidth:
    """Measure how fast memory is read (a float32 sum) and copied, on arrays no cache holds."""
    megabytes = megabytes or (4096 if device == "cuda" else 256)
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.zeros_like(source)
    size = source.numel() * source.element_size()
    rows = interleave({"read": source.sum, "copy": lambda: target.copy_(source)}, repeats=5, warmup=2, device=device)
    read, copy = (float(str(row["median_ms"])) / 1e3 for row in rows)
    return Bandwidth(size / read, 2 * size / copy)


def rounds(
    variants: Mapping[str, Callable[[], object]], repeats: int = 15, warmup: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time the variants in turn, `repeats` times after `warmup` rounds -> milliseconds of each round, by variant.

    Every other round goes backwards, so that no variant always follows the same one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(warmup + repeats):
            for name in list(variants)[:: -1 if number % 2 else 1]:
                elapsed = _time_cuda(variants[name]) if device == "cuda" else _time_cpu(variants[name])
                if number >= warmup:
                    times[name].append(elapsed)
    finally:
        torch.set_num_threads(threads)
    return times


def interleave(
    variants: Mapping[str, Callable[[], object]], repeats: int = 15, warmup: int = 3, device: str = "cpu"
) -> list[dict[str, object]]:
    """Time the variants in turn (`rounds`) -> a row per variant, in milliseconds."""
    times = rounds(variants, repeats, warmup, device)
    return [{"provider": name, **_quantiles(values)} for name, values in times.items()]


class Ratio(NamedTuple):
    """A ratio of two times, paired round by round: its median, 20th and 80th percentile."""

    ratio: float
    p20: float
    p80: float
    repeats: int


def ratio(ours: Sequence[float], against: Sequence[float]) -> Ratio:
    """Divide the times of one variant by those of another in the same rounds."""
    values = [mine / theirs for mine, theirs in zip(ours, against, strict=True)]
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Ratio(round(statistics.median(values), 4), round(p20, 4), round(p80, 4), len(values))


def _time_cpu(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1e3


def _time_cuda(run: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # About 2 ms in which the host runs ahead: the time is the device's own, without gaps between launches.
    torch.cuda._sleep(4_000_000)
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
