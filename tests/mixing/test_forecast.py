"""The choice: near the planted optimum from 16 pilots, within bounds, honest about its gain, and not led by noise."""

import numpy as np
import pytest

from fastsft.mixing.design import spread
from fastsft.mixing.forecast import choose, weights_of
from fastsft.mixing.law import MEMBERS
from fastsft.tasks import Mix, MixError
from tests.mixing._planted import NAMES, SIZES, exponential, flat, pilots, saturating

UNIFORM = np.full((1, 5), 0.2)


def chosen(mixes, losses, **settings):
    named = {f"ability-{at}": losses[:, at] for at in range(losses.shape[1])}
    return choose(mixes, named, sizes=dict(zip(NAMES, SIZES, strict=True)), **settings)


def mix_of(forecast):
    return np.array([list(forecast.weights.values())])


@pytest.fixture(scope="module")
def planted():
    """A truth of each kind, 16 pilots with noise, and what was chosen from them."""
    found = []
    for plant in (exponential, saturating):
        truth = plant(2)
        mixes, losses = pilots(truth, 16, seed=2)
        found.append((truth, mixes, losses, chosen(mixes, losses)))
    return found


def test_the_choice_closes_most_of_the_gap_from_uniform_to_the_planted_optimum(planted):
    for truth, _, _, choice in planted:
        best = truth(spread(5, 4096, 7)).mean(1).min()
        uniform, reached = truth(UNIFORM).mean(), truth(mix_of(choice.chosen)).mean()
        assert (uniform - reached) / (uniform - best) > 0.85
        assert choice.chosen.weights["elms"] < 0.05  # it harms
        assert choice.explained > 0.5


def test_the_true_gain_and_the_true_losses_lie_within_their_intervals(planted):
    for truth, _, _, choice in planted:
        true = truth(UNIFORM).mean() - truth(mix_of(choice.chosen)).mean()
        assert choice.gain_interval[0] < true < choice.gain_interval[1]
        assert choice.gain_interval[0] < choice.gain < choice.gain_interval[1]
        assert 0 < choice.gain_error < true
        for forecast in (choice.chosen, choice.uniform, choice.proportional):
            for loss, (low, high) in zip(truth(mix_of(forecast))[0], forecast.intervals.values(), strict=True):
                assert low < loss < high


def test_a_gain_beyond_doubt_is_told_as_one(planted):
    _, _, _, choice = planted[0]
    assert choice.gain_interval[0] > 0
    assert choice.verdict.startswith("The pilots show a gain over the uniform mix")


def test_a_choice_is_a_mix_with_its_anchors_beside_it(planted):
    for _, _, losses, choice in planted:
        assert list(Mix(choice.chosen.weights).weights) == list(NAMES)
        assert set(choice.uniform.weights.values()) == {0.2}
        assert choice.proportional.weights["bricks"] == pytest.approx(2 / 15)
        assert choice.gain == pytest.approx(choice.uniform.mean - choice.chosen.mean, abs=1e-12)
        assert choice.chosen.mean == pytest.approx(np.mean(list(choice.chosen.losses.values())), abs=1e-12)
        for ability in ("ability-0", "ability-1"):
            assert list(choice.errors[ability]) == list(choice.shares[ability]) == list(MEMBERS)
            assert min(choice.errors[ability].values()) < losses.std(0).max()


def test_where_no_mix_is_better_the_prior_stays_and_it_is_said():
    """Four worlds of nothing but noise. Held to the prior in most, and never told as a gain."""
    stayed = 0
    for seed in range(4):
        mixes, losses = pilots(flat(seed, abilities=1), 16, seed=seed)
        choice = chosen(mixes, losses)
        stayed += np.abs(mix_of(choice.chosen) - UNIFORM).max() < 1e-9
        assert choice.gain_interval[0] <= 0
        assert "show a gain" not in choice.verdict
        if choice.gain <= choice.gain_error:
            assert choice.verdict.startswith("The pilots show no gain over the uniform mix")
    assert stayed >= 3


def test_bounds_hold_and_cost(planted):
    _, mixes, losses, free = planted[0]
    most = [0.25, 0.3, 1.0, 1.0, 1.0]
    held = chosen(mixes, losses, least=0.04, most=most)
    shares = mix_of(held.chosen)[0]
    assert shares.min() >= 0.04 - 1e-9
    assert (shares <= np.array(most) + 1e-9).all()
    assert free.chosen.weights["apples"] > 0.25
    assert held.chosen.mean > free.chosen.mean


def test_priorities_draw_the_mix_to_their_ability(planted):
    _, mixes, losses, even = planted[0]
    first = chosen(mixes, losses, priorities={"ability-1": 0.0})
    assert first.priorities == {"ability-0": 1.0, "ability-1": 0.0}
    assert first.chosen.weights["apples"] > even.chosen.weights["apples"] + 0.1
    assert first.chosen.losses["ability-0"] < even.chosen.losses["ability-0"]


def test_the_prior_is_the_one_that_was_named(planted):
    _, mixes, losses, _ = planted[0]
    held = chosen(mixes, losses, prior="proportional", strength=1e4)
    np.testing.assert_allclose(mix_of(held.chosen), mix_of(held.proportional), rtol=0, atol=1e-3)


def test_the_same_pilots_give_the_same_bits(planted):
    _, mixes, losses, choice = planted[1]
    assert chosen(mixes, losses) == choice


def test_settings_that_cannot_hold_are_refused():
    mixes, losses = pilots(exponential(0), 6)
    with pytest.raises(MixError, match=r"6 pilots can't tell 5 sources apart.* 7 numbers: give `pilots` 7 or more"):
        chosen(mixes, losses)
    mixes, losses = pilots(exponential(0), 7)
    with pytest.raises(MixError, match="`prior` must be one of uniform, proportional: got 'size'"):
        chosen(mixes, losses, prior="size")
    with pytest.raises(MixError, match="`strength` must be a number, at least 0: got -1"):
        chosen(mixes, losses, strength=-1)
    with pytest.raises(MixError, match="`priorities` names 'sums', which is no ability of the run"):
        weights_of(["maths", "code"], {"sums": 1})
    with pytest.raises(MixError, match=r"`priorities.code` must be a number, at least 0: got -1"):
        weights_of(["maths", "code"], {"code": -1})
    with pytest.raises(MixError, match="a finite weight above 0"):
        weights_of(["maths"], {"maths": 0})
    assert weights_of(["maths", "code"], {"code": 3}) == {"maths": 0.25, "code": 0.75}
