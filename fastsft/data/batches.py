"""Batches: rows padded side by side, or several documents packed into one line without seeing each other.

B lines of a batch, T tokens of the longest row, L tokens of a packed line.
"""

import bisect
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from fastsft.data.samples import DataError
from fastsft.data.tokens import IGNORED, Row


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right, in the order given -> input_ids, labels, attention_mask, each [B, T] int64."""
    if not rows:
        raise DataError("`rows` of a batch must hold at least one row, got none.")
    width = max(len(row.input_ids) for row in rows)
    gaps = [width - len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.input_ids + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]),
        "labels": torch.tensor([row.labels + [IGNORED] * gap for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
    }


def pack(rows: Sequence[Row], max_length: int, *, seed: int) -> list[list[int]]:
    """Sort rows into lines of at most `max_length` tokens: best-fit-decreasing -> indices into `rows` of each line.

    `seed` shuffles rows of equal length before, and the lines after, so that lines do not come longest first.
    Every row is placed once. Costs N log N and a sorted list of the open lines.
    """
    longest = max(rows, key=lambda row: len(row.input_ids), default=None)
    if longest is not None and len(longest.input_ids) > max_length:
        raise DataError(
            f"row {longest.id!r} of source {longest.source!r} has {len(longest.input_ids)} tokens and does not fit a "
            f"packed line of `max_length` {max_length}; raise it, or tokenise with this max_length."
        )
    generator = random.Random(seed)
    order = list(range(len(rows)))
    generator.shuffle(order)
    order.sort(key=lambda index: -len(rows[index].input_ids))
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (tokens free, bin), sorted: the first that is wide enough is the best fit
    for index in order:
        length = len(rows[index].input_ids)
        at = bisect.bisect_left(open_bins, (length, 0))
        free, number = open_bins.pop(at) if at < len(open_bins) else (max_length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        if free > length:
            bisect.insort(open_bins, (free - length, number))
    generator.shuffle(bins)
    return bins


def collate_packed(bins: Sequence[Sequence[Row]], max_length: int, pad_id: int) -> dict[str, Any]:
    """Lay each bin's documents end to end -> input_ids, labels, position_ids [B, L] int64 and `lengths` of each bin.

    position_ids restart at 0 in every document and in the padding tail, and there is no attention_mask: that is how
    transformers (>= 5) tells documents apart, for any B. The model must be called with `use_cache=False`: with a cache
    it attends across documents. The first label of every document is -100, so that no document predicts the next.
    """
    if not bins or not all(bins):
        raise DataError("`bins` of a packed batch must hold at least one bin, and each bin at least one row.")
    lines: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for documents in bins:
        line = _lay(documents)
        gap = max_length - len(line["input_ids"])
        if gap < 0:
            raise DataError(
                f"a bin of {len(documents)} rows (the first is {documents[0].id!r}) has {max_length - gap} tokens, "
                f"`max_length` is {max_length}; pack the rows with the same `max_length`."
            )
        lines["input_ids"].append(line["input_ids"] + [pad_id] * gap)
        lines["labels"].append(line["labels"] + [IGNORED] * gap)
        lines["position_ids"].append(line["position_ids"] + list(range(gap)))
    batch: dict[str, Any] = {name: torch.tensor(line) for name, line in lines.items()}
    batch["lengths"] = [[len(row.input_ids) for row in documents] for documents in bins]
    return batch


class RowDataset(Dataset[dict[str, Any]]):
    """Give a trainer one row an item: input_ids, labels, and `fastsft_row`, its index in `rows`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row.input_ids, "labels": row.labels, "fastsft_row": range(len(self.rows))[index]}


class PackedDataset(Dataset[dict[str, Any]]):
    """Give a trainer one packed line an item: input_ids, labels, position_ids, `fastsft_rows` and `lengths`.

    `bins` are indices into `rows`, as `pack` gives them; lines are not padded.
    """

    def __init__(self, rows: Sequence[Row], bins: Sequence[Sequence[int]]) -> None:
        self.rows = list(rows)
        self.bins = [list(indices) for indices in bins]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        indices = self.bins[index]
        documents = [self.rows[at] for at in indices]
        lengths = [len(row.input_ids) for row in documents]
        return {**_lay(documents), "fastsft_rows": list(indices), "lengths": lengths}


def _lay(documents: Sequence[Row]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for row in documents for token in row.input_ids],
        "labels": [label for row in documents for label in (IGNORED, *row.labels[1:])],
        "position_ids": [at for row in documents for at in range(len(row.input_ids))],
    }
