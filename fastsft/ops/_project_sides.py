"""Projections of one side of a gradient: count-sketches of rows ("factored") and dense random signs ("kronecker")."""

# T tokens, I numbers of a row, C numbers of a projected row, O outputs, K sketch size

import torch
from torch import Tensor

from fastsft.ops._sjlt import mix, sketch_by_table
from fastsft.ops.sketch_matrix import Job as SketchJob
from fastsft.ops.sketch_matrix import run_cpp as sketch_cpp

_U32 = 0xFFFFFFFF
WORD = 32


def count_sketch_by_table(rows: Tensor, size: int, seed: int) -> Tensor:
    """Sketch each row as a matrix [1, I] under one hash: rows [T, I] -> [T, C]; the reference."""
    return sketch_by_table(rows[:, None, :], size, seed)


def count_sketch_cpp(rows: Tensor, size: int, seed: int) -> Tensor:
    """Sketch each row with the compiled kernel: one read of the rows, where a GEMM would take C products a number."""
    out = torch.zeros(rows.shape[0], size)
    sketch_cpp(SketchJob(rows[:, None, :], None, None, out, seed, 0))
    return out


def random_signs(width: int, size: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return dense random signs [width, size], float32, the same on every device.

    Entry (i, c) is negative where bit c % 32 of mix(mix(i xor seed) + 0x9e3779b9 * (c // 32 + 1)) is set, in 32-bit
    arithmetic: it does not depend on the width, and grows with the size. Made anew at each call, a hash for 32 signs:
    a fraction of the product that they are made for.
    """
    key = mix(torch.arange(width, device=device) ^ (seed & _U32))
    word = torch.arange(-(-size // WORD), device=device) + 1
    bits = mix((key[:, None] + (word * 0x9E3779B9)) & _U32)  # [width, words]
    places = torch.arange(WORD, device=device)
    return (1 - 2 * ((bits[:, :, None] >> places) & 1)).flatten(1)[:, :size].float()


def kronecker_sides(size: int, O: int, I: int) -> tuple[int, int]:
    """Split K into (k_o, k_i), powers of two with k_o * k_i = K, as near to square as sides of O and I allow."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"kind 'kronecker' needs a size that is a power of two: got K={size}.")
    most_o, most_i = (1 << side.bit_length() >> 1 for side in (O, I))  # the largest powers of two within them
    k_o = min(1 << (size.bit_length() - 1) // 2, most_o)
    k_i = min(size // max(k_o, 1), most_i)
    k_o = min(size // max(k_i, 1), most_o)
    if k_o * k_i != size:
        raise ValueError(
            f"kind 'kronecker' cannot make K={size} numbers of a weight [{O}, {I}]: {most_o} x {most_i} is the most. "
            f"Take a smaller size, or kind='sjlt'."
        )
    return k_o, k_i


def project_side(rows: Tensor, size: int, seed: int) -> Tensor:
    """Project rows [T, I] to [T, C] by random signs / sqrt(C); a side that has C numbers already is kept as it is."""
    if rows.shape[1] == size:
        return rows.to(torch.promote_types(rows.dtype, torch.float32))
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide) @ random_signs(rows.shape[1], size, seed, rows.device).to(wide)).mul_(size**-0.5)
