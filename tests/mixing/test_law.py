"""Surrogates: they recover planted laws, see nothing of the pilot that is left out, and their intervals hold."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr, t

from fastsft.mixing.design import design
from fastsft.mixing.law import (
    LAW,
    MEMBERS,
    PLAIN,
    TREES,
    Blend,
    Surrogate,
    chosen_factor,
    contrast_error,
    fit_law,
    fit_trees,
    interval,
)
from tests.mixing._planted import SIZES, exponential, noisy, pilots, saturating


def fresh(sources, number=300, concentration=1.0):
    return np.random.default_rng(99).dirichlet(np.full(sources, concentration), number)


def off(found, truth):
    """Root mean square error in standard deviations of the truth."""
    return float(np.sqrt(np.mean((found - truth) ** 2)) / truth.std())


@pytest.mark.parametrize("seed", range(3))
def test_the_law_recovers_a_planted_one_from_34_noisy_pilots(seed):
    truth = exponential(seed)
    mixes, losses = pilots(truth, 34, seed=seed)
    asked = fresh(5)
    found = np.stack([fit_law(mixes, losses[:, at])(asked) for at in range(2)], axis=1)
    assert spearmanr(found.mean(1), truth(asked).mean(1)).statistic > 0.98
    # noise of .15 sd a pilot, averaged over 34 for 7 numbers: .15 sqrt(7 / 34) = .07
    assert max(off(found[:, at], truth(asked)[:, at]) for at in range(2)) < 0.14


def test_without_noise_and_ridge_the_law_is_found_exactly(monkeypatch):
    truth = exponential(0)
    mixes, losses = pilots(truth, 34, noise=0)
    law = fit_law(mixes, losses[:, 0])
    assert off(law(fresh(5)), truth(fresh(5))[:, 0]) < 0.05  # what the ridge costs
    monkeypatch.setattr("fastsft.mixing.law._RIDGE", 1e-12)
    law = fit_law(mixes, losses[:, 0])
    assert off(law(fresh(5)), truth(fresh(5))[:, 0]) < 1e-4  # where the search stops
    assert law.slopes.argmin() == 0
    assert law.slopes[4] > 0 > law.slopes[0]
    assert 0 <= law.floor < losses[:, 0].min()


@pytest.mark.parametrize("seed", range(3))
def test_roots_of_shares_beat_shares_on_sparse_mixes_of_a_law_of_roots(seed):
    truth = exponential(seed, sources=8)
    draw = np.random.default_rng(seed)
    mixes = draw.dirichlet(np.full(8, 0.3), 34)
    losses, asked = noisy(truth(mixes), 0.15, draw), fresh(8, concentration=0.3)
    ranks = {}
    for root in (True, False):
        found = np.mean([fit_law(mixes, losses[:, at], root=root)(asked) for at in range(2)], axis=0)
        ranks[root] = spearmanr(found, truth(asked).mean(1)).statistic
    assert ranks[True] > 0.95
    assert ranks[True] > ranks[False] + 0.02


def test_a_floor_is_no_negative_loss_and_lies_below_what_was_seen():
    """A loss that falls in a straight line pulls the floor down for ever."""
    mixes = design(SIZES, 16)
    straight = 0.5 - 0.4 * np.sqrt(mixes[:, 0])
    law = fit_law(mixes, straight)
    assert 0 <= law.floor < straight.min()
    assert off(law(mixes), straight) < 0.1
    assert np.isfinite(fit_law(mixes, straight - 3)(fresh(5))).all()  # losses of no nats


def test_trees_of_sixteen_pilots_are_no_constant():
    mixes, losses = pilots(exponential(0), 16)
    found = fit_trees(mixes, losses[:, 0])(fresh(5))
    assert found.std() > 0.5 * losses[:, 0].std()
    assert spearmanr(found, exponential(0)(fresh(5))[:, 0]).statistic > 0.7


@pytest.fixture(scope="module")
def surrogate():
    mixes, losses = pilots(exponential(0), 18)
    return mixes, losses[:, 0], Surrogate.fit(mixes, losses[:, 0])


def test_a_pilot_left_out_is_not_seen(surrogate):
    """Its loss may be anything: what is said of it stays (the laws', but for where their search starts)."""
    mixes, losses, before = surrogate
    changed = losses.copy()
    changed[6] += 3 * losses.std()
    after = Surrogate.fit(mixes, changed)
    for name, tolerance in ((TREES, 0), (LAW, 1e-3), (PLAIN, 1e-3)):
        assert abs(after.left_out[name][6] - before.left_out[name][6]) <= tolerance * losses.std()
        assert abs(after.members[name](mixes)[6] - before.members[name](mixes)[6]) > 0.02 * losses.std()


def test_members_weigh_by_their_errors_and_add_up(surrogate):
    _, _, found = surrogate
    assert list(found.shares) == list(found.errors) == list(MEMBERS)
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-12)
    assert found.shares[LAW] > found.shares[PLAIN] > found.shares[TREES]  # a law of roots was planted
    for one, other in ((LAW, PLAIN), (LAW, TREES)):
        ratio = (found.errors[other] / found.errors[one]) ** 2
        assert found.shares[one] / found.shares[other] == pytest.approx(ratio, rel=1e-6)
    parts = sum(found.predict(fresh(5), [name]) for name in MEMBERS)
    np.testing.assert_allclose(found.predict(fresh(5)), parts, rtol=1e-12)


def test_steps_are_left_to_trees():
    mixes = design(SIZES, 24)
    steps = 1 + (mixes[:, 0] > 0.2) + 0.5 * (mixes[:, 1] > 0.25)
    found = Surrogate.fit(mixes, steps)
    assert found.shares[TREES] > 0.4


def test_the_same_pilots_give_the_same_bits(surrogate):
    mixes, losses, found = surrogate
    again = Surrogate.fit(mixes, losses)
    assert again.predict(fresh(5)).tobytes() == found.predict(fresh(5)).tobytes()
    assert again.refits(fresh(5, 3)).tobytes() == found.refits(fresh(5, 3)).tobytes()


def test_a_blend_is_the_weighted_mean_and_tells_what_it_explains(surrogate):
    mixes, losses, part = surrogate
    other = Surrogate.fit(mixes, 2 * losses + 1)
    blend = Blend([part, other], [0.25, 0.75])
    asked = fresh(5, 20)
    np.testing.assert_allclose(blend.predict(asked), 0.25 * part.predict(asked) + 0.75 * other.predict(asked))
    np.testing.assert_allclose(blend.losses, 0.25 * losses + 0.75 * (2 * losses + 1))
    assert 0.8 < blend.explained < 1


def test_intervals_hold_about_nine_of_ten_new_pilots():
    """Over truths of both kinds. Jackknife+ warrants 80 %; new mixes of a truth share a fit, so the bound is loose."""
    held = []
    for seed, plant in enumerate([exponential, saturating, saturating]):
        truth = plant(seed, abilities=1)
        draw = np.random.default_rng(seed)
        mixes, asked = draw.dirichlet(np.ones(5), 19), draw.dirichlet(np.ones(5), 100)
        spread = truth(mixes).std()
        losses = truth(mixes)[:, 0] + 0.3 * spread * draw.normal(size=19)
        low, high = interval(Surrogate.fit(mixes, losses), asked)
        measured = truth(asked)[:, 0] + 0.3 * spread * draw.normal(size=100)
        held.append(np.mean((low <= measured) & (measured <= high)))
        assert np.median(high - low) < 4 * np.std(losses)  # and are no truism
    assert 0.8 <= np.mean(held) <= 0.99


class MeanOfPilots:
    """Forecasts the pilots' mean for a mix that is all of the first source, zero for any other."""

    def __init__(self, losses):
        self.losses = losses
        self.residuals = losses - losses.mean()

    def predict(self, mixes):
        return self.losses.mean() * mixes[:, 0]

    def refits(self, mixes):
        n = len(self.losses)
        return np.array([(self.losses.sum() - loss) / (n - 1) * mixes[:, 0] for loss in self.losses])


def test_the_error_of_a_difference_is_the_known_one_for_a_mean():
    losses = np.random.default_rng(0).normal(size=13)
    found = contrast_error(MeanOfPilots(losses), np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert found == pytest.approx(losses.std(ddof=1) / math.sqrt(13), rel=1e-12)


def test_an_interval_is_of_jackknife_plus_quantiles():
    """12 pilots at 90 %: rank ceil(0.9 * 13) = 12, so the largest; at 50 %, the seventh."""
    forecast = MeanOfPilots(np.random.default_rng(0).normal(size=12))
    one = np.array([[1.0, 0.0]])
    up = np.sort(forecast.refits(one)[:, 0] + np.abs(forecast.residuals))
    down = np.sort(forecast.refits(one)[:, 0] - np.abs(forecast.residuals))
    for level, rank in ((0.9, 12), (0.5, 7)):
        low, high = interval(forecast, one, level)
        assert (low[0], high[0]) == (down[12 - rank], up[rank - 1])


def test_a_mix_that_was_chosen_is_judged_more_strictly():
    """With one direction to choose in, Scheffé's factor is Student's."""
    assert chosen_factor(16, 1) == pytest.approx(t.ppf(0.95, 14), rel=1e-9)
    assert chosen_factor(16, 5) == pytest.approx(3.551, abs=1e-3)
    assert chosen_factor(64, 5) < chosen_factor(16, 5) < chosen_factor(16, 8)
