"""The truth: the ceiling that theory gives, files that are whole or refused, abilities as token-weighted queries."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastsft.evaluate import EvaluationError, Truth
from fastsft.evaluate.intervals import spearman
from fastsft.evaluate.measure import draw_subsets
from fastsft.evaluate.truth import reliability
from tests.evaluate._truths import linear_truth


@pytest.mark.parametrize(("seeds", "noise"), [(2, 2.0), (3, 3.0), (4, 6.0)])
def test_ceiling_on_simulated_noise_is_the_theorys(seeds, noise):
    """Signal of variance v, noise n^2 a seed: means over S seeds correlate with the signal by sqrt(v / (v + n^2/S))."""
    truth, effects = linear_truth(subsets=60, seeds=seeds, queries=24, noise=noise)
    # the sum over half of N drawn without replacement varies by N/4 times the effects' own variance
    variance = (effects.var(0) * 40 / 4).mean().item()
    expected = math.sqrt(variance / (variance + noise**2 / seeds))
    found = truth.ceiling()
    # Spearman is up to 0.02 below Pearson for normal numbers; the mean over 24 queries has a standard error near 0.015
    assert found.mean == pytest.approx(expected, abs=0.05)
    assert found.low < found.mean < found.high


def test_reliability_is_stepped_up_over_all_splits():
    truth, _ = linear_truth(seeds=3, noise=3.0, queries=2)
    every = torch.ones(1, 30, dtype=torch.float64)
    pairs = [spearman(truth.losses[:, a], truth.losses[:, b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    r = sum(pairs) / 3
    torch.testing.assert_close(reliability(truth.losses, every)[0], 3 * r / (1 + 2 * r))


def test_ceiling_uses_what_a_deadline_left():
    """The last seed measured on some subsets only: halves of the others, stepped up to the seeds there are."""
    truth, _ = linear_truth(seeds=3, noise=3.0, subsets=30)
    two = dataclasses.replace(truth, losses=truth.losses[:, :2].clone(), full=truth.full[:2])
    truth.losses[10:, 2] = float("nan")
    every = torch.ones(1, 30, dtype=torch.float64)
    expected = reliability(two.losses, every, seeds=2 + 10 / 30).sqrt().mean().item()
    assert truth.ceiling().mean == pytest.approx(expected)
    assert truth.ceiling().mean > two.ceiling().mean
    truth.losses[20:, 1] = float("nan")
    assert math.isnan(truth.ceiling().mean)


def test_ceiling_needs_two_seeds_and_is_one_without_noise():
    assert math.isnan(linear_truth(seeds=1)[0].ceiling().mean)
    assert linear_truth(seeds=2)[0].ceiling().mean == pytest.approx(1)


def test_grouped_is_the_loss_over_all_tokens_of_an_ability():
    truth, _ = linear_truth(noise=1.0)
    grouped = truth.grouped()
    assert grouped.queries == ["maths", "code"]
    assert grouped.tokens.tolist() == [int(truth.tokens[0::2].sum()), int(truth.tokens[1::2].sum())]
    weights = truth.tokens[1::2].double()
    expected = (truth.losses[:, :, 1::2] * weights).sum(2) / weights.sum()
    torch.testing.assert_close(grouped.losses[:, :, 1], expected)
    torch.testing.assert_close(grouped.full[:, 1], (truth.full[:, 1::2] * weights).sum(1) / weights.sum())
    assert grouped.base.tolist() == [pytest.approx(2)] * 2


def test_saved_truths_come_back_and_damaged_ones_are_refused(tmp_path):
    truth, _ = linear_truth(noise=1.0)
    truth.losses[2] = float("nan")
    path = truth.save(tmp_path / "deep" / "truth.npz")
    assert [each.name for each in path.parent.iterdir()] == ["truth.npz"]
    again = Truth.load(path)
    for name in ("tokens", "subsets", "losses", "base", "full"):
        torch.testing.assert_close(getattr(again, name), getattr(truth, name), rtol=0, atol=0, equal_nan=True)
    for name in ("ids", "sources", "queries", "abilities", "about"):
        assert getattr(again, name) == getattr(truth, name)

    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        path.write_bytes(damaged)
        with pytest.raises(EvaluationError, match="Delete it and measure again"):
            Truth.load(path)
    np.savez(path, schema=99)
    with pytest.raises(EvaluationError, match="schema 99"):
        Truth.load(path)


def test_shapes_that_do_not_belong_together_are_refused():
    truth, _ = linear_truth()
    with pytest.raises(EvaluationError, match=r"`base` .* \[12\]"):
        Truth(**{**vars(truth), "base": torch.zeros(3)})


def test_subsets_are_exact_uniform_and_grow_at_the_end():
    drawn = draw_subsets(20, 400, 0.3, seed=5)
    assert (drawn.sum(1) == 6).all()
    # each sample's count is binomial(400, 0.3): 120 +- 4 * 9.2
    assert ((drawn.sum(0) - 120).abs() < 37).all()
    assert torch.equal(draw_subsets(20, 7, 0.3, seed=5), drawn[:7])
    assert not torch.equal(draw_subsets(20, 7, 0.3, seed=6), drawn[:7])
    with pytest.raises(EvaluationError, match=r"0\.01 keeps 0"):
        draw_subsets(20, 7, 0.01, seed=5)
