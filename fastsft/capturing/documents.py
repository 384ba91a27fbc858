"""Which tokens of a batch belong to which document (sample)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one micro-batch, in the order of its flattened tokens.

    offsets [D+1], int64: document d is the flattened tokens offsets[d]..offsets[d+1]. Padding belongs to the document
    before it: its output gradient is exactly zero, so it adds nothing.
    """

    offsets: Tensor
    # offsets[-1], known without asking the device
    num_tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to(self, device: torch.device) -> Documents:
        return Documents(self.offsets.to(device), self.num_tokens)

    @classmethod
    def rows(cls, num_rows: int, row_length: int) -> Documents:
        """One document a row of a [B, T] batch, padded or not."""
        return cls(torch.arange(num_rows + 1, dtype=torch.int64) * row_length, num_rows * row_length)

    @classmethod
    def packed(cls, lengths: Sequence[Sequence[int]], row_length: int) -> Documents:
        """Several documents a row: `lengths[b]` are the lengths of the documents of row b, in order."""
        starts: list[int] = []
        for row, row_lengths in enumerate(lengths):
            position = row * row_length
            if sum(row_lengths) > row_length or not row_lengths:
                raise ValueError(
                    f"row {row} of a packed batch must hold 1 or more documents of {row_length} tokens in all: "
                    f"got lengths {list(row_lengths)}"
                )
            for length in row_lengths:
                starts.append(position)
                position += length
        end = len(lengths) * row_length
        return cls(torch.tensor([*starts, end], dtype=torch.int64), end)
