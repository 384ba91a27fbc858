"""Removal: the samples with the highest scores go, and what that costs is told beside random removal."""

import pytest
import torch

from fastsft.evaluate import measure_truth, removal
from fastsft.evaluate.removal import ALL, without_top


def quiet(line):
    pass


def test_the_highest_go_and_ties_by_place():
    keep = without_top(torch.tensor([0.5, 2.0, -3.0, 2.0, 0.5]), 3)
    assert keep.tolist() == [False, False, True, False, True]


def test_cost_is_what_the_removed_samples_gave(tiny_run, linear_retraining, tmp_path):
    _, effect, every = linear_retraining
    options = {"out": tmp_path, "say": quiet}
    truth = measure_truth(tiny_run, subsets=4, seeds=2, queries_per_target=4, **options)
    right = torch.tensor([[effect(id, q) for q in range(8)] for id in every])
    by_ability = right @ truth.shares(["code", "maths"]).float()
    rows = removal(tiny_run, {"right": right, "in_run": by_ability, "wrong": -right}, truth, share=0.1, **options)
    cost = {(row.method, row.ability): row.cost for row in rows}
    assert {row.removed for row in rows} == {4}
    for column, ability in enumerate(("code", "maths")):
        best = by_ability[:, column].topk(4).indices
        expected = right[best][:, 4 * column : 4 * column + 4].sum(0).mean().item()
        assert cost["right", ability].mean == pytest.approx(expected, abs=1e-6)
        assert cost["in_run", ability] == pytest.approx(cost["right", ability])
        assert cost["right", ability].mean > 0 > cost["wrong", ability].mean
    both = (cost["right", "maths"].mean + cost["right", "code"].mean) / 2
    assert cost["right", ALL].mean == pytest.approx(both)
    assert cost["right", ALL].low <= both <= cost["right", ALL].high


def test_only_whole_seeds_count(tiny_run, linear_retraining, tmp_path):
    truth = measure_truth(tiny_run, out=tmp_path, subsets=4, seeds=2, queries_per_target=4, say=quiet)
    scores = {"random": torch.randn(36, 8)}
    cut = removal(tiny_run, scores, truth, out=tmp_path, deadline=0.0, say=quiet)
    whole = removal(tiny_run, scores, truth, out=tmp_path, say=quiet)
    for one, other in zip(cut, whole, strict=True):
        assert one.cost.mean == pytest.approx(other.cost.mean)  # the seeds shift all losses alike here
