"""Carry the identity of every document through a trainer's collator, packing or not.

Each item of the training set carries `fastsft_row` (its number), or `fastsft_rows` (the samples packed in it). The
wrapped collator takes it out before the real one runs and adds `fastsft_documents` [D, 3] to the batch: sample number,
row of the batch, length, in the order of the batch's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

DOCUMENTS = "fastsft_documents"
COLUMNS = ("fastsft_row", "fastsft_rows", "lengths")


class Numbered(Dataset[dict[str, Any]]):
    """A map-style dataset whose items also carry their number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "fastsft_row": index}


class TaggingCollator:
    """Call `collator` on the items without their tags, and tag the batch it makes."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], first_document: Sequence[int] | None) -> None:
        self.collator = collator
        # of each item the number of its first sample, where items hold several that are known by place only
        self.first_document = first_document

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        if not features or not any(name in features[0] for name in ("fastsft_row", "fastsft_rows")):
            return self.collator(features)
        documents = [self._documents(feature) for feature in features]
        batch = self.collator([{k: v for k, v in each.items() if k not in COLUMNS} for each in features])
        batch[DOCUMENTS] = _place(documents, batch["input_ids"].shape)
        return batch

    def _documents(self, feature: dict[str, Any]) -> list[tuple[int, int]]:
        """(sample number, length) of each document of one item."""
        size = len(feature["input_ids"])
        if "fastsft_rows" in feature:
            return list(zip(feature["fastsft_rows"], feature["lengths"], strict=True))
        row = int(feature["fastsft_row"])
        lengths = feature.get("seq_lengths")
        if lengths is None:
            return [(row if self.first_document is None else self.first_document[row], size)]
        first = row if self.first_document is None else self.first_document[row]
        return [(first + place, int(length)) for place, length in enumerate(lengths)]


def _place(documents: list[list[tuple[int, int]]], shape: torch.Size) -> Tensor:
    """Find where the collator put the items: one a row, or all in one row (padding-free)."""
    rows, width = shape
    if rows == len(documents):
        placed = [(number, row, length) for row, item in enumerate(documents) for number, length in item]
    elif rows == 1 and sum(length for item in documents for _, length in item) <= width:
        placed = [(number, 0, length) for item in documents for number, length in item]
    else:
        raise ValueError(
            f"the collator made a batch of shape {list(shape)} from {len(documents)} items: their documents can't be "
            f"found in it. Use a collator that keeps one item a row, or lays all of them in one row."
        )
    return torch.tensor(placed, dtype=torch.int64)


def read_tags(tags: Tensor, shape: torch.Size) -> tuple[list[int], list[list[int]]]:
    """Split a batch's tags into sample numbers and, of each row, the lengths of its documents."""
    numbers: list[int] = []
    lengths: list[list[int]] = [[] for _ in range(shape[0])]
    for number, row, length in tags.tolist():
        numbers.append(number)
        lengths[row].append(length)
    return numbers, lengths
