"""fastsft/ops/_rows.py: what the formats keep, and how many bytes they take."""

import numpy
import pytest
import torch

from fastsft import ops


def encode(format, blocks=1, num_rows=9, size=384, device="cpu"):
    sketches = torch.randn(num_rows, size).to(device)
    sketches *= torch.logspace(-3, 3, num_rows, device=device)[:, None]
    return sketches, ops.encode_rows(sketches, format, blocks)


def test_bf16_keeps_eight_bits(device):
    sketches, rows = encode("bf16", device=device)
    assert rows.scales is None
    assert rows.size == 384
    torch.testing.assert_close(ops.decode_rows(rows), sketches, rtol=2**-8, atol=0)


@pytest.mark.parametrize("blocks", [1, 3])
def test_int8_errs_by_half_a_step(blocks, device):
    sketches, rows = encode("int8", blocks, device=device)
    parts = sketches.unflatten(1, (blocks, -1))
    largest = parts.abs().amax(2)
    torch.testing.assert_close(rows.scales, largest / 127)
    error = (ops.decode_rows(rows).unflatten(1, (blocks, -1)) - parts).abs()
    # Half a step, and the rounding of the division and the product.
    assert (error <= largest[..., None] * (0.5 / 127 + 1e-6)).all()
    assert rows.data.abs().max() == 127


@pytest.mark.parametrize("blocks", [1, 3])
def test_1bit_keeps_signs_and_mean_magnitudes(blocks, device):
    sketches, rows = encode("1bit", blocks, device=device)
    assert rows.size == 384
    decoded = ops.decode_rows(rows)
    assert torch.equal(decoded < 0, sketches < 0)
    means = sketches.unflatten(1, (blocks, -1)).abs().mean(2)
    torch.testing.assert_close(decoded.abs().unflatten(1, (blocks, -1)), means[..., None].expand(-1, -1, 384 // blocks))


def test_1bit_packs_as_numpy_does_in_little_order(device):
    sketches, rows = encode("1bit", device=device)
    expected = numpy.packbits(sketches.cpu().numpy() < 0, axis=1, bitorder="little")
    assert numpy.array_equal(rows.data.cpu().numpy(), expected)


@pytest.mark.parametrize(("format", "expected"), [("bf16", 8192), ("int8", 4096 + 4 * 2), ("1bit", 512 + 4 * 2)])
def test_bytes_of_a_row(format, expected):
    rows = ops.encode_rows(torch.randn(3, 4096), format, 2)
    tensors = [rows.data] if rows.scales is None else [rows.data, rows.scales]
    assert sum(t.numel() * t.element_size() for t in tensors) == 3 * expected


@pytest.mark.parametrize("format", ops.FORMATS)
def test_zero_rows_and_no_rows(format, device):
    zeros = ops.encode_rows(torch.zeros(2, 128, device=device), format, 2)
    assert torch.equal(ops.decode_rows(zeros), torch.zeros(2, 128, device=device))
    if zeros.scales is not None:
        assert (zeros.scales == 0).all()
    assert ops.decode_rows(ops.encode_rows(torch.zeros(0, 128, device=device), format)).shape == (0, 128)


@pytest.mark.parametrize("format", ops.FORMATS)
def test_a_block_of_zeros_beside_others(format, device):
    sketches = torch.ones(1, 128, device=device)
    sketches[:, :64] = 0
    torch.testing.assert_close(ops.decode_rows(ops.encode_rows(sketches, format, 2)), sketches)


@pytest.mark.parametrize("format", ops.FORMATS)
def test_float64_is_taken(format):
    sketches = torch.randn(2, 64, dtype=torch.float64)
    decoded = ops.decode_rows(ops.encode_rows(sketches, format))
    assert torch.equal(decoded, ops.decode_rows(ops.encode_rows(sketches.float(), format)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ops.FORMATS)
def test_rows_that_are_not_finite_are_refused(format, value):
    sketches = torch.ones(3, 64)
    sketches[2, 5] = value
    with pytest.raises(ValueError, match="row 2 has NaN or infinity"):
        ops.encode_rows(sketches, format)


@pytest.mark.parametrize(
    ("format", "size", "blocks", "sentence"),
    [
        ("int4", 64, 1, "one of bf16, int8, 1bit: got 'int4'"),
        ("int8", 96, 1, "a row of K=96 numbers in 1 blocks must be a multiple of 64"),
        ("1bit", 128, 3, "K=128 numbers in 3 blocks"),
        ("bf16", 64, 0, "in 0 blocks"),
        ("bf16", 0, 1, "K=0"),
    ],
)
def test_bad_formats_are_a_sentence(format, size, blocks, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.encode_rows(torch.ones(2, size), format, blocks)
