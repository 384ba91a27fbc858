"""ODM against its formula, written out by hand."""

import math

import numpy as np
import pytest

from fastsft.mixing.odm import Odm, bandit, exploration
from fastsft.tasks import MixError
from tests.mixing._support import task, told

SOURCES = ("a", "b", "c")


def test_eight_decisions_equal_the_formula():
    policy = Odm(floor=0.0)
    drawn_by = policy.begin(task(SOURCES)).weights
    losses = [{"a": 1.0 / t, "b": 2.0 - 0.1 * t, "c": 4.0} for t in range(1, 9)]
    R = dict.fromkeys(SOURCES, 0.0)
    for t, loss in enumerate(losses, start=1):
        decision = policy.decide(told(SOURCES, weights=drawn_by, train_losses=loss))
        R = {s: 0.9 * R[s] + 0.1 * loss[s] / drawn_by[s] for s in SOURCES}
        now = min(1 / 3, math.sqrt(math.log(3) / (3 * t)))
        before = 1 / 3 if t == 1 else min(1 / 3, math.sqrt(math.log(3) / (3 * (t - 1))))
        total = sum(math.exp(before * R[s]) for s in SOURCES)
        pi = {s: (1 - 3 * now) * math.exp(before * R[s]) / total + now for s in SOURCES}
        assert decision.signal == pytest.approx(R)
        assert decision.weights == pytest.approx(pi, abs=1e-12)
        drawn_by = decision.weights
    assert max(pi.values()) > 0.34, "e_t is 1/3 up to t = 3 and falls then, so the rewards move the mix"


def test_a_high_loss_gets_more_even_one_that_never_falls():
    policy = Odm()
    mix = policy.begin(task(SOURCES)).weights
    for _ in range(60):
        mix = policy.decide(told(SOURCES, weights=mix, train_losses={"a": 1.0, "b": 1.0, "c": 8.0})).weights
    assert mix["c"] > 0.45
    assert mix["a"] == pytest.approx(mix["b"])


def test_floors_caps_and_zero_shares_hold():
    policy = Odm(start={"a": 0.5, "b": 0.5, "c": 0.0}, floor=0.1, max_epochs={"b": 2.0})
    mix = policy.begin(task(SOURCES)).weights
    for _ in range(30):
        mix = policy.decide(told(SOURCES, weights=mix, train_losses={"a": 1.0, "b": 9.0, "c": 9.0})).weights
        assert mix["c"] == 0
        # 9000 tokens are still to be drawn, and 1000 of b
        assert mix["b"] <= 1000 / 9000 + 1e-12


def test_exploration_falls_from_one_over_k():
    assert exploration(0, 4) == exploration(1, 4) == 0.25
    assert exploration(400, 4) == pytest.approx(math.sqrt(math.log(4) / 1600))
    assert exploration(3, 1) == 0
    assert bandit(np.zeros(4), 0.25, 0.1) == pytest.approx(np.full(4, 0.25))


def test_a_source_that_was_not_drawn_keeps_its_reward():
    policy = Odm()
    mix = policy.begin(task(SOURCES)).weights
    first = policy.decide(told(SOURCES, weights=mix, train_losses={"a": 1.0, "b": 1.0, "c": 1.0})).signal
    second = policy.decide(told(SOURCES, weights=mix, train_losses={"a": 1.0, "b": math.nan})).signal
    assert second["b"] == first["b"]
    assert second["c"] == first["c"]
    assert second["a"] > first["a"]


def test_it_asks_for_training_losses_and_refuses_what_it_does_not_follow():
    assert Odm.needs_train_losses
    policy = Odm()
    policy.begin(task())
    with pytest.raises(MixError, match="ODM needs `train_losses`"):
        policy.decide(told())
    with pytest.raises(MixError, match="`priorities` has no part in ODM"):
        Odm(priorities={"a": 1.0})
