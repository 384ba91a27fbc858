"""Write a store: rows are encoded as they come, and a shard is on disk whole or not at all."""

# N rows, K numbers of a row, M blocks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import pyarrow as pa
from torch import Tensor

from fastsft.ops import Rows
from fastsft.store._files import TEMPORARY, Lock, StoreError, file_checksum
from fastsft.store._incoming import check_columns, check_sketches, check_sources, encode, new_pairs, pairs_of
from fastsft.store.manifest import (
    IDENTITY,
    NAME,
    FileEntry,
    Manifest,
    Settings,
    check_same,
    load_manifest,
    new_manifest,
)
from fastsft.store.reader import open_shards
from fastsft.store.shard import SUFFIX, Shard, cut_rows, join_rows, meta_table, shard_name, write_shard


class StoreWriter:
    """Append sketches to a folder. Made by `create` or `resume`; one writer a folder.

    A writer that is killed loses the rows of its open shard, at most `shard_rows`; finished shards stay readable, and
    `resume` goes on after them. Used as a context manager, it closes the store unless an exception passes through.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: Lock, seen: set[tuple[str, int | None]]) -> None:
        self.path = path
        self.manifest = manifest
        self._lock: Lock | None = lock
        # (id, step) of every row
        self._seen = seen
        self._pending: list[tuple[Rows, pa.Table]] = []
        self._num_pending = 0

    @classmethod
    def create(cls, path: str | Path, **settings: Unpack[Settings]) -> StoreWriter:
        """Begin a store in a new folder.

        spec: what makes rows comparable, as JSON: kind, size and seed of the sketch, loss, unit, digest of a whitening.
        size, format, blocks: K; "bf16", "int8" or "1bit"; M, or the names of the M blocks (see `fastsft.ops.Rows`).
        sources: names of the groups that rows belong to. model: {"name", "digest", ...} of the weights.
        about: anything else worth keeping; it is not compared. shard_rows: rows of a shard, 8192 unless told.
        """
        manifest = new_manifest(**settings)
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
        there = sorted(file for file in path.iterdir() if file.name == NAME or file.suffix == SUFFIX)
        if there:
            lock.release()
            raise StoreError(f"{there[0]} exists already. Resume that store, choose another folder, or delete it.")
        manifest.save(path)
        return cls(path, manifest, lock, set())

    @classmethod
    def resume(cls, path: str | Path, **settings: Unpack[Settings]) -> StoreWriter:
        """Go on after the last whole shard of a store, with the settings it was created with.

        `len(writer)` and `writer.ids` tell what is there already. A shard that was finished but not yet listed when
        the writer was killed is taken in if it is undamaged and follows the last one listed. `about` stays as it was.
        """
        path = Path(path)
        load_manifest(path)
        lock = Lock(path)
        try:
            writer = cls._resume(path, lock, new_manifest(**settings))
        except BaseException:
            lock.release()
            raise
        return writer

    @classmethod
    def _resume(cls, path: Path, lock: Lock, asked: Manifest) -> StoreWriter:
        manifest = load_manifest(path)
        check_same(
            manifest,
            asked,
            [*IDENTITY, "sources", "shard_rows"],
            f"{path / NAME} and the settings to resume it with",
            "Resume with the settings of the store, or choose another folder.",
        )
        for left in path.glob(f"*{TEMPORARY}"):
            left.unlink()
        shards = open_shards(path, manifest, verify=True)
        while shard := _unlisted(path, manifest, shards):
            shards.append(shard)
            manifest = replace(manifest, shards=[*manifest.shards, shard.entry])
        manifest = replace(manifest, complete=False)
        manifest.save(path)
        return cls(path, manifest, lock, {pair for shard in shards for pair in pairs_of(shard.meta)})

    def __len__(self) -> int:
        """Count the rows appended, those of the open shard included."""
        return self.manifest.rows + self._num_pending

    @property
    def ids(self) -> set[str]:
        """Return the ids of the rows appended."""
        return {id for id, _ in self._seen}

    def append(
        self,
        sketches: Tensor,
        *,
        ids: Sequence[str],
        sources: Sequence[str],
        steps: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Add rows: sketches [n, K] with the id and source of each, and, if known, its step and number of tokens.

        All or none of the rows are taken. An id may come again only at another step.
        """
        if self._lock is None:
            raise StoreError(f"{self.path}: this writer is closed. Resume the store to append to it.")
        columns = {"id": ids, "source": sources, "step": steps, "tokens": tokens}
        check_sketches(self.path, self.manifest.size, sketches)
        check_columns(columns, len(sketches))
        check_sources(self.path, self.manifest.sources, sources)
        meta = meta_table(columns)
        pairs = new_pairs(self.path, self._seen, meta)
        self.take(encode(self.path, self.manifest, sketches, ids), meta)
        self._seen |= pairs

    def take(self, rows: Rows, meta: pa.Table) -> None:
        """Add rows that are encoded already, with their table of META; for `merge`, which has checked them."""
        self._pending.append((rows, meta))
        self._num_pending += meta.num_rows
        self._write_shards(self._num_pending // self.manifest.shard_rows * self.manifest.shard_rows)

    def register(self, name: str) -> None:
        """List another file, already written into the folder, with its digest."""
        if Path(name).name != name:
            raise ValueError(f"`name` must be a file in the folder of the store itself: got {name!r}.")
        path = self.path / name
        entry = FileEntry(bytes=path.stat().st_size, digest=file_checksum(path))
        if self.manifest.files.get(name, entry) != entry:
            raise StoreError(
                f"{path} has changed since the store was begun: rows before and after would not be comparable. "
                f"Put the first one back, or begin another store."
            )
        self._save(replace(self.manifest, files=self.manifest.files | {name: entry}))

    def close(self) -> None:
        """Write the open shard, and mark the store complete."""
        if self._lock is None:
            return
        self._write_shards(self._num_pending)
        self._save(replace(self.manifest, complete=True))
        self.abandon()

    def abandon(self) -> None:
        """Let go of the folder without the open shard, as a kill would."""
        if self._lock is not None:
            self._lock.release()
        self._lock, self._pending, self._num_pending = None, [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _write_shards(self, count: int) -> None:
        """Write the first `count` pending rows as shards."""
        while count:
            stop = min(count, self.manifest.shard_rows)
            first, rest = self._pending_rows(0, stop), self._pending_rows(stop, self._num_pending)
            rows, meta = join_rows([rows for rows, _ in first]), pa.concat_tables([meta for _, meta in first])
            entry = write_shard(self.path, self.manifest, rows, meta)
            self._save(replace(self.manifest, shards=[*self.manifest.shards, entry]))
            self._pending, self._num_pending = rest, self._num_pending - stop
            count -= stop

    def _pending_rows(self, start: int, stop: int) -> list[tuple[Rows, pa.Table]]:
        """Cut the pending pieces to the rows start..stop of them all."""
        parts, first = [], 0
        for rows, meta in self._pending:
            a, b = max(start - first, 0), min(stop - first, meta.num_rows)
            if a < b:
                parts.append((cut_rows(rows, a, b), meta.slice(a, b - a)))
            first += meta.num_rows
        return parts

    def _save(self, manifest: Manifest) -> None:
        manifest.save(self.path)
        self.manifest = manifest


def rank_folder(path: str | Path, rank: int) -> Path:
    """Return the folder of one process's store; `Store.open(path)` opens them as one."""
    return Path(path) / f"rank{rank:03d}"


def _unlisted(path: Path, manifest: Manifest, shards: list[Shard]) -> Shard | None:
    """Return the shard after the last one listed, if a killed writer finished it; it must belong and be undamaged."""
    file = path / shard_name(len(shards))
    if not file.exists():
        return None
    try:
        shard = Shard(file)
        shard.verify()
    except StoreError:
        # It will be written again.
        return None
    ours = (manifest.identity, len(shards), shards[-1].digest if shards else "")
    return shard if ours == tuple(shard.header[name] for name in ("store", "number", "previous")) else None
