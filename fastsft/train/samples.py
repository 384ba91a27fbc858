"""Who the numbers in a batch are: id, source and text of every training sample."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastsft.data import IGNORED, PackedDataset, RowDataset, Sample


@dataclass(frozen=True, eq=False)
class SampleTable:
    """ids and sources by number; `text(number)` gives (prompt, response), made only when a report asks."""

    ids: Sequence[str]
    sources: Sequence[str]
    text: Callable[[int], tuple[str, str]]
    tokens: Callable[[int], list[int]]
    # of each item of the dataset the number of its first sample; None where an item is a sample
    first_document: Sequence[int] | None = None

    @property
    def source_names(self) -> list[str]:
        return sorted(set(self.sources))


def table_of_rows(samples: Sequence[Sample], input_ids: Sequence[list[int]]) -> SampleTable:
    """The table of samples that fastsft itself read and tokenised, in the order of its rows."""
    return SampleTable(
        ids=[sample.id for sample in samples],
        sources=[sample.source for sample in samples],
        text=lambda number: (samples[number].prompt, samples[number].response),
        tokens=lambda number: input_ids[number],
    )


def table_of_dataset(dataset: Any, decode: Callable[[list[int]], str]) -> SampleTable:
    """The table of a trainer's own dataset: columns `id` and `source` where it has them.

    Without `id` a sample's id is a hash of its tokens; without `source` the source is "train". A dataset that TRL has
    packed (column `seq_lengths`) keeps no column of its samples: they are found by their place and named by hash.
    """
    if isinstance(dataset, RowDataset | PackedDataset):
        return _own_table(dataset, decode)
    first = dataset[0]
    if "input_ids" not in first:
        raise ValueError(
            f"the training set has no `input_ids` (it has {sorted(first)}): tokenise it first, or use TRL's SFTTrainer."
        )
    if "seq_lengths" in first:
        return _packed_table(dataset, decode)
    has_id, has_source = "id" in first, "source" in first
    ids, sources = [], []
    for number in range(len(dataset)):
        row = dataset[number]
        ids.append(str(row["id"]) if has_id else _token_id(row["input_ids"]))
        sources.append(str(row["source"]) if has_source else "train")
    if has_id and len(set(ids)) < len(ids):
        [(twice, _)] = Counter(ids).most_common(1)
        raise ValueError(f"sample id {twice!r} stands twice in the training set: make the ids distinct.")

    def text(number: int) -> tuple[str, str]:
        row = dataset[number]
        return _text(integers(row["input_ids"]), row.get("labels"), decode)

    return SampleTable(ids, sources, text, lambda number: integers(dataset[number]["input_ids"]))


def _own_table(dataset: RowDataset | PackedDataset, decode: Callable[[list[int]], str]) -> SampleTable:
    """fastsft's own datasets carry rows with ids and sources."""
    rows = dataset.rows
    return SampleTable(
        ids=[row.id for row in rows],
        sources=[row.source for row in rows],
        text=lambda number: _text(rows[number].input_ids, rows[number].labels, decode),
        tokens=lambda number: rows[number].input_ids,
    )


def _packed_table(dataset: Any, decode: Callable[[list[int]], str]) -> SampleTable:
    ids: list[str] = []
    places: list[tuple[int, int, int]] = []
    first_document: list[int] = []
    for number in range(len(dataset)):
        row = dataset[number]
        first_document.append(len(ids))
        position = 0
        for length in row["seq_lengths"]:
            ids.append(_token_id(row["input_ids"][position : position + length]))
            places.append((number, position, position + length))
            position += length

    def tokens(number: int) -> list[int]:
        row, begin, end = places[number]
        return integers(dataset[row]["input_ids"][begin:end])

    def text(number: int) -> tuple[str, str]:
        row, begin, end = places[number]
        labels = dataset[row].get("labels")
        return _text(tokens(number), None if labels is None else labels[begin:end], decode)

    return SampleTable(ids, ["train"] * len(ids), text, tokens, first_document)


def integers(values: Sequence[Any]) -> list[int]:
    """Make a plain list of a column, whatever format its dataset gives it in."""
    return [int(value) for value in values]


def _token_id(tokens: Sequence[int]) -> str:
    return hashlib.blake2b(" ".join(map(str, integers(tokens))).encode(), digest_size=8).hexdigest()


def _text(tokens: list[int], labels: Sequence[int] | None, decode: Callable[[list[int]], str]) -> tuple[str, str]:
    """Split at the first supervised token."""
    supervised = (place for place, label in enumerate(labels if labels is not None else []) if label != IGNORED)
    split = next(supervised, len(tokens))
    return decode(tokens[:split]), decode(tokens[split:])


def decoder(trainer: Any) -> Callable[[list[int]], str]:
    """How a trainer's tokens read: by its tokenizer, or as numbers where it has none."""
    tokenizer = trainer.processing_class

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens)) if tokenizer is not None else " ".join(map(str, tokens))

    return decode
