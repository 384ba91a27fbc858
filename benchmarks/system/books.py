"""How well the books balance: `python -m benchmarks.system.books --json FILE`.

The run of examples/real.yaml, and the demo, at several refresh intervals. Per ability: the unexplained share of the
gross flow, the same with gradients from interval starts alone, and how far samples miss their sources' entries.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, signed, write_rows
from fastsft.report import summarize
from fastsft.train import load_config, run
from fastsft.train.demo import demo


def real(every: int, steps: int, target_rows: int, out: Path) -> dict[str, Any]:
    config = load_config(ROOT / "examples" / "real.yaml")
    targets = {name: dataclasses.replace(given, limit=target_rows) for name, given in config.targets.items()}
    train = dataclasses.replace(config.train, steps=steps, save_every=10**6)
    attribution = dataclasses.replace(config.attribution, refresh_every=every)
    config = dataclasses.replace(config, targets=targets, train=train, attribution=attribution, out=str(out))
    run(config)
    return summarize(out)


def rows_of(name: str, every: int, summary: dict[str, Any]) -> list[dict[str, object]]:
    shares = ("residual_share", "start_only_share", "samples_share")
    return [
        {
            "op": "system.books",
            "case": name,
            "refresh_every": every,
            "steps": summary["steps"],
            "ability": ability,
            "measured": entry["measured"],
            "gross": sum(abs(value) for value in entry["by_source"].values()),
            **{share: entry[share] for share in shares},
        }
        for ability, entry in summary["ledger"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the books leave unexplained.")
    parser.add_argument("--json", type=Path, help="keep the rows here, as JSON lines")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 10, 20])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--target-rows", type=int, default=16)
    parser.add_argument("--cases", nargs="+", default=["real", "demo"], choices=["real", "demo"])
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for case in args.cases:
        for every in args.every:
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "run"
                if case == "real":
                    summary = real(every, args.steps, args.target_rows, out)
                else:
                    summary = summarize(demo(out, quick=True, refresh_every=every).record.out)
                rows += rows_of(case, every, summary)
    rows = signed(rows)
    print("case  refresh  ability        unexplained  from starts alone  samples against sources (share of gross flow)")
    for row in rows:
        shares = [100 * float(str(row[key])) for key in ("residual_share", "start_only_share", "samples_share")]
        place = f"{row['case']!s:5} {row['refresh_every']!s:>7}  {row['ability']!s:13}"
        print(f"{place} {shares[0]:9.2f} % {shares[1]:16.2f} % {shares[2]:10.2f} %")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
