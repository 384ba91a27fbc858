"""What a mix draws from: the items of a training set by source, and how many supervised tokens each holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsft.data import IGNORED, PackedDataset, RowDataset
from fastsft.tasks import MixError
from fastsft.train.samples import SampleTable, integers


def items_of(dataset: Any, table: SampleTable) -> tuple[dict[str, list[int]], list[int]]:
    """Sort the items of a training set by source -> {source: item numbers}, supervised tokens of every item.

    An item is a row, or a packed line whose documents are all of one source (fastsft packs so where a mix is steered).
    """
    if isinstance(dataset, PackedDataset):
        return _packed_items(dataset)
    if table.first_document is not None:
        raise MixError(
            "the training set is packed already, and its lines hold documents of unknown sources: set packing=False in "
            "the trainer's arguments, or let `fastsft run` pack it, source by source."
        )
    items: dict[str, list[int]] = {name: [] for name in table.source_names}
    for number, source in enumerate(table.sources):
        items[source].append(number)
    if len(items) < 2:
        raise MixError(
            f"a mix needs two sources or more, this training set has one, {next(iter(items))!r}: give its rows a "
            f"column `source`."
        )
    return items, [_supervised(dataset, number) for number in range(len(table.sources))]


def _packed_items(dataset: PackedDataset) -> tuple[dict[str, list[int]], list[int]]:
    items: dict[str, list[int]] = {}
    tokens = []
    for number, places in enumerate(dataset.bins):
        rows = [dataset.rows[at] for at in places]
        sources = {row.source for row in rows}
        if len(sources) > 1:
            raise MixError(
                f"packed line {number} holds documents of {len(sources)} sources ({', '.join(sorted(sources))}), and a "
                f"mix draws whole lines: pack each source by itself."
            )
        items.setdefault(rows[0].source, []).append(number)
        tokens.append(sum(_count(row.labels) for row in rows))
    return {name: items[name] for name in sorted(items)}, tokens


def _supervised(dataset: Any, number: int) -> int:
    if isinstance(dataset, RowDataset):
        return _count(dataset.rows[number].labels)
    row = dataset[number]
    if row.get("labels") is not None:
        return _count(integers(row["labels"]))
    for mask in ("completion_mask", "assistant_masks"):  # TRL's
        if row.get(mask) is not None:
            return sum(integers(row[mask])[1:])
    return max(len(row["input_ids"]) - 1, 0)


def _count(labels: Sequence[int]) -> int:
    """Labels that a causal model is asked for: the first token is never predicted."""
    return int(np.count_nonzero(np.asarray(labels[1:]) != IGNORED))
