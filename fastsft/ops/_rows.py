"""Rows of a store: sketches [N, K] as bfloat16, as int8 or as one bit a number, with a scale per row and block.

A row is M blocks of K / M numbers (one a module, or one in all); int8 and 1bit keep a float32 scale of each:

    bf16   the numbers, rounded                                                       2 K bytes
    int8   round(v / s), s = max |v| / 127 of the block                               K + 4 M bytes
    1bit   the signs, s = mean |v| of the block; bit j % 8 of byte j // 8 is number j,
           and is set where it is negative                                            K / 8 + 4 M bytes

A block of zeros has scale zero.
"""

# N rows, K numbers of a row, M blocks

from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = ("bf16", "int8", "1bit")
BLOCK_MULTIPLE = 64


class Rows(NamedTuple):
    """Encoded rows."""

    format: str
    data: Tensor  # bfloat16 [N, K], int8 [N, K] or uint8 [N, K / 8]
    scales: Tensor | None  # float32 [N, M]; None for bf16

    @property
    def size(self) -> int:
        """K."""
        return self.data.shape[1] * (8 if self.format == "1bit" else 1)


def check_format(format: str, size: int, blocks: int) -> None:
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}: got {format!r}.")
    if blocks < 1 or size < 1 or size % (blocks * BLOCK_MULTIPLE):
        raise ValueError(
            f"a row of K={size} numbers in {blocks} blocks must be a multiple of {BLOCK_MULTIPLE} numbers a block."
        )


def encode_rows(sketches: Tensor, format: str, blocks: int = 1) -> Rows:
    """Encode sketches [N, K], float32 or float64, with a scale for each of `blocks` equal parts of a row.

    Raises ValueError for a number that is not finite: a row of the store would silently lose its meaning.
    """
    check_format(format, sketches.shape[1], blocks)
    bad = (~torch.isfinite(sketches)).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"a sketch must be finite: row {bad[0]} has NaN or infinity. Did the loss overflow?")
    if format == "bf16":
        return Rows(format, sketches.to(torch.bfloat16), None)
    parts = sketches.float().unflatten(1, (blocks, -1))  # [N, M, K / M]
    if format == "int8":
        scales = parts.abs().amax(2) / 127
        steps = torch.where(scales > 0, scales, 1)
        return Rows(format, (parts / steps[..., None]).round().flatten(1).to(torch.int8), scales)
    scales = parts.abs().mean(2)
    bits = (sketches < 0).unflatten(1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=sketches.device)
    return Rows(format, (bits * weights).sum(2).to(torch.uint8), scales)


def decode_rows(rows: Rows) -> Tensor:
    """Give back what the rows stand for, float32 [N, K]."""
    if rows.scales is None:
        return rows.data.float()
    if rows.format == "int8":
        values = rows.data.float()
    else:
        places = torch.arange(8, device=rows.data.device)
        values = 1 - 2 * ((rows.data[..., None] >> places) & 1).flatten(1).float()
    return (values.unflatten(1, (rows.scales.shape[1], -1)) * rows.scales[..., None]).flatten(1)
