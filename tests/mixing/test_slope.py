"""Slope: its regression against a ridge on all rows, its limits against a solver, its place among the worlds."""

import numpy as np
import pytest
from scipy.optimize import minimize

from fastsft.mixing.ridge import Ridge
from fastsft.mixing.slope import Limit, Slope, within_limits
from fastsft.tasks import MixError
from tests.mixing._support import closed, simulate, task, worlds


def test_the_recursive_posterior_equals_the_ridge_on_all():
    rng, N, K, f = np.random.default_rng(0), 20, 4, 0.9
    X, y, variance = rng.uniform(0, 2, (N, K)), rng.normal(size=N), rng.uniform(0.5, 2, N)
    mean, deviation = rng.normal(size=K), rng.uniform(0.1, 1, K)
    ridge = Ridge(K, f)
    for row in range(N):
        ridge.add(X[row], y[row], variance[row])
    weight = f ** np.arange(N - 1, -1, -1.0) / variance
    # the prior as K rows more: theta_i / deviation_i = mean_i / deviation_i, noise one
    rows = np.vstack([np.sqrt(weight)[:, None] * X, np.diag(1 / deviation)])
    truth = np.linalg.lstsq(rows, np.concatenate([np.sqrt(weight) * y, mean / deviation]), rcond=None)[0]
    theta, covariance = ridge.posterior(mean, deviation)
    # condition numbers are below 1e3, so float64 leaves 12 digits
    assert theta == pytest.approx(truth, abs=1e-11)
    assert covariance == pytest.approx(np.linalg.inv(rows.T @ rows), abs=1e-11)


def test_nothing_told_leaves_the_prior():
    theta, covariance = Ridge(2, 0.9).posterior(np.array([1.0, 2.0]), np.array([0.1, 0.2]))
    assert theta == pytest.approx([1, 2])
    assert covariance == pytest.approx(np.diag([0.01, 0.04]))


@pytest.mark.parametrize("seed", range(6))
def test_limits_hold_at_the_nearest_mix(seed):
    rng, K = np.random.default_rng(seed), 5
    q, low, high = rng.dirichlet(np.ones(K)), np.full(K, 0.02), np.full(K, 0.9)
    slopes = rng.normal(size=(2, K))
    inside = rng.dirichlet(np.ones(K)) * 0.8 + 0.04
    limits = [Limit("a", slopes[0], float(slopes[0] @ inside)), Limit("b", slopes[1], float(slopes[1] @ inside))]
    p, multipliers, broken = within_limits(q, low, high, limits)
    truth = minimize(
        lambda x: float((x * np.log(x / q)).sum()),
        inside,
        bounds=[(0.02, 0.9)] * K,
        constraints=[
            {"type": "eq", "fun": lambda x: x.sum() - 1},
            {"type": "ineq", "fun": lambda x: np.array([limit.room - limit.slopes @ x for limit in limits])},
        ],
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 300},
    ).x
    assert broken == []
    for limit, multiplier in zip(limits, multipliers, strict=True):
        assert limit.slopes @ p <= limit.room + 1e-9
        assert multiplier >= 0
    # 1e-4: the coordinates of the dual take turns until 1e-9 or 20 rounds, and the solver has its own tolerance
    assert p == pytest.approx(truth, abs=1e-4)


def test_a_limit_that_no_mix_keeps_is_named_and_approached():
    q = np.array([0.5, 0.5])
    p, _, broken = within_limits(q, np.full(2, 0.1), np.full(2, 0.9), [Limit("a", np.array([1.0, 0.2]), 0.1)])
    assert broken == ["a"]
    assert p == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("name", ["useless", "harmful", "late"])
def test_it_closes_a_good_part_of_the_gap(name):
    world = worlds()[name]
    assert closed(world, simulate(world, Slope())[0]) > 0.4


def forgetting_world():
    """s1 teaches a1 well, and harms a0, which the run began with."""
    from tests.mixing._support import World

    return World([0.2, 2.0], [0.5, 0.8], [1.0, 0.5], np.eye(2), [20, 40], [[0.0, 0.003], [0.0, 0.0]])


def test_a_protected_ability_is_kept_and_at_a_price():
    world = forgetting_world()
    ends = {}
    for name, protected in (("free", {}), ("kept", {"a0": 0.0})):
        _, mixes, decisions = simulate(world, Slope(protected=protected, jitter=0.0))
        ends[name] = world.losses(mixes[:-1].sum(0) * world.budget / world.decisions)  # tokens, not rates of learning
        ends[f"{name} why"] = " ".join(decision.why for decision in decisions)
    initial = world.initial
    assert ends["free"][0] > initial[0] + 0.1
    assert ends["kept"][0] < initial[0] + 0.03
    assert ends["kept"][1] > ends["free"][1]
    assert "the limit of a0 holds the mix back" in ends["kept why"]
    assert "the limit" not in ends["free why"]


def test_theta_is_told_with_its_errors_and_is_near_the_truth():
    world = worlds(noise=0.1)["harmful"]
    _, _, decisions = simulate(world, Slope())
    theta = decisions[10].details["theta"]
    assert theta["a0"]["s4"] > 0, "the harmful source raises a0"
    assert theta["a0"]["s0"] < 0
    errors = decisions[10].details["theta_errors"]
    assert all(each > 0 for row in errors.values() for each in row.values())


def test_jitter_follows_the_seed_and_decision_alone():
    world = worlds()["no gain"]
    heard = []
    _, first, decisions = simulate(world, Slope(), task=world.task(seed=1), told=heard)
    again = Slope()
    again.begin(world.task(seed=1))
    # by their text, since nan, an error that is not known, is not equal to itself
    assert repr([again.decide(feedback) for feedback in heard]) == repr(decisions)
    _, other, _ = simulate(world, Slope(), task=world.task(seed=2))
    assert (first[2] != other[2]).any()
    assert 0.01 < np.log(first[1] / 0.25).std() < 0.2, "the jitter is 0.05, and the first interval has no signal"


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"forgetting": 0}, "`forgetting` must be above 0"),
        ({"jitter": -1}, "`jitter` must be a number, at least 0"),
        ({"protected": {"a": -0.1}}, r"`protected\.a` must be a number, at least 0"),
        ({"decay": 1}, "`decay` must be below 1"),
    ],
)
def test_bad_settings_are_refused(settings, rule):
    with pytest.raises(MixError, match=rule):
        Slope(**settings)


def test_a_protected_ability_must_have_a_target():
    with pytest.raises(MixError, match="`protected` names 'general', which is no ability with a target of the run"):
        Slope(protected={"general": 0.1}).begin(task())
