"""One run as replayable data: a folder with an append-only list of events and tables beside it.

A run directory holds `config.yaml`, `record.jsonl` (one event a line), `samples.parquet` (the text of the
samples), `influence/*.parquet` (who moved what, see `INFLUENCE_COLUMNS`), and what is made from them:
`report.html`, `report.json`. Rooms write here and read from here; they do not import each other.

Events, all with `event` and `step` (the number of optimizer steps taken when it was written):

- `start`: schema, abilities, sources, settings, versions, seed, optimizer, model, data digests
- `step`: loss, lr, scale (what the trainer multiplied the captured gradient by: clipping, loss scale),
  identity_error, documents and tokens drawn per source
- `refresh`: loss and error per ability at these weights, gram and norms of their gradients (see `TargetState`), seconds
- `mix`: a policy's decision: weights, before, the draw and the step from which they hold, signal, error, why
- `conflict`: what a resolver saw (gram, cosines) and what each ability's gradient is multiplied by since (factors)
- `interval`: `from`, `to` and one entry per ability (see `fastsft.attribution.ledger`)
- `note`: a sentence a reader should see; `resume`; `end`
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = 1

# phi in nats per response token of the ability; negative lowers the ability's loss, so it helps
INFLUENCE_COLUMNS = {
    "step": pa.int32(),
    "sample_id": pa.string(),
    "source": pa.string(),
    "ability": pa.string(),
    "phi": pa.float32(),
}
SAMPLE_COLUMNS = {"id": pa.string(), "source": pa.string(), "prompt": pa.string(), "response": pa.string()}


class RecordError(ValueError):
    """A run directory that can't be read or must not be written, with the file and the way out."""


class Record:
    """Open the run directory `out`: append events, read them back, drop what a resume will do again."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)

    @property
    def path(self) -> Path:
        return self.out / "record.jsonl"

    @classmethod
    def create(cls, out: str | Path) -> Record:
        """Make a new run directory; one that already holds a run is refused."""
        record = cls(out)
        if record.path.exists():
            raise RecordError(
                f"{record.path} already holds a run. Choose another `out`, resume it, or delete the folder."
            )
        record.out.mkdir(parents=True, exist_ok=True)
        return record

    @classmethod
    def open(cls, out: str | Path) -> Record:
        """Open an existing run directory and check its schema."""
        record = cls(out)
        if not record.path.exists():
            raise RecordError(f"{record.out} is not a run directory: it has no record.jsonl.")
        start = record.start
        if start.get("schema") != SCHEMA:
            raise RecordError(
                f"{record.path} has schema {start.get('schema')}, this fastsft reads schema {SCHEMA}. "
                f"Read it with the fastsft that wrote it ({start.get('versions', {}).get('fastsft', 'unknown')})."
            )
        return record

    def append(self, event: str, step: int, **fields: Any) -> None:
        """Add one event; it is on disk when this returns."""
        self.append_all([{"event": event, "step": step, **fields}])

    def append_all(self, events: Iterable[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(_finite(event), ensure_ascii=False) + "\n" for event in events)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def events(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the events in order. A last line cut off by a kill is left out; a bad one before it is an error."""
        lines = self.path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                event = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    return
                raise RecordError(
                    f"{self.path} line {number} is not JSON ({error.msg}): the file was damaged."
                ) from None
            if kind is None or event["event"] == kind:
                yield event

    @property
    def start(self) -> dict[str, Any]:
        for event in self.events("start"):
            return event
        raise RecordError(f"{self.path} has no start event: the run was killed before its first step. Start it again.")

    def truncate(self, step: int) -> None:
        """Forget everything after `step`: a run resumed from that step's checkpoint writes it again."""
        kept = [event for event in self.events() if event["step"] <= step and event["event"] != "end"]
        write_text(self.path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))
        for part in self.influence_parts():
            if _part_end(part) > step:
                part.unlink()

    # tables

    def influence_parts(self) -> list[Path]:
        return sorted((self.out / "influence").glob("steps-*.parquet"))

    def write_influence(self, first: int, last: int, columns: Mapping[str, Any], *, rank: int = 0) -> Path:
        """Write the influence of the samples drawn in steps `first`..`last` by this rank as one part."""
        schema = pa.schema(INFLUENCE_COLUMNS)
        if "tokens" in columns:
            schema = schema.append(pa.field("tokens", pa.list_(pa.float32())))
        path = self.out / "influence" / f"steps-{first:08d}-{last:08d}-rank{rank:03d}.parquet"
        return write_table(path, pa.table(dict(columns), schema=schema))

    def influence(self) -> pa.Table:
        """Read all parts: one row per (step, sample, ability)."""
        parts = [read_table(path) for path in self.influence_parts()]
        if not parts:
            return pa.table({name: pa.array([], kind) for name, kind in INFLUENCE_COLUMNS.items()})
        return pa.concat_tables(parts)

    def write_samples(self, rows: Iterable[tuple[str, str, str, str]]) -> Path:
        """Write (id, source, prompt, response) of every training sample."""
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        arrays = [pa.array(list(values), kind) for values, kind in zip(columns, SAMPLE_COLUMNS.values(), strict=True)]
        return write_table(self.out / "samples.parquet", pa.table(arrays, names=list(SAMPLE_COLUMNS)))

    def samples(self) -> pa.Table:
        path = self.out / "samples.parquet"
        if not path.exists():
            return pa.table({name: pa.array([], kind) for name, kind in SAMPLE_COLUMNS.items()})
        return read_table(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN: an undefined number is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _part_end(path: Path) -> int:
    return int(path.name.split("-")[2])


def write_text(path: Path, text: str) -> Path:
    """Write a file whole: to a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def write_table(path: Path, table: pa.Table) -> Path:
    """Write a parquet file whole; parquet pages carry checksums that `read_table` verifies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    pq.write_table(table, temporary, write_page_checksum=True)
    os.replace(temporary, path)
    return path


def read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path} can't be read ({error}). Delete it and resume or repeat the run.") from error


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("fastsft", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
