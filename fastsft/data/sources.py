"""Sources: where the rows of a mix or a target come from, and how they are refused.

A source is a file (jsonl, jsonl.gz, jsonl.zst, parquet) or a `datasets` hub id, read whole into samples.
"""

import difflib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fastsft.data.samples import DataError, Sample, nearest

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*?)(?::(?P<split>[\w.\[\]:%-]+))?")


def read_source(
    name: str,
    path: str | Path,
    *,
    ability: str | None = None,
    limit: int | None = None,
    where: dict[str, Any] | None = None,
    root: Path | None = None,
) -> list[Sample]:
    """Read one source into samples of that name, in file order.

    `path` is a file or a hub id "org/name" or "org/name:split" (split "train" if none is named).
    A relative path is looked up under `root`, then FASTSFT_DATA, then the current folder.
    `where` keeps the rows whose fields equal these values; `limit` then keeps the first so many, and nothing after
    them is read or checked.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"`limit` of source {name!r} must be a whole number of rows, at least 1; got {limit!r}.")
    origin, rows = _open_rows(name, path, root)
    samples: list[Sample] = []
    row_of: dict[str, int] = {}
    num_seen = 0
    for number, row in rows:
        num_seen += 1
        place = f"{origin}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be an object with fields, got {type(row).__name__}.")
        if where and not _matches(row, where, place):
            continue
        sample = Sample.from_row(row, source=name, ability=ability, where=place)
        if sample.id in row_of:
            raise DataError(_twice(sample.id, origin, row_of[sample.id], number, has_id=row.get("id") is not None))
        row_of[sample.id] = number
        samples.append(sample)
        if len(samples) == limit:
            break
    if not samples:
        left = f"none of its {num_seen} rows has {where}; loosen `where`" if num_seen else "add rows to it"
        raise DataError(f"{origin}: source {name!r} has no rows: {left}, or take the source out.")
    return samples


def check_unique(samples: Iterable[Sample]) -> None:
    """Refuse two samples of one id, naming both sources: influence is booked by id."""
    first: dict[str, Sample] = {}
    for sample in samples:
        other = first.setdefault(sample.id, sample)
        if other is not sample:
            same = "with the same content" if other.messages == sample.messages else "with different content"
            raise DataError(
                f"id {sample.id!r} appears in source {other.source!r} and in source {sample.source!r}, {same}; "
                f"ids must be unique over all sources. Drop one of the rows, or give each an id of its own."
            )


def file_digest(path: str | Path) -> str:
    """Hash a file's bytes: sha256, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_file(path: str | Path, root: Path | None = None) -> Path:
    """Find the file of a source, or say where it was looked for and what lies near."""
    places = _places(Path(path).expanduser(), root)
    for place in places:
        if place.is_file():
            return place
    looked = "; ".join(_describe_missing(place) for place in places)
    raise DataError(
        f"{path}: no such file. Looked for {looked}. Correct the path, or set `root` or FASTSFT_DATA to its folder."
    )


def _open_rows(name: str, path: str | Path, root: Path | None) -> tuple[str, Iterator[tuple[int, Any]]]:
    hub = _HUB_ID.fullmatch(str(path))
    is_there = any(place.exists() for place in _places(Path(path).expanduser(), root))
    if hub and not is_there and not str(path).endswith((*_SUFFIXES, ".json", ".csv", ".txt", ".gz", ".zst")):
        return f"hub dataset {path}", _hub_rows(hub["name"], hub["split"] or "train", name)
    file = find_file(path, root)
    if file.suffix == ".parquet":
        return str(file), _parquet_rows(file)
    if not file.name.endswith(_SUFFIXES):
        raise DataError(
            f"{file}: source {name!r} must be one of {', '.join(_SUFFIXES)}, got {file.suffix or 'no suffix'!r}; "
            f"convert it to one JSON object a line."
        )
    return str(file), _jsonl_rows(file)


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _open_bytes(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(line, f"{file}, row {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _broken(file, number, error) from error
    except OSError as error:
        # pyarrow reports a torn zstd stream as a bare OSError; one with an errno is the system's own (permission).
        if error.errno is not None:
            raise
        raise _broken(file, number, error) from error


def _open_bytes(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix == ".zst":
        import io

        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return open(file, "rb")


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not JSON ({error.msg} at column {error.colno}); a jsonl file has one JSON object on each line. "
            f"Mend or remove the line."
        ) from error


def _broken(file: Path, number: int, error: Exception) -> DataError:
    return DataError(
        f"{file}: the compressed data breaks off or is damaged after row {number} ({error}); "
        f"download or write the file again."
    )


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a parquet file ({error}); write it again.") from error
    with table:
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _hub_rows(hub_id: str, split: str, name: str) -> Iterator[tuple[int, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"source {name!r}: {hub_id} is no file, so it is taken as a hub id, which needs the `datasets` package; "
            f"`pip install datasets`, or correct the path."
        ) from error
    try:
        dataset = datasets.load_dataset(hub_id, split=split)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise DataError(
            f"source {name!r}: {hub_id} is no file here, and as a hub id its split {split!r} cannot be loaded "
            f"({type(error).__name__}: {error}). Correct the path, the id or the split (org/name:split), "
            f"or save the split as a jsonl file."
        ) from error
    yield from enumerate(dataset, start=1)


def _matches(row: dict[str, Any], where: dict[str, Any], place: str) -> bool:
    for field in where:
        if field not in row:
            raise DataError(
                f'{place}: no field "{field}" to filter by with `where`; {nearest(field, list(row))}. '
                f"Name a field that every row has."
            )
    return all(row[field] == value for field, value in where.items())


def _twice(sample_id: str, origin: str, first: int, second: int, *, has_id: bool) -> str:
    if has_id:
        return f"{origin}: rows {first} and {second} both have the id {sample_id!r}; give one of them another id."
    return (
        f"{origin}: rows {first} and {second} have the same content and no id, so both would be {sample_id!r}; "
        f"remove one of them, or give each an id."
    )


def _places(path: Path, root: Path | None) -> list[Path]:
    if path.is_absolute():
        return [path]
    roots = [root, os.environ.get("FASTSFT_DATA"), Path.cwd()]
    return list(dict.fromkeys(Path(folder) / path for folder in roots if folder))


def _describe_missing(place: Path) -> str:
    if place.is_dir():
        return f"{place} (a folder: name one file in it, such as {_first_names(place)})"
    missing = place
    while not missing.parent.is_dir():
        missing = missing.parent
    near = difflib.get_close_matches(missing.name, [entry.name for entry in missing.parent.iterdir()], n=1, cutoff=0.5)
    return f"{place}" + (f" (in {missing.parent} the nearest name is {near[0]!r})" if near else "")


def _first_names(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:3]) or "nothing"
