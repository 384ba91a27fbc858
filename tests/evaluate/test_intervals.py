"""The bootstrap: ranks and correlations as scipy has them, intervals that cover as often as they say."""

import pytest
import scipy.stats
import torch

from fastsft.evaluate.intervals import Value, crossed_draws, mean_over, spearman, spearman_draws, weighted_mean


def table(M, Q, *, seed, ties):
    values = torch.randn(M, Q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 2).round() if ties else values


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties):
    one, other = table(17, 5, seed=1, ties=ties), table(17, 5, seed=2, ties=ties)
    expected = [scipy.stats.spearmanr(one[:, q], other[:, q]).statistic for q in range(5)]
    assert spearman(one, other).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_every_draw_is_scipys_on_the_rows_it_holds(ties):
    one, other = table(9, 3, seed=1, ties=ties), table(9, 3, seed=2, ties=ties)
    subsets = crossed_draws(9, 3, number=25, seed=4).subsets
    found = spearman_draws(one, other, subsets)
    for draw, counts in enumerate(subsets):
        rows = [row for row, count in enumerate(counts.tolist()) for _ in range(int(count))]
        assert len(rows) == 9
        for q in range(3):
            expected = scipy.stats.spearmanr(one[rows, q], other[rows, q]).statistic
            assert found[draw, q].item() == pytest.approx(expected, abs=1e-12)


def test_a_constant_column_ranks_nothing():
    one = torch.stack([torch.arange(6.0), torch.full((6,), 0.1)], dim=1)
    assert spearman(one, torch.arange(6.0)[:, None].expand(6, 2)).tolist() == [pytest.approx(1.0), 0.0]


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="finite"):
        spearman(torch.tensor([[1.0], [float("nan")]]), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        spearman(torch.ones(3, 1), torch.ones(2, 1))


def test_draws_are_seeded_and_hold_as_many_as_there_are():
    one, again, other = (crossed_draws(7, 4, number=50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.subsets, again.subsets)
    assert torch.equal(one.queries, again.queries)
    assert not torch.equal(one.subsets, other.subsets)
    assert (one.subsets.sum(1) == 7).all()
    assert (one.queries.sum(1) == 4).all()


def test_intervals_of_a_mean_cover_it_about_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(200):
        found = mean_over(1 + torch.randn(40, generator=generator), number=500, seed=trial)
        assert found.low <= found.mean <= found.high
        hits += found.low <= 1 <= found.high
    # 95 % less what the bootstrap loses at n = 40 (about 1.5 %), +- 3 standard errors of 200 trials
    assert 0.88 <= hits / 200 <= 0.985


def test_crossed_draws_see_what_seeds_share():
    """Seeds that shift all queries alike: an interval over the cells alone would be far too narrow."""
    shift = torch.tensor([-1.0, 0.0, 1.0, 2.0])[:, None]
    crossed = mean_over(shift.expand(4, 100))
    assert crossed.mean == pytest.approx(0.5)
    assert crossed.high - crossed.low > 1.5
    assert mean_over(torch.full((3, 5), 2.0)) == Value(2.0, 2.0, 2.0)


def test_a_draw_is_averaged_over_the_queries_it_holds():
    values = torch.tensor([[1.0, 2.0, 4.0]])
    assert weighted_mean(values, torch.tensor([[2.0, 0.0, 1.0]])).tolist() == [2.0]
    assert Value(0.1, 0.01, 0.2).excludes_zero
    assert not Value(0.1, -0.01, 0.2).excludes_zero
