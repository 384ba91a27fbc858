"""The benchmarks of the system run, and their rows say what a reader needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.system import in_run

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_the_benchmark_of_a_step_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    small = "--hidden 64 --layers 1 --vocabulary 64 --batch 4 --length 144 --target-rows 2 --repeats 2"
    monkeypatch.setattr("sys.argv", ["in_run", *small.split(), "--json", str(out)])
    in_run.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for method in ("lora", "full"):
        mine = {row["provider"]: row for row in rows if row["mode"] == method}
        assert mine["plain step"]["ratio"] == 1.0
        assert all(row["median_ms"] > 0 for row in mine.values())
        assert {"bare hooks", "per-sample gradients materialised"} < set(mine)
        assert any(name.startswith("refresh") and row["amortised"] > 0 for name, row in mine.items())


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_committed_rows_name_machine_versions_commit_and_date(path: Path) -> None:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert {"op", "machine", "versions", "commit", "date"} <= set(row)
