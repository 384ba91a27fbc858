"""The blocked sparse Johnson-Lindenstrauss sketch: one rule, the same bits in torch here, in csrc/cpu and in csrc/cuda.

A matrix [O, I] is cut, row by row, into blocks of 16 columns (the last block of a row is padded with zeros), numbered
j = o * ceil(I / 16) + i // 16 = high * 2^32 + low. With 32-bit unsigned arithmetic

    h = mix(low xor seed xor mix(high))    g = mix(h + 0x9e3779b9)    bucket = (h * (K / 16)) >> 32    rotation = g & 15

(mix(0) = 0) the block's value p goes to place q = (p - rotation) & 15 of the bucket's 16 places, and is negated where
bit 8 + q of g is set. Two values of one block never collide, two of different blocks do with probability 1/K, so inner
products are kept in the mean, with variance about |a|^2 |b|^2 / K whatever the matrix (rank one too).
"""

from typing import TypeVar

import torch
from torch import Tensor

BLOCK = 16
_U32 = 0xFFFFFFFF


Words = TypeVar("Words", int, Tensor)


def mix(v: Words) -> Words:
    """Mix 32-bit numbers, an int or an int64 tensor (a bijection): Prospecting for Hash Functions, 'lowbias32'."""
    v = v ^ (v >> 16)
    v = (v * 0x7FEB352D) & _U32
    v = v ^ (v >> 15)
    # The product of two 32-bit numbers passes 2^63: multiply by halves, keep 32 bits.
    v = (v * 0x6CA68B + (((v & 0xFF) * 0x84) << 24)) & _U32
    return v ^ (v >> 16)


def check_sketch_size(size: int) -> None:
    if size <= 0 or size % BLOCK:
        raise ValueError(f"A sketch's size K must be a multiple of {BLOCK} above 0: got {size}.")


def derived_seed(seed: int, salt: int) -> int:
    """Make another 32-bit seed of a seed: mix(seed xor mix(salt)), for a salt below 2^32 that no other use shares."""
    return mix((seed & _U32) ^ mix(salt))


def block_hash(block: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (bucket, twist) of blocks by their int64 numbers: twist is g above."""
    h = mix((block & _U32) ^ (seed & _U32) ^ mix(block >> 32))
    return (h * (size // BLOCK)) >> 32, mix((h + 0x9E3779B9) & _U32)


def sjlt_table(
    shape: tuple[int, int], size: int, seed: int, device: torch.device | str = "cpu", *, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """Return where each entry of a matrix [O, I] goes in a sketch of `size`, and its sign.

    (index int64 [O * I], sign float32 [O * I] of +-1); 12 bytes per entry. With `first_row` the rows are rows
    first_row, first_row + 1, ... of a larger matrix with the same columns.
    """
    check_sketch_size(size)
    rows, cols = shape
    col = torch.arange(cols, device=device)
    row = first_row + torch.arange(rows, device=device)
    bucket, g = block_hash(row[:, None] * -(-cols // BLOCK) + (col // BLOCK)[None, :], size, seed)  # [O, I]
    place = (col % BLOCK - g) & (BLOCK - 1)
    sign = 1 - 2 * ((g >> (8 + place)) & 1)
    return (bucket * BLOCK + place).reshape(-1), sign.reshape(-1).float()


def sketch_by_table(matrices: Tensor, size: int, seed: int, first_row: int = 0) -> Tensor:
    """Sketch matrices [..., O, I] -> [..., size], in their precision, float32 at least: the reference.

    On CUDA index_add_ adds in no fixed order: repeated calls differ in the last bits.
    """
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    shape = (wide.shape[-2], wide.shape[-1])
    index, sign = sjlt_table(shape, size, seed, wide.device, first_row=first_row)
    # Not -1: a matrix may have no entries.
    flat = wide.reshape(wide.shape[:-2].numel(), wide.shape[-2] * wide.shape[-1])
    sketch = flat.new_zeros(flat.shape[0], size).index_add_(1, index, flat * sign.to(wide.dtype))
    return sketch.reshape(*matrices.shape[:-2], size)
