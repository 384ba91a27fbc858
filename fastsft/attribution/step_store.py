"""The sketches of a run's samples as they were trained on, in RUN/store/training: one row a sample and step.

A row is sqrt(s) * c G_i over the exactly followed layers: the sample's share c G_i of its step's batch gradient, times
the square root of the optimizer's elementwise scale s = 1 / (sqrt(v_hat) + eps); s is that of the step before (in the
first steps, or with another `factor` than "previous", of the step itself). For SGD s is 1.
"""

# D documents, K sketch size

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor

from fastsft.ops import Rows
from fastsft.store import Store, StoreError, StoreWriter, is_store, rank_folder
from fastsft.store.manifest import Settings

UNIT = "the sample's share of the step's batch gradient, times the square root of the optimizer's elementwise scale"


@dataclass(frozen=True, eq=False)
class StepSketches:
    """Sketches [D, K] of one micro-batch of a step, with id, source and number of tokens of each."""

    step: int
    sketches: Tensor
    ids: Sequence[str]
    sources: Sequence[str]
    tokens: Sequence[int]


class StepStore:
    """One process's part of the store. Rows are on disk when `save` returns."""

    def __init__(self, out: Path, settings: Settings, *, resume_at: int | None) -> None:
        """Begin the store in `out`, or go on with it after the step of a checkpoint, `resume_at`."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        _check_ranks(out, world)
        self.folder = out if world == 1 else rank_folder(out, rank)
        self.settings, self._world = settings, world
        # whether rows of the steps before are missing, because the run kept no store then
        self.is_late = resume_at is not None and not _restore(self.folder)
        if resume_at is None or self.is_late:
            self._writer = StoreWriter.create(self.folder, **settings)
        else:
            # first takes in a shard that was finished and not listed, which may be of later steps
            StoreWriter.resume(self.folder, **settings).close()
            self._drop_after(resume_at)
            self._writer = StoreWriter.resume(self.folder, **settings)

    def append(self, found: Sequence[StepSketches]) -> None:
        """Add the rows of whole steps; all processes call it together.

        A sample that stands twice in a step (a sampler that fills up the last batch) has one row, the sum.
        """
        rows: dict[tuple[str, int], _Row] = {}
        for each in found:
            for place, id in enumerate(each.ids):
                row = _Row(each.sketches[place], each.sources[place], each.tokens[place])
                rows[id, each.step] = rows[id, each.step] + row if (id, each.step) in rows else row
        if self._world > 1:
            _unite(rows)
        if rows:
            self._writer.append(
                torch.stack([row.sketch for row in rows.values()]),
                ids=[id for id, _ in rows],
                sources=[row.source for row in rows.values()],
                steps=[step for _, step in rows],
                tokens=[row.tokens for row in rows.values()],
            )

    def save(self) -> None:
        """Bring every row to the disk: a checkpoint of this step can be resumed from then."""
        self._writer.close()
        self._writer = StoreWriter.resume(self.folder, **self.settings)

    def close(self) -> None:
        """Bring every row to the disk, and call the store complete."""
        self._writer.close()

    def abandon(self) -> None:
        """Let go of the folder, as a kill would."""
        self._writer.abandon()

    def _drop_after(self, step: int) -> None:
        """Write the store again without rows of later steps, which the resumed run will see again."""
        store = Store.open(self.folder)
        if not len(store) or pc.max(store.meta["step"]).as_py() <= step:
            return
        fresh = _beside(self.folder, "new")
        shutil.rmtree(fresh, ignore_errors=True)
        with StoreWriter.create(fresh, **self.settings) as writer:
            for rows, meta in store.pieces():
                kept = pc.less_equal(meta["step"], step)
                mask = torch.tensor(kept.to_pylist(), dtype=torch.bool)
                scales = None if rows.scales is None else rows.scales[mask]
                writer.take(Rows(rows.format, rows.data[mask], scales), meta.filter(kept))
        # the old one goes when the new one is whole; `_restore` mends a kill between the two names
        self.folder.rename(_beside(self.folder, "old"))
        _restore(self.folder)


@dataclass(frozen=True, eq=False)
class _Row:
    sketch: Tensor  # [K]
    source: str
    tokens: int

    def __add__(self, other: _Row) -> _Row:
        return _Row(self.sketch + other.sketch.to(self.sketch), self.source, self.tokens + other.tokens)


def _unite(rows: dict[tuple[str, int], _Row]) -> None:
    """Give a sample that several processes saw at one step to the first of them, summed."""
    seen: list[list[tuple[str, int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(seen, list(rows))
    owner: dict[tuple[str, int], int] = {}
    twice = {key for number, keys in enumerate(seen) for key in keys if owner.setdefault(key, number) != number}
    if not twice:
        return
    shares: list[dict[tuple[str, int], _Row]] = [{} for _ in seen]
    mine = {key: _Row(row.sketch.cpu(), row.source, row.tokens) for key, row in rows.items() if key in twice}
    dist.all_gather_object(shares, mine)
    for key in mine:
        if owner[key] != dist.get_rank():
            del rows[key]
            continue
        for share in shares[dist.get_rank() + 1 :]:
            rows[key] = rows[key] + share[key] if key in share else rows[key]


def _check_ranks(out: Path, world: int) -> None:
    wrong = [rank_folder(out, 0 if world == 1 else world), *([out] if world > 1 else [])]
    for folder in wrong:
        if is_store(folder):
            raise StoreError(
                f"{folder} was written by another number of processes than {world}: resume with as many as then, "
                f"or move {out} away."
            )


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}")


def _restore(folder: Path) -> bool:
    """Finish a replacement of `folder` that was begun; say whether there is a store."""
    old, new = _beside(folder, "old"), _beside(folder, "new")
    if old.exists():
        # the name of the old store was free only when the new one was closed
        if not folder.exists():
            new.rename(folder)
        shutil.rmtree(old)
    shutil.rmtree(new, ignore_errors=True)
    return is_store(folder)


def training_settings(
    *, size: int, seed: int, format: str, adam: bool, sources: Sequence[str], name: str, about: Mapping[str, Any]
) -> Settings:
    """Say what the store of a run is; `about` must name the `layers` that are in its rows."""
    from fastsft.sketch import SketchSpec

    spec = SketchSpec(size=size, seed=seed, precondition="adam" if adam else None)
    return {
        "spec": {"taken": "in training", "sketch": spec.as_dict(), "layers": list(about["layers"])},
        "size": size,
        "format": format,
        "sources": list(sources),
        "model": {"name": name},
        "about": {"unit": UNIT, **about},
    }
