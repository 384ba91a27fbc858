"""What an index of per-sample gradient sketches costs: `python -m benchmarks.system.index_build --json FILE`.

Every row of maths and code once through `sketch_samples` into a bf16 store, against a pass of plain training steps
over the same rows in length-sorted and in random batches, interleaved, one thread. `benchmarks.rivals.run` races the
rivals against the same steps.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.harness import ratio, rounds, signed, write_rows
from benchmarks.memory import extra_peak
from benchmarks.system.index_case import BATCH_TOKENS, IndexCase, load_case, load_model, training_step
from benchmarks.system.index_data import write_case
from fastsft.data import Row
from fastsft.sketch import SketchSpec, sketch_samples
from fastsft.store import StoreWriter


def rows_of(case: IndexCase) -> list[Row]:
    return [Row(line.id, line.source, line.input_ids, line.labels) for line in case.rows]


def build(
    model: nn.Module, rows: Sequence[Row], pad_id: int, spec: SketchSpec, folder: Path, whitening: Any = None
) -> int:
    """Sketch every row into a new bf16 store -> its bytes."""
    writer = StoreWriter.create(
        folder,
        spec=spec.as_dict(),
        size=spec.size,
        format="bf16",
        blocks=1,
        sources=sorted({row.source for row in rows}),
        model={"name": "index case", "digest": "none"},
    )
    for batch in sketch_samples(model, rows, spec, whitening=whitening, max_tokens=BATCH_TOKENS, pad_id=pad_id):
        writer.append(batch.sketches, ids=batch.ids, sources=batch.sources, tokens=batch.tokens)
    writer.close()
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def builder(case: IndexCase, spec: SketchSpec, place: Path, whitening: Any = None) -> Callable[[], int]:
    """Build the case's index again at every call, in a new folder under `place`."""
    model, rows = load_model(case), rows_of(case)
    numbers = itertools.count()
    return lambda: build(model, rows, case.pad_id, spec, place / f"store-{next(numbers)}", whitening)


def prepare(folder: str, method: str, size: int, place: str) -> Callable[[], object]:
    """What `memory.extra_peak` runs in a process of its own; `size` 0 is the sorted training step."""
    case = load_case(Path(folder), method)
    return builder(case, SketchSpec(size=size), Path(place)) if size else training_step(case, "sorted")


def race(folder: Path, method: str, size: int, repeats: int) -> dict[str, object]:
    case = load_case(folder, method)
    with tempfile.TemporaryDirectory() as place:
        ours = builder(case, SketchSpec(size=size), Path(place))
        steps = {order: training_step(case, order) for order in ("sorted", "random")}
        times = rounds({"ours": ours, **steps}, repeats=repeats, warmup=1)
        stored = ours()
        peaks = [
            extra_peak("benchmarks.system.index_build:prepare", **_told(folder, method, each, Path(place) / "peak"))
            for each in (size, 0)
        ]
    return {
        "op": "system.index_build",
        "case": f"index_{method}",
        "shape": case.shape,
        "provider": f"fastsft, SJLT K={size}, bf16 store",
        **{f"to_{order}_step": ratio(times["ours"], times[order])._asdict() for order in steps},
        "extra_peak_mib": round(peaks[0] / 2**20, 1),
        "step_extra_peak_mib": round(peaks[1] / 2**20, 1),
        "bytes_a_sample": round(stored / len(case.rows)),
    }


def _told(folder: Path, method: str, size: int, place: Path) -> dict[str, Any]:
    return {"folder": str(folder), "method": method, "size": size, "place": str(place)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the build of an index against a training step.")
    parser.add_argument("--json", type=Path, help="keep the rows here, as JSON lines")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = write_case(Path(folder), args.rows)
        measured = [race(Path(folder), method, args.size, args.repeats) for method in args.methods]
    rows = signed([row | {"model": name} for row in measured])
    for row in rows:
        print(row["case"], row["provider"], row["to_sorted_step"], row["to_random_step"])
        peaks = f"extra peak {row['extra_peak_mib']} MiB (of the sorted step: {row['step_extra_peak_mib']})"
        print(f"   {peaks}, {row['bytes_a_sample']} bytes a sample")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
