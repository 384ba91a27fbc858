"""Write README's benchmark tables from committed rows: `python -m benchmarks.table [--readme FILE]`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is aims, rivals, gpu, lds, mixing, gated or
forgetting. Only rows in benchmarks/results/ are read: aims_cpu.jsonl, rivals_*.jsonl with system_index_build_cpu.jsonl,
gpu_*.jsonl, lds_*.jsonl, mixing_*.jsonl, ops_gated_adapter_*.jsonl, forgetting.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "Not measured.\n"
# of the table of LDS, in order
SETTINGS = {"lora": "LoRA", "full": "full", "short": "short LoRA run"}
_TABLE = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Row = dict[str, Any]


def read_rows(results: Path, pattern: str) -> list[Row]:
    """Read the rows of every file of that name, in order of names."""
    return [json.loads(line) for path in sorted(results.glob(pattern)) for line in path.read_text().splitlines()]


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    table = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def signature(rows: list[Row]) -> str:
    """Say where and with what the rows of a table were measured, each machine once."""
    places = sorted({f"{row['machine']}; torch {row['versions']['torch']}; {row['date']}" for row in rows})
    return "".join(f"\nMeasured on {place}.\n" for place in places)


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.0f} {unit}" if unit else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def aims_table(results: Path) -> str:
    """Every aim: what, against what, the ratio with its 20th and 80th percentile, the aim, and whether it was met."""
    rows = read_rows(results, "aims_cpu.jsonl")
    if not rows:
        return NOT_MEASURED
    lines = []
    for row in rows:
        unit = row["unit"]
        spread = f"{number(row['ratio'], unit)} ({number(row['p20'], unit)} to {number(row['p80'], unit)})"
        met = {None: "", True: "met", False: "**not met**"}[row["met"]]
        lines.append([row["what"], row["against"], spread, number(row["aim"], unit), met])
    return markdown(["what", "against", "ratio", "aim", ""], lines) + signature(rows)


def rivals_table(results: Path) -> str:
    """Index builds of ourselves and rivals as ratios to the same training step, and scans to the same torch scan."""
    ours = read_rows(results, "system_index_build_cpu.jsonl")
    rivals = read_rows(results, "rivals_*.jsonl")
    if not rivals:
        return NOT_MEASURED
    lines = []
    for row in sorted([*ours, *rivals], key=lambda row: (row["case"], row.get("shape", ""))):
        name = row.get("rival", row["provider"])
        if "error" in row:
            lines.append([row["case"], name, f"does not run here: {row['error']}", "", "", ""])
            continue
        label = row.get("what", row["provider"])
        if row["case"] == "scan":
            ratios = [number(row["to_torch_bf16"]["ratio"]), ""]
            label = f"{row['provider']}, {row['shape']}"
        else:
            ratios = [number(row["to_sorted_step"]["ratio"]), number(row["to_random_step"]["ratio"])]
            rows_used = row.get("shape", "").split(",")[0].removeprefix("N")
            label += f", {rows_used} rows" if rows_used else ""
        if "rival" in row:
            label = f"{name}: {label}"
        extra = row.get("extra_peak_mib")
        stored = row.get("bytes_a_sample")
        lines.append([row["case"], label, *ratios, number(extra, "MiB"), "" if stored is None else f"{stored} B"])
    head = ["case", "provider", "to the sorted step (scan: to torch bf16)", "to the random-order step"]
    return markdown([*head, "extra peak memory", "bytes a sample"], lines) + signature([*ours, *rivals])


def gpu_table(results: Path) -> str:
    """Every GPU case: median, floor and share of it, ratio to the step it is part of, aim, and whether it was met."""
    rows = read_rows(results, "gpu_*.jsonl")
    if not rows:
        return NOT_MEASURED
    lines = []
    for row in rows:
        details = [str(row[key]) for key in ("format", "dtype") if key in row]
        details += [f"Q={row['queries']}"] if "queries" in row else []
        aim, limit, value = "", row.get("aim_ms") or row.get("aim"), row["median_ms"]
        if row.get("aim"):
            aim, value = f"{limit:.2f} of the step", row["ratio"]
        elif limit:
            aim = f"{limit:.2f} ms"
        met = "" if not limit else "met" if value <= limit else "**not met**"
        floor, share = row.get("floor_ms"), row.get("share_of_floor")
        spread = f"{row['median_ms']:.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})"
        of_floor = "" if floor is None else f"{floor:.3f} ms, {100 * share:.0f} %"
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        lines.append([" ".join([row["case"], *details]), row["provider"], spread, of_floor, ratio, aim, met])
    head = ["case", "provider", "median", "floor, share reached", "of the layer's step", "aim", ""]
    return markdown(head, lines) + signature(rows)


def lds_table(results: Path) -> str:
    """Every method's LDS with its 95 % interval, its share of the ceiling and what it is above BM25, by setting."""
    rows = [row for row in read_rows(results, "lds_*.jsonl") if row["setting"] in SETTINGS]
    ceilings = {row["setting"]: row for row in rows if row["method"] == "ceiling"}
    settings = [setting for setting in SETTINGS if setting in ceilings]
    if not settings:
        return NOT_MEASURED
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["method"] != "ceiling":
            name = f"{row['method']} ({row['provider']})" if "provider" in row else row["method"]
            if row.get("per") == "ability":
                name += " (by ability)"
            found.setdefault(name, {})[row["setting"]] = row
    # by the first setting; what was not measured there comes last
    order = sorted(found, key=lambda name: [-_mean(found[name].get(setting)) for setting in settings])
    lines = [[name, *(cell for setting in settings for cell in _lds_cells(found[name].get(setting)))] for name in order]
    head = ["method"]
    for setting in settings:
        head += [f"{SETTINGS[setting]}: LDS (95 %)", "of ceiling", "minus BM25"]
    about = "".join(_lds_setting(ceilings[setting]) for setting in settings)
    return f"{about}\n{markdown(head, lines)}{signature(rows)}"


def _lds_setting(row: Row) -> str:
    """Say what a setting's truth was measured on."""
    return (
        f"- {SETTINGS[row['setting']]}: {row['samples']} samples, {row['queries']} queries, {row['subsets']} subsets "
        f"with {row['seeds']} seeds; ceiling {between(row['lds'])}; training took {row['loss_drop']:.2f} nats a token "
        f"off the queries' loss\n"
    )


def _lds_cells(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    above = "" if row["minus_bm25"] is None else between(row["minus_bm25"], "+.2f")
    # nan where the seeds are too few to tell a ceiling
    share = row["of_ceiling"]
    return [between(row["lds"]), "" if share is None or math.isnan(share) else f"{100 * share:.0f} %", above]


def _mean(row: Row | None) -> float:
    return -2.0 if row is None else row["lds"][0]


def between(value: list[float], form: str = ".2f") -> str:
    """Write a mean with the ends of its interval."""
    mean, low, high = (format(each, form) for each in value)
    return f"{mean} ({low} to {high})"


def mixing_table(results: Path) -> str:
    """Every arm's mean loss against uniform's and its share of the gap to the oracle, by setting."""
    rows = read_rows(results, "mixing_*.jsonl")
    return mixing_summary(rows) + signature(rows) if rows else NOT_MEASURED


def mixing_summary(rows: list[Row]) -> str:
    """A line an arm, a column a setting: its loss against uniform's in per cent, and its share of the gap."""
    cases = {row["case"]: row for row in rows if row["provider"] == "uniform"}
    found = {(row["provider"], row["case"]): row for row in rows}
    arms = dict.fromkeys(row["provider"] for row in rows)
    lines = [[arm, *(_mixing_cell(found.get((arm, case))) for case in cases)] for arm in arms]
    about = "".join(_mixing_setting(row, found.get(("oracle", case))) for case, row in cases.items())
    return f"{about}\n{markdown(['arm', *(_short(case) for case in cases)], lines)}"


def mixing_details(rows: list[Row]) -> str:
    """A table for each setting: what every arm reached, what it cost, how far its mix moved."""
    head = ["arm", "mean loss", "minus uniform (95 %)", "of the gap (95 %)", "worst ability", "most lost",
            "tokens to uniform's loss", "a step against uniform's", "path"]  # fmt: skip
    tables = []
    for case in dict.fromkeys(row["case"] for row in rows):
        lines = [_mixing_line(row) for row in rows if row["case"] == case]
        tables.append(f"### {_short(case)}\n\n{markdown(head, lines)}")
    return "\n".join(tables)


def _mixing_setting(uniform: Row, oracle: Row | None) -> str:
    """Say what uniform reached, and where the oracle was found."""
    text = f"- {_short(uniform['case'])}: uniform ends at {_average(uniform['loss']):.3f} nats a token"
    if oracle is None:
        return f"{text}, {len(uniform['seeds'])} seeds; no oracle was searched for\n"
    mix = ", ".join(f"{source} {100 * share:.0f} %" for source, share in oracle["mix"].items() if share > 0)
    return (
        f"{text}, the oracle at {_average(oracle['loss']):.3f}, {len(uniform['seeds'])} seeds; it is the best of "
        f"{oracle['search']['runs']} runs on other seeds: {mix}\n"
    )


def _mixing_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["provider"] == "uniform":
        return f"{_average(row['loss']):.3f}"
    mean, low, high = (100 * value for value in row["relative"])
    share = "" if row["closed"] is None or row["provider"] == "oracle" else f"; {100 * row['closed'][0]:.0f} % of gap"
    return f"{mean:+.1f} % ({low:+.1f} to {high:+.1f}){share}"


def _mixing_line(row: Row) -> list[str]:
    reached = sorted(math.inf if value is None else value for value in row["to_uniform"])
    middle = reached[len(reached) // 2]
    return [
        row["provider"],
        f"{_average(row['loss']):.3f}",
        between(row["minus_uniform"], "+.3f"),
        "" if row["closed"] is None else between(row["closed"]),
        f"{_average(row['worst']):.3f}",
        f"{_average(row['lost']):+.3f}",
        "not reached" if middle == math.inf else f"{100 * middle:.0f} %",
        "" if row["overhead"] is None else f"{row['overhead']:.2f}",
        f"{_average(row['path_length']):.2f}",
    ]


def gated_table(results: Path) -> str:
    """Each way to compute a layer with gated experts: time over the frozen layer's, over its FLOPs', and memory."""
    rows = read_rows(results, "ops_gated_adapter_*.jsonl")
    if not rows:
        return NOT_MEASURED
    by_key = {(row["shape"], row["dtype"], row["provider"], row["mode"]): row for row in rows}
    lines = []
    for shape, dtype, provider in dict.fromkeys(key[:3] for key in by_key):
        forward, both = (by_key[shape, dtype, provider, mode] for mode in ("forward", "forward+backward"))
        loop = by_key[shape, dtype, "peft loop", "forward+backward"]
        lines.append(
            [
                shape if dtype == "float32" else f"{shape} {dtype}",
                provider,
                *(f"{row['ratio_to_reference']:.2f} ({row['ratio_to_flops']:.2f})" for row in (forward, both)),
                f"{loop['ratio_to_reference'] / both['ratio_to_reference']:.1f}",
                f"{both['saved_bytes'] / 2**20:.2f} MiB",
                f"{both['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in both else "",
            ]
        )
    head = [
        "shape",
        "provider",
        "forward, to the base (and to FLOPs)",
        "forward+backward",
        "times as fast as the peft loop",
        "kept for backward",
        "peak",
    ]
    return markdown(head, lines) + signature(rows)


def forgetting_table(results: Path) -> str:
    """Losses of tasks learnt in turn, mean and range over seeds."""
    rows = read_rows(results, "forgetting.jsonl")
    if not rows:
        return NOT_MEASURED
    arms: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        arms.setdefault((row["setting"], row["arm"]), []).append(row)

    def spread(own: list[Row], key: str) -> str:
        values = [row[key] for row in own]
        return f"{_average(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    columns = ("first_when_learnt", "first_at_the_end", "mean_at_the_end", "forgotten")
    lines = [
        [setting, arm, f"{own[0]['learning_rate']:g}", *(spread(own, key) for key in columns)]
        for (setting, arm), own in arms.items()
    ]
    head = [
        "tasks",
        "arm",
        "learning rate",
        "first task when learnt",
        "first task at the end",
        "all three at the end",
        "forgotten of the first two",
    ]
    return markdown(head, lines) + signature(rows)


def _average(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _short(case: str) -> str:
    return case.removeprefix("world:")


TABLES: dict[str, Callable[[Path], str]] = {
    "aims": aims_table,
    "rivals": rivals_table,
    "gpu": gpu_table,
    "lds": lds_table,
    "mixing": mixing_table,
    "gated": gated_table,
    "forgetting": forgetting_table,
}


def rewrite(text: str, results: Path = RESULTS) -> str:
    """Put each marked table's present contents into `text`; what is outside markers stays as it is."""

    def table(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}: the markers know {', '.join(TABLES)}.")
        return f"{opening}{TABLES[name](results)}{closing}"

    if text.count("<!-- table:") != len(_TABLE.findall(text)):
        raise ValueError("a `<!-- table:NAME -->` line has no `<!-- /table -->` after it: close it.")
    return _TABLE.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write README's tables from the committed rows.")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    text = args.readme.read_text()
    if "<!-- table:" not in text:
        raise SystemExit(f"{args.readme} marks no table: add `<!-- table:aims -->` and `<!-- /table -->` lines.")
    args.readme.write_text(rewrite(text))


if __name__ == "__main__":
    main()
