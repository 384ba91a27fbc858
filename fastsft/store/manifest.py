"""What a store holds: one manifest.json a folder, replaced whole whenever a shard is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from fastsft.ops._rows import check_format
from fastsft.record import versions
from fastsft.store._files import StoreError, checksum, write_whole

SCHEMA = 1
KIND = "fastsft sketch store"
NAME = "manifest.json"
# Equal in all parts of one store, and in stores that are merged: without it their rows can't be compared.
IDENTITY = ("spec", "format", "size", "blocks", "block_names", "model")


class Settings(TypedDict):
    """What the caller says of a store, see `StoreWriter.create`."""

    spec: Mapping[str, Any]
    size: int
    format: str
    sources: Sequence[str]
    model: Mapping[str, Any]
    blocks: NotRequired[int | Sequence[str]]
    about: NotRequired[Mapping[str, Any]]
    shard_rows: NotRequired[int]


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard. `digest` is its header's checksum; the header holds the checksums of the sections."""

    file: str
    rows: int
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Another file of the store, such as the factors of a whitening."""

    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json."""

    spec: dict[str, Any]
    format: str
    size: int
    blocks: int
    block_names: list[str]
    sources: list[str]
    model: dict[str, Any]
    about: dict[str, Any]
    shard_rows: int
    created: str
    versions: dict[str, str]
    # False until the writer is closed: rows may be missing.
    complete: bool = False
    shards: list[ShardEntry] = field(default_factory=list)
    files: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Digest what must be equal in every shard; equal settings give equal bytes on disk."""
        return checksum(_canonical({"schema": SCHEMA} | {name: getattr(self, name) for name in IDENTITY}))

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def save(self, folder: Path) -> None:
        body = {"kind": KIND, "schema": SCHEMA} | asdict(self)
        text = json.dumps(body | {"checksum": checksum(_canonical(body))}, indent=1, ensure_ascii=False)
        write_whole(folder / NAME, [text.encode()])


def new_manifest(
    *,
    spec: Mapping[str, Any],
    size: int,
    format: str,
    sources: Sequence[str],
    model: Mapping[str, Any],
    blocks: int | Sequence[str] = 1,
    about: Mapping[str, Any] | None = None,
    shard_rows: int = 8192,
) -> Manifest:
    """Check the caller's settings and make the manifest of an empty store."""
    names = [] if isinstance(blocks, int) else list(blocks)
    num_blocks = blocks if isinstance(blocks, int) else len(names)
    check_format(format, size, num_blocks)
    for argument, value in (("sources", sources), ("blocks", names)):
        if isinstance(value, str) or not all(isinstance(name, str) for name in value) or len({*value}) < len(value):
            raise ValueError(f"`{argument}` must be a list of different names: got {value!r}.")
    if not sources:
        raise ValueError("`sources` must name at least one source: every row belongs to one.")
    if shard_rows < 1:
        raise ValueError(f"`shard_rows` must be at least 1: got {shard_rows}.")
    return Manifest(
        spec=_plain("spec", spec),
        format=format,
        size=size,
        blocks=num_blocks,
        block_names=names,
        sources=list(sources),
        model=_plain("model", model),
        about=_plain("about", about or {}),
        shard_rows=shard_rows,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def is_store(folder: str | Path) -> bool:
    """Say whether a store was begun in this very folder: then `StoreWriter.resume` goes on with it."""
    return (Path(folder) / NAME).exists()


def load_manifest(folder: Path) -> Manifest:
    """Read a store's manifest and check its kind, schema and checksum."""
    path = folder / NAME
    try:
        body = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{folder} is not a store: it has no {NAME}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not JSON ({error}): the file was damaged. {_REPAIR}") from None
    if not isinstance(body, dict) or body.get("kind") != KIND:
        raise StoreError(f"{path} is not the manifest of a sketch store: its kind is not {KIND!r}.")
    if body.get("schema") != SCHEMA:
        raise StoreError(
            f"{path} has schema {body.get('schema')!r}, this fastsft reads schema {SCHEMA}. "
            f"Read it with the fastsft that wrote it."
        )
    said = body.pop("checksum", None)
    if checksum(_canonical(body)) != said:
        raise StoreError(f"{path} does not have the checksum it states: it was damaged or edited. {_REPAIR}")
    known = {name: body[name] for name in (item.name for item in fields(Manifest))}
    known["shards"] = [ShardEntry(**entry) for entry in known["shards"]]
    known["files"] = {name: FileEntry(**entry) for name, entry in known["files"].items()}
    return Manifest(**known)


def difference(ours: Any, theirs: Any, name: str) -> str | None:
    """Name the first field in which two values of JSON differ, with both values; None where they are equal."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if found := difference(ours.get(key), theirs.get(key), f"{name}.{key}"):
                return found
        return None
    return None if ours == theirs else f"{name} = {ours!r} against {theirs!r}"


def check_same(ours: Manifest, theirs: Manifest, names: Sequence[str], where: str, way_out: str) -> None:
    """Refuse two manifests that differ in one of the fields `names`."""
    for name in names:
        if found := difference(getattr(ours, name), getattr(theirs, name), name):
            raise StoreError(f"{where} differ in {found}. {way_out}")


def check_comparable(manifests: Mapping[Path, Manifest], way_out: str) -> None:
    """Refuse stores whose rows can't stand in one: of another identity, or with another file of the same name."""
    (first, ours), *others = manifests.items()
    files = dict(ours.files)
    for path, theirs in others:
        where = f"{first} and {path}"
        check_same(ours, theirs, IDENTITY, where, way_out)
        for name, entry in theirs.files.items():
            if files.setdefault(name, entry) != entry:
                raise StoreError(f"{where} differ in the file {name!r} (their digests differ). {way_out}")


_REPAIR = "Copy it again from where it was written, or write the store again."


def _plain(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be made of what JSON can hold: {error}.") from None


def _canonical(body: Any) -> bytes:
    # By way of JSON: a dataclass and what was read back must give the same bytes.
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
