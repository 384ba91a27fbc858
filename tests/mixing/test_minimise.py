"""The minimum: found where it is known, within its bounds, nearer to the prior the less the pilots say."""

import numpy as np
import pytest

from fastsft.mixing.design import within
from fastsft.mixing.minimise import best_mix, descend, divergence

ONE = np.full(4, 0.25)
FREE = (np.zeros(4), np.ones(4))


class Bowl:
    """Losses that fall to their least at a known mix, smoothly or, as trees' do, by steps; `explained` as told."""

    def __init__(self, at, explained=1.0, steps=None):
        self.at, self.explained, self.steps = np.array(at), explained, steps
        self.losses = np.array([1.0, 3.0])  # of standard deviation 1

    def predict(self, mixes, members=None):
        found = 50 * np.sum((mixes - self.at) ** 2, axis=1)
        if self.steps is None:
            return found
        return np.zeros(len(mixes)) if members else np.ceil(found / self.steps) * self.steps  # laws know nothing of it


@pytest.mark.parametrize("at", [(0.1, 0.2, 0.3, 0.4), (0.7, 0.1, 0.1, 0.1), (0.97, 0.01, 0.01, 0.01)])
@pytest.mark.parametrize("steps", [None, 0.004])
def test_a_known_minimum_is_found(at, steps):
    """Where there are steps, within the lowest: 50 |mix - at|^2 < 0.004, so 0.009 away."""
    found = best_mix(Bowl(at, steps=steps), ONE, *FREE, strength=0.0)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found, at, rtol=0, atol=0.002 if steps is None else 0.009)


def test_bounds_hold_and_the_minimum_is_the_best_within_them():
    low, high = np.array([0.0, 0.05, 0.05, 0.05]), np.array([0.4, 1.0, 1.0, 0.15])
    found = best_mix(Bowl((0.8, 0.0, 0.1, 0.1)), ONE, low, high, strength=0.0)
    assert (found >= low - 1e-9).all()
    assert (found <= high + 1e-9).all()
    # two at their bounds; the other two share what is left over, 0.175 above (0, 0.1) each
    np.testing.assert_allclose(found, [0.4, 0.175, 0.275, 0.15], rtol=0, atol=0.002)


def test_a_source_that_only_harms_is_left_out_wholly():
    found = best_mix(Bowl((0.5, 0.4, 0.3, -0.3)), ONE, *FREE, strength=0.0)
    assert found[3] == 0.0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found[:3], [13 / 30, 10 / 30, 7 / 30], rtol=0, atol=0.002)


def test_the_prior_pulls_as_much_as_was_said():
    """At the minimum all sources' slopes of loss + weight * KL are equal; weight = strength * sd / explained."""
    bowl = Bowl((0.4, 0.3, 0.2, 0.1), explained=0.5)
    found = best_mix(bowl, ONE, *FREE, strength=2.0)
    slopes = 100 * (found - bowl.at) + 2.0 * 1.0 / 0.5 * np.log(found / ONE)
    assert np.ptp(slopes) < 0.3  # of slopes of 10 for 0.1 of share
    assert np.abs(found - bowl.at).max() > 0.01


def test_the_less_is_explained_the_nearer_to_the_prior():
    away = [
        np.abs(best_mix(Bowl((0.7, 0.1, 0.1, 0.1), explained=share), ONE, *FREE, strength=1.0) - ONE).sum()
        for share in (1.0, 0.1, 0.02)
    ]
    assert away[0] > away[1] > away[2] > 0
    for share in (0.0, -2.0):
        found = best_mix(Bowl((0.7, 0.1, 0.1, 0.1), explained=share), ONE, *FREE, strength=1.0)
        np.testing.assert_allclose(found, ONE, rtol=0, atol=1e-12)
    low, high = np.zeros(4), np.array([0.1, 1, 1, 1])
    held = best_mix(Bowl((0.7, 0.1, 0.1, 0.1), explained=0.0), ONE, low, high, strength=1.0)
    np.testing.assert_allclose(held, within(ONE[None], low, high)[0], rtol=0, atol=1e-12)


def test_descent_ends_at_the_minimum_of_a_smooth_bowl():
    bowl = Bowl((0.05, 0.15, 0.3, 0.5))
    np.testing.assert_allclose(descend(bowl.predict, ONE, *FREE), bowl.at, rtol=0, atol=1e-5)


def test_divergence_is_kullback_and_leiblers():
    mixes = np.array([[0.5, 0.5, 0, 0], [0.25] * 4, [1, 0, 0, 0]])
    np.testing.assert_allclose(divergence(mixes, ONE), [np.log(2), 0, np.log(4)], rtol=0, atol=1e-12)


def test_the_same_forecast_gives_the_same_bits():
    one, same = (best_mix(Bowl((0.6, 0.2, 0.1, 0.1), steps=0.1), ONE, *FREE, strength=0.1) for _ in range(2))
    assert one.tobytes() == same.tobytes()
