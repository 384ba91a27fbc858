"""LDS: scipy's number on data made by hand, 1 for the right scores of a linear world, about 0 for shuffled ones."""

import pytest
import scipy.stats
import torch

from fastsft.evaluate import EvaluationError, lds, lds_table
from tests.evaluate._truths import linear_truth


def test_equals_scipy_on_subsets_summed_by_hand():
    truth, _ = linear_truth(noise=2.0)
    scores = torch.randn(40, 12)
    found = lds(scores, truth)
    for q in range(12):
        sums = [sum(float(scores[i, q]) for i in range(40) if truth.subsets[m, i]) for m in range(30)]
        outcome = [-sum(truth.losses[m, :, q].tolist()) / 4 for m in range(30)]
        assert found[q].item() == pytest.approx(scipy.stats.spearmanr(sums, outcome).statistic, abs=1e-12)


def test_right_scores_reach_one_and_shuffled_ones_cover_zero():
    truth, effects = linear_truth()
    torch.testing.assert_close(lds(effects, truth), torch.ones(12, dtype=torch.float64))
    shuffled = effects[torch.randperm(40)]
    rows = {row.method: row for row in lds_table({"right": effects, "bm25": shuffled, "wrong": -effects}, truth)}
    assert list(rows) == ["right", "bm25", "wrong"]
    assert rows["right"].lds == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert rows["wrong"].lds.mean == pytest.approx(-1)
    assert rows["bm25"].lds.low < 0 < rows["bm25"].lds.high
    assert rows["bm25"].difference is None
    assert rows["right"].difference.low > 0.5
    assert rows["right"].of_ceiling == pytest.approx(1)
    assert rows["wrong"].difference.high < -0.5


def test_the_difference_is_paired():
    """Two methods that err alike differ by almost nothing, though each by itself is uncertain."""
    truth, effects = linear_truth(noise=4.0, subsets=14)
    noisy = effects + torch.randn(40, 12)
    rows = {row.method: row for row in lds_table({"bm25": noisy, "other": noisy + 1e-9 * effects}, truth)}
    assert rows["other"].difference == (pytest.approx(0), pytest.approx(0), pytest.approx(0))
    assert rows["other"].lds.high - rows["other"].lds.low > 0.1


def test_a_method_that_scores_abilities_is_judged_on_abilities():
    truth, effects = linear_truth(abilities=("maths", "code", "chat"))
    right = effects @ truth.shares(["maths", "code", "chat"])
    rows = lds_table({"bm25": effects, "in_run": right.float()}, truth)
    assert [(row.method, row.per) for row in rows] == [("bm25", "query"), ("in_run", "ability")]
    assert rows[1].lds.mean == pytest.approx(1)
    # bm25 is added up to abilities for the comparison, where it is as right
    assert rows[1].difference.mean == pytest.approx(0)


def test_subsets_and_seeds_that_are_missing_are_left_out():
    truth, effects = linear_truth(noise=1.0)
    truth.losses[3] = float("nan")
    truth.losses[5, 2:] = float("nan")
    measured = truth.measured()
    assert len(measured.losses) == 29
    kept = [m for m in range(30) if m != 3]
    means = torch.stack([truth.losses[m, : 2 if m == 5 else 4].mean(0) for m in kept])
    torch.testing.assert_close(measured.mean_losses(), means)
    expected = scipy.stats.spearmanr(measured.subsets.double() @ effects[:, 0], -means[:, 0]).statistic
    assert lds(effects, truth)[0].item() == pytest.approx(expected, abs=1e-12)


def test_what_does_not_fit_is_refused():
    truth, effects = linear_truth()
    with pytest.raises(EvaluationError, match=r"\[40, 12\], or \[40, 2\] by ability: got \[40, 3\]"):
        lds_table({"bm25": effects[:, :3]}, truth)
    with pytest.raises(EvaluationError, match=r"\[40, 12\]: got \[39, 12\]"):
        lds(effects[:39], truth)
    truth.losses[1:] = float("nan")
    with pytest.raises(EvaluationError, match="2 of them at least: 1"):
        lds(effects, truth)
