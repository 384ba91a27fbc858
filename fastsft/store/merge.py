"""Make one store of several."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from fastsft.store._files import StoreError
from fastsft.store.manifest import check_comparable
from fastsft.store.reader import Store, check_no_sample_twice
from fastsft.store.writer import StoreWriter


def merge(paths: Sequence[str | Path], out: str | Path) -> Store:
    """Write the rows of several stores, in the order given, into a new one; shards are streamed.

    Refused: unfinished stores, stores of different spec, format, size, blocks or model, or with different files of one
    name, and a sample that stands twice at the same step. Sources are united. `about` keeps what all agree on; its
    `merged` names the stores.
    """
    stores = [Store.open(path) for path in paths]
    if not stores:
        raise ValueError("`paths` must name at least one store.")
    check_mergeable(stores)
    ours = stores[0].manifest
    abouts = [manifest.about for store in stores for manifest in store.parts.values()]
    agreed = {key: value for key, value in ours.about.items() if all(about.get(key) == value for about in abouts)}
    writer = StoreWriter.create(
        out,
        spec=ours.spec,
        size=ours.size,
        format=ours.format,
        blocks=ours.block_names or ours.blocks,
        sources=list(dict.fromkeys(name for store in stores for name in store.sources)),
        model=ours.model,
        about=agreed | {"merged": [str(path) for path in paths]},
        shard_rows=ours.shard_rows,
    )
    with writer:
        for store in stores:
            for name in store.files:
                shutil.copyfile(store.file(name), writer.path / name)
                writer.register(name)
            for rows, meta in store.pieces():
                writer.take(rows, meta)
    return Store.open(out)


def check_mergeable(stores: Sequence[Store]) -> None:
    """Refuse stores whose rows must not stand in one, naming both folders and what is wrong."""
    for store in stores:
        if not store.complete:
            raise StoreError(f"{store.path} is not finished: its writer was not closed. Resume it and close it first.")
    parts = {part: manifest for store in stores for part, manifest in store.parts.items()}
    check_comparable(parts, "Only stores written with the same settings can be merged.")
    check_no_sample_twice(stores)
