"""Mixes to try: shares, the same for a seed, extendable, and better spread than independent draws."""

import numpy as np
import pytest
from scipy.stats import kstest

from fastsft.mixing.core import project
from fastsft.mixing.design import design, least_distance, spread, within
from fastsft.tasks import MixError

SHAPES = [(2, 16), (3, 14), (5, 16), (8, 33)]


def independent(sources, number, draws=50):
    return [np.random.default_rng(seed).dirichlet(np.ones(sources), number) for seed in range(draws)]


@pytest.mark.parametrize("sources", [2, 3, 7])
@pytest.mark.parametrize("number", [1, 2, 3, 17])
def test_mixes_are_shares_and_begin_with_uniform_and_proportional(sources, number):
    sizes = np.arange(1.0, sources + 1)
    found = design(sizes, number)
    assert found.shape == (number, sources)
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(1), 1, rtol=0, atol=1e-12)
    expected = np.stack([np.full(sources, 1 / sources), sizes / sizes.sum()])[:number]
    np.testing.assert_allclose(found[:2], expected, rtol=0, atol=1e-15)
    assert len(np.unique(found.round(12), axis=0)) == number


def test_uniform_is_tried_once_where_sources_are_of_one_size():
    found = design([7, 7, 7], 6)
    assert (np.abs(found - 1 / 3).max(1) < 1e-9).sum() == 1


def test_a_seed_gives_the_same_bits_and_another_gives_others():
    one, same, other = (design([1, 2, 3], 9, seed=seed) for seed in (4, 4, 5))
    assert one.tobytes() == same.tobytes()
    assert np.abs(one[2:] - other[2:]).max() > 0.05


@pytest.mark.parametrize("more", [8, 9, 40])
def test_fewer_mixes_are_the_first_of_more(more):
    options = {"least": 0.02, "most": [0.5, 1, 1, 1]}
    assert np.array_equal(design([1, 2, 3, 4], 7, **options), design([1, 2, 3, 4], more, **options)[:7])


@pytest.mark.parametrize(("sources", "number"), SHAPES)
def test_mixes_keep_further_apart_than_independent_ones(sources, number):
    """The mean of 8 seeds is above nine of ten independent draws, and the worst of them above the independent mean."""
    ours = [least_distance(spread(sources, number, seed)) for seed in range(8)]
    theirs = [least_distance(mixes) for mixes in independent(sources, number)]
    assert np.mean(ours) > np.quantile(theirs, 0.9)
    assert min(ours) > np.mean(theirs)


@pytest.mark.parametrize(("sources", "number"), SHAPES)
def test_each_sources_shares_are_spread_more_evenly_than_independent_ones(sources, number):
    """Kolmogorov's distance to the shares of mixes that are uniform on the simplex, the worst source's."""

    def worst(mixes):
        uniform = [kstest(mixes[:, at], lambda x: 1 - (1 - x) ** (sources - 1)).statistic for at in range(sources)]
        return max(uniform)

    ours = [worst(spread(sources, number, seed)) for seed in range(8)]
    assert np.mean(ours) < 0.75 * np.mean([worst(mixes) for mixes in independent(sources, number)])


def test_least_and_most_are_kept_and_the_first_two_stay():
    most = [0.1, 0.4, 1.0, 1.0]
    found = design([1, 2, 3, 14], 20, least=0.05, most=most)
    assert found[2:].min() >= 0.05 - 1e-12
    assert (found[2:] <= np.array(most) + 1e-12).all()
    np.testing.assert_allclose(found[1], [0.05, 0.1, 0.15, 0.7])
    np.testing.assert_allclose(found[0], 0.25)


def test_within_gives_what_the_exact_projection_of_one_mix_does():
    draw = np.random.default_rng(0)
    mixes = np.concatenate([draw.dirichlet(np.full(4, 0.5), 50), [[1.0, 0, 0, 0]]])
    low, high = np.array([0.05, 0, 0.1, 0.0]), np.array([0.3, 0.6, 1.0, 0.2])
    found = within(mixes, low, high)
    for row, mix in zip(found, np.maximum(mixes, 1e-12), strict=True):
        np.testing.assert_allclose(row, project(mix, low, high), rtol=0, atol=1e-9)  # 64 halvings of 60


def test_what_cannot_be_designed_is_refused():
    for sizes, number in (([1.0], 4), ([1, 0], 4), ([1, 2], 0)):
        with pytest.raises(MixError, match="positive `sizes` of two sources or more"):
            design(sizes, number)
    with pytest.raises(MixError, match=r"below 1/2: got 0.5"):
        design([1, 1], 4, least=0.5)
    with pytest.raises(MixError, match=r"sum to one or more: got \[0.4, 0.5\], which sum to 0.9"):
        design([1, 1], 4, most=[0.4, 0.5])
