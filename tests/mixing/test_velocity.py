"""Velocity: where it gives shares, what it takes to be reachable, and how sources serve abilities."""

import numpy as np
import pytest

from fastsft.mixing.velocity import Velocity, asymptote
from fastsft.tasks import MixError
from tests.mixing._support import closed, simulate, task, told, worlds


def test_shares_go_to_the_ability_with_the_longer_way_left():
    policy = Velocity(reachable={"a": 0.5, "b": 0.5}, gate=0)
    mix = policy.begin(task()).weights
    decision = policy.decide(told(losses={"a": 1.7, "b": 0.8}, weights=mix))
    assert decision.details["left"] == pytest.approx({"a": 0.8, "b": 0.2})
    assert decision.signal == pytest.approx({"a": 0.4, "b": 0.1})
    assert decision.weights["a"] > 0.55
    assert "a has 80 % of its way left" in decision.why
    # the same, with b counting nine times as much
    policy = Velocity(reachable={"a": 0.5, "b": 0.5}, priorities={"b": 9.0}, gate=0)
    policy.begin(task())
    assert policy.decide(told(losses={"a": 1.7, "b": 0.8}, weights=mix)).weights["b"] > 0.55


def test_given_what_can_be_reached_it_closes_most_of_the_gap():
    world = worlds()["harmful"]
    alone = [float(world.losses(world.budget * np.eye(5)[at])[at]) for at in range(4)]  # all tokens to one source
    reach = dict(zip(world.abilities, alone, strict=True))
    found, _, _ = simulate(world, Velocity(reachable=reach))
    assert closed(world, found) > 0.5


def test_an_asymptote_is_read_off_a_curve_that_bends():
    t = np.linspace(0, 8, 9)
    assert asymptote(t, 0.7 + 1.3 * np.exp(-t / 3)) == pytest.approx(0.7, abs=0.02)  # T is one of a grid, 12 % apart
    noisy = 0.7 + 1.3 * np.exp(-t / 3) + 0.01 * np.random.default_rng(0).normal(size=9)
    assert asymptote(t, noisy) == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize(
    "losses",
    [
        [2, 1.9, 1.8, 1.7, 1.6],
        [1, 1.1, 1.2, 1.3, 1.4],
        [2, 1.5, 1.3],
        [2, 2, 2, 2, 2],
        [2.3, 2.1, 1.9, 1.5, 1.6, 1.6],  # a line and noise: the best curve is hardly better
    ],
)
def test_a_line_a_rise_and_too_few_losses_tell_none(losses):
    assert asymptote(range(len(losses)), losses) is None


def test_where_the_reachable_loss_is_from_is_told():
    policy = Velocity(reachable={"a": 0.5})
    mix = policy.begin(task()).weights
    for at in range(6):
        losses = {"a": 1.0, "b": 0.7 + 1.3 * float(np.exp(-(at + 1) / 3))}
        used = {"a": 1000 * (at + 1), "b": 1000 * (at + 1)}
        reach = policy.decide(told(losses=losses, used=used, weights=mix)).details["reachable"]
        assert reach["a"] == {"loss": 0.5, "origin": "given"}
        assert reach["b"]["origin"] == ("guess" if at < 2 else "curve")
    assert reach["b"]["loss"] == pytest.approx(0.7, abs=0.02)


def test_sources_without_abilities_are_linked_by_the_books():
    policy = Velocity(reachable={"x": 0.5, "y": 0.5}, gate=0)
    mix = policy.begin(task(abilities=("x", "y"))).weights
    entries = {"x": {"a": -0.2, "b": -0.02}, "y": {"a": 0.0, "b": -0.1}}
    decision = policy.decide(told(abilities=("x", "y"), entries=entries, losses={"x": 1.8, "y": 0.6}, weights=mix))
    assert decision.details["links"] == {"x": {"a": 1.0, "b": pytest.approx(0.1)}, "y": {"a": 0.0, "b": 1.0}}
    assert decision.details["links_from"] == "books"
    assert decision.weights["a"] > 0.5


def test_an_ability_without_target_is_refused():
    for settings in ({"reachable": {"z": 1.0}}, {"priorities": {"z": 1.0}}):
        with pytest.raises(MixError, match="names 'z', which is no ability with a target of the run: it has a, b"):
            Velocity(**settings).begin(task())
    with pytest.raises(MixError, match=r"`reachable\.a` must be a number, at least 0"):
        Velocity(reachable={"a": -1.0})
