"""Test an operator, then time it: `python -m benchmarks.verify influence_dot`. No timing on red.

--device cuda   test and time there         --out rows.jsonl   keep the rows
"""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT, signed, write_rows


def green(op: str, device: str) -> bool:
    """Run the operator's tests."""
    files = sorted(str(file) for file in (ROOT / "tests/ops").glob(f"test_{op}*.py"))
    env = os.environ | {"FASTSFT_TEST_DEVICE": device, "FASTSFT_REQUIRE_NATIVE": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, env=env).returncode == 0


def main() -> None:
    ops = sorted(file.stem.removeprefix("bench_") for file in (Path(__file__).parent / "ops").glob("bench_*.py"))
    parser = argparse.ArgumentParser(description="Test an operator, then time it.")
    parser.add_argument("op", choices=ops)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not green(arguments.op, arguments.device):
        raise SystemExit(f"The tests of {arguments.op} are red: nothing is timed.")
    rows = signed(
        importlib.import_module(f"benchmarks.ops.bench_{arguments.op}").race(arguments.device), arguments.device
    )
    for row in rows:
        yardstick = f"  torch.mm's rate: {row['at_mm_rate_ms']:.3f} ms" if "at_mm_rate_ms" in row else ""
        print(
            f"{row['case']:20} {row['mode']:16} {row['provider']:16} {row['median_ms']:9.3f} ms "
            f"[{row['p20_ms']:.3f}, {row['p80_ms']:.3f}]  {row['ratio_to_reference']:.2f} of reference{yardstick}"
        )
    if arguments.out:
        write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
