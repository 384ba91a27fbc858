"""fastsft/ops/_sjlt.py against its definition, entry by entry in Python integers."""

import pytest
import torch

from fastsft import ops
from fastsft.ops import _sjlt


def mix(v):
    v ^= v >> 16
    v = v * 0x7FEB352D % 2**32
    v ^= v >> 15
    v = v * 0x846CA68B % 2**32
    return v ^ (v >> 16)


def place_and_sign(row, col, cols, size, seed):
    high, low = divmod(row * ((cols + 15) // 16) + col // 16, 2**32)
    h = mix(low ^ seed ^ mix(high))
    g = mix((h + 0x9E3779B9) % 2**32)
    q = (col % 16 - (g & 15)) % 16
    return (h * (size // 16) >> 32) * 16 + q, -1 if g >> (8 + q) & 1 else 1


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("shape", [(3, 16), (5, 1), (4, 33), (1, 100)])
def test_table_is_the_definition(shape, seed):
    index, sign = ops.sjlt_table(shape, 112, seed)
    expected = [place_and_sign(o, i, shape[1], 112, seed) for o in range(shape[0]) for i in range(shape[1])]
    assert list(zip(index.tolist(), sign.tolist(), strict=True)) == expected


# Three blocks a row: block 2^32 falls within a row; then blocks of 2^33 and more, up to what int64 has room for.
@pytest.mark.parametrize("first_row", [2**32 // 3 - 1, 2**33 // 3, 2**45 + 7, 2**61])
def test_table_is_the_definition_past_32_bits(first_row):
    index, sign = ops.sjlt_table((3, 40), 112, 77, first_row=first_row)
    expected = [place_and_sign(first_row + o, i, 40, 112, 77) for o in range(3) for i in range(40)]
    assert list(zip(index.tolist(), sign.tolist(), strict=True)) == expected


def test_blocks_2_to_32_apart_are_hashed_apart():
    near, far = (ops.sjlt_table((1, 1600), 4096, 0, first_row=row) for row in (0, 2**40))
    assert not torch.equal(near[0], far[0])
    # Bucket and rotation agree by chance only.
    assert (near[0] == far[0]).float().mean() < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_derived_seeds_are_numbers_of_their_own(seed):
    assert _sjlt.derived_seed(seed, 3) == mix(seed ^ mix(3))
    derived = {_sjlt.derived_seed(seed, salt) for salt in range(1, 100)} | {seed}
    assert len(derived) == 100
    assert all(0 <= number < 2**32 for number in derived)


def test_mix_is_pinned():
    # So that sketches stored today can be read tomorrow.
    index, sign = ops.sjlt_table((2, 17), 4096, 12345)
    assert index[[0, 1, 16, 17, 33]].tolist() == [2332, 2333, 2883, 1562, 4043]
    assert sign[[0, 1, 16, 17, 33]].tolist() == [1, 1, -1, 1, 1]


def test_values_of_one_block_never_collide():
    index, _ = ops.sjlt_table((50, 16), 64, 3)
    assert all(row.unique().numel() == 16 for row in index.view(50, 16))


def test_keeps_inner_products_in_the_mean():
    a, b = torch.randn(2, 6, 40, dtype=torch.float64)
    size, seeds = 256, 400
    dots = torch.stack([ops.sketch_matrix(a, size, s) @ ops.sketch_matrix(b, size, s) for s in range(seeds)])
    # One dot has variance <= (|a|^2 |b|^2 + <a, b>^2) / size; the mean over seeds stays within 4 of its deviations.
    deviation = ((a.norm() * b.norm()) ** 2 + (a * b).sum() ** 2).div(size * seeds).sqrt()
    assert (dots.mean() - (a * b).sum()).abs() < 4 * deviation
    assert 0.5 < dots.var() / (deviation**2 * seeds) < 1.5


def test_sketch_is_linear_and_keeps_leading_dimensions():
    g = torch.randn(2, 3, 4, 20, dtype=torch.float64)
    whole = ops.sketch_matrix(g, 48, 1)
    assert whole.shape == (2, 3, 48)
    torch.testing.assert_close(whole[1].sum(0), ops.sketch_matrix(g[1].sum(0), 48, 1))


@pytest.mark.parametrize("size", [0, -16, 24])
def test_size_must_fit_blocks(size):
    with pytest.raises(ValueError, match=f"multiple of 16 above 0: got {size}"):
        ops.sjlt_table((2, 2), size, 0)
