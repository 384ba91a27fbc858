"""Read a store: rows are mapped, not loaded."""

# N rows, K numbers of a row, M blocks

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fastsft.ops import Rows
from fastsft.store._files import StoreError, file_checksum
from fastsft.store.manifest import NAME, Manifest, check_comparable, difference, load_manifest
from fastsft.store.shard import META, Shard, check_size, join_rows, shard_name


class Store:
    """The rows of one folder, or of its subfolders rank000, rank001, ... one after another. Made by `open`."""

    def __init__(self, path: Path, parts: dict[Path, Manifest], shards: list[Shard]) -> None:
        self.path = path
        self.parts = parts
        self._shards = shards
        # first row of each shard, and the number of all rows
        self._starts = [0, *accumulate(shard.num_rows for shard in shards)]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Store:
        """Open a store, or a folder of stores written by one process each.

        Always checked: schema, manifest, the header of every shard and its size. verify=True also reads every file
        once and compares checksums, and looks for a sample that two parts hold at the same step; verify=False leaves
        the numbers unread (ids and sources are checked when they are first asked for).
        """
        path = Path(path)
        parts = {part: load_manifest(part) for part in find_parts(path)}
        check_comparable(parts, "Parts of one store must be written with the same settings.")
        shards = [shard for part, manifest in parts.items() for shard in open_shards(part, manifest, verify=verify)]
        store = cls(path, parts, shards)
        if verify and len(parts) > 1:
            check_no_sample_twice([store])
        return store

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first part: what all parts have in common."""
        return next(iter(self.parts.values()))

    @property
    def spec(self) -> dict[str, Any]:
        return self.manifest.spec

    @property
    def format(self) -> str:
        return self.manifest.format

    @property
    def size(self) -> int:
        """K."""
        return self.manifest.size

    @property
    def blocks(self) -> int:
        """M."""
        return self.manifest.blocks

    @property
    def model(self) -> dict[str, Any]:
        return self.manifest.model

    @property
    def about(self) -> dict[str, Any]:
        return self.manifest.about

    @property
    def complete(self) -> bool:
        """Say whether every writer was closed."""
        return all(manifest.complete for manifest in self.parts.values())

    @cached_property
    def sources(self) -> list[str]:
        """Return the names of the groups; a row's group number is its source's place in this list."""
        return list(dict.fromkeys(name for manifest in self.parts.values() for name in manifest.sources))

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows start..stop: without a copy where they lie in one shard, else copied together."""
        stop = len(self) if stop is None else stop
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"`start`, `stop` must be a range within the {len(self)} rows: got {start}, {stop}.")
        first, last = bisect_right(self._starts, start) - 1, bisect_right(self._starts, stop - 1) - 1
        here = [(self._shards[number], self._starts[number]) for number in range(first, last + 1)]
        return join_rows([shard.rows(max(start - begin, 0), stop - begin) for shard, begin in here])

    def shards(self) -> Iterator[tuple[int, Rows, Tensor]]:
        """Yield (number of the first row, rows, group of each row int64), shard by shard, mapped."""
        for shard, first in zip(self._shards, self._starts):
            yield first, shard.rows(), torch.from_numpy(self._groups_of(shard))

    def pieces(self) -> Iterator[tuple[Rows, pa.Table]]:
        """Yield (rows, their `meta`), shard by shard, mapped."""
        for shard in self._shards:
            yield shard.rows(), shard.meta

    def groups(self) -> Tensor:
        """Return the group number of every row, int64 [N]."""
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *map(self._groups_of, self._shards)]))

    def ids(self) -> list[str]:
        return self.meta["id"].to_pylist()

    @cached_property
    def meta(self) -> pa.Table:
        """Return id, source, step and tokens of every row; step and tokens are null where they were not given."""
        return _joined([shard.meta for shard in self._shards])

    def part_meta(self, part: Path) -> pa.Table:
        """Return `meta` of the rows of one part."""
        return _joined([shard.meta for shard in self._shards if shard.path.parent == part])

    @property
    def files(self) -> list[str]:
        """Return the names of the registered files."""
        return sorted({name for manifest in self.parts.values() for name in manifest.files})

    def file(self, name: str) -> Path:
        """Return the path of a file that was registered with the store."""
        for part, manifest in self.parts.items():
            if name in manifest.files:
                return part / name
        raise StoreError(f"{self.path} has no file {name!r}: it lists {self.files}.")

    def require(self, *, spec: Mapping[str, Any] | None = None, model_digest: str | None = None) -> Store:
        """Refuse a store of another spec or model than the ones given, and return it otherwise."""
        for name, ours, theirs in (
            ("spec", self.spec, spec),
            ("model.digest", self.model.get("digest"), model_digest),
        ):
            if theirs is not None and (found := difference(ours, theirs, name)):
                raise StoreError(
                    f"{self.path} can't be compared with what it is asked for: {found} asked for. "
                    f"Sketch both with the same settings and the same model."
                )
        return self

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.sources)}

    def _groups_of(self, shard: Shard) -> np.ndarray:
        column = shard.meta["source"].combine_chunks().dictionary_encode()
        names = column.dictionary.to_pylist()
        unknown = [name for name in names if name not in self._number_of]
        if unknown:
            raise StoreError(
                f"{shard.path} has rows of the source {unknown[0]!r}, which {NAME} does not list. {_WAY_OUT}"
            )
        numbers = np.array([self._number_of[name] for name in names], dtype=np.int64)
        return numbers[column.indices.to_numpy()]


def find_parts(path: Path) -> list[Path]:
    """Return the folders that are stores: `path` itself, or rank000, rank001, ... in it."""
    ranks = sorted(folder for folder in path.glob("rank*") if re.fullmatch(r"rank\d+", folder.name) and folder.is_dir())
    if (path / NAME).exists() and ranks:
        raise StoreError(f"{path} holds both a store and {ranks[0].name}: move one of them away.")
    missing = [number for number, folder in enumerate(ranks) if int(folder.name[4:]) != number]
    if missing:
        raise StoreError(f"{path} has {ranks[-1].name} but no rank{missing[0]:03d}: copy it as well.")
    return ranks or [path]


def open_shards(path: Path, manifest: Manifest, *, verify: bool) -> list[Shard]:
    """Open the shards that a manifest lists, and check that they are the ones it means."""
    shards = []
    for number, entry in enumerate(manifest.shards):
        file = path / shard_name(number)
        check_size(file, entry.bytes)
        shard = Shard(file)
        if shard.header["store"] != manifest.identity:
            raise StoreError(f"{file} belongs to another store than {path / NAME}. {_WAY_OUT}")
        if shard.entry != entry:
            raise StoreError(f"{file} is not the shard that {path / NAME} lists: their digests differ. {_WAY_OUT}")
        if verify:
            shard.verify()
        shards.append(shard)
    for name, listed in manifest.files.items():
        check_size(path / name, listed.bytes)
        if verify and file_checksum(path / name) != listed.digest:
            raise StoreError(f"{path / name} is damaged: its digest is not the one in {path / NAME}. {_WAY_OUT}")
    return shards


def check_no_sample_twice(stores: Sequence[Store]) -> None:
    """Refuse stores that hold the same sample at the same step, naming it and the folders."""
    folders = [part for store in stores for part in store.parts]
    tables = [store.part_meta(part).select(["id", "step"]) for store in stores for part in store.parts]
    joined = pa.concat_tables(tables)
    counts = joined.group_by(["id", "step"]).aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts["count_all"], 1)).slice(0, 1).to_pylist()
    if not twice:
        return
    id, step = twice[0]["id"], twice[0]["step"]
    where = [str(folder) for folder, table in zip(folders, tables) if {"id": id, "step": step} in _rows_of(table, id)]
    when = "without a step" if step is None else f"at step {step}"
    raise StoreError(
        f"the sample {id!r} {when} stands in {' and in '.join(where)}: a sum would count it twice. Leave one out."
    )


_WAY_OUT = "Copy the file again from where it was written, or write the store again."


def _joined(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables([META.empty_table(), *tables])


def _rows_of(table: pa.Table, id: str) -> list[dict[str, Any]]:
    return table.filter(pc.equal(table["id"], id)).to_pylist()
