"""The shared step: its laws for random inputs, its projection against a solver, its caps, its sentences."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from fastsft.mixing.core import Steps, epoch_caps, project, sentence, with_error
from fastsft.tasks import MixError
from tests.mixing._support import task, told

ROUNDING = 1e-12  # float64 sums of at most 12 terms


def random_case(seed):
    """(steps, weights, prior, signal, error, caps), the caps wide enough for a mix."""
    rng = np.random.default_rng(seed)
    K = int(rng.integers(2, 12))
    prior = rng.dirichlet(np.ones(K))
    steps = Steps(floor=float(rng.uniform(0, 0.5 / K)), trust=float(rng.uniform(0.05, 2)), eta=float(rng.uniform(0, 8)))
    # weights that the steps before could have led to
    weights = project(rng.dirichlet(np.ones(K)), np.minimum(steps.floor, prior), np.ones(K))
    caps = rng.uniform(0, 1, K)
    caps = np.where(rng.random(K) < 0.5, 1.0, caps) if caps.sum() > 1.2 else np.ones(K)
    return steps, weights, prior, rng.normal(size=K), rng.uniform(0, 2, K), caps


@pytest.mark.parametrize("seed", range(40))
def test_a_move_keeps_sum_floors_caps_and_trust(seed):
    steps, weights, prior, signal, error, caps = random_case(seed)
    moved = steps.move(weights, prior, signal, error, caps)
    p = moved.weights
    assert p.sum() == pytest.approx(1, abs=ROUNDING)
    assert (p <= caps + ROUNDING).all()
    assert (p >= np.minimum(np.minimum(steps.floor, prior), caps) - ROUNDING).all()
    free = steps.move(weights, prior, signal, error, np.ones(len(p))).weights
    assert (np.abs(np.log(free / weights)) <= steps.trust + 1e-9).all()


@pytest.mark.parametrize("seed", range(10))
def test_permuting_sources_permutes_the_move(seed):
    steps, *rest = random_case(seed)
    order = np.random.default_rng(seed).permutation(len(rest[0]))
    moved = steps.move(*rest).weights
    assert steps.move(*(each[order] for each in rest)).weights == pytest.approx(moved[order], abs=ROUNDING)


def test_the_step_without_bounds_is_the_formula():
    p, p0, s = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.4, 0.2]), np.array([1.0, 2.0, -1.0])
    steps = Steps(eta=0.7, prior_strength=0.25, floor=0, trust=100, gate=0)
    z = np.clip((s - p @ s) / (p @ np.abs(s)), -2, 2)
    q = p**0.75 * p0**0.25 * np.exp(0.7 * z)
    moved = steps.move(p, p0, s, np.zeros(3), np.ones(3))
    assert moved.z == pytest.approx(z, abs=ROUNDING)
    assert moved.weights == pytest.approx(q / q.sum(), abs=ROUNDING)


@pytest.mark.parametrize("seed", range(8))
def test_projection_equals_a_solver_for_the_nearest_mix(seed):
    rng = np.random.default_rng(seed)
    q = rng.dirichlet(np.ones(5))
    low, high = np.full(5, 0.05), np.maximum(rng.uniform(0.1, 0.5, 5), 0.21)
    found = minimize(
        lambda p: float((p * np.log(p / q)).sum()),
        np.full(5, 0.2),
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    # the solver's own tolerance
    assert project(q, low, high) == pytest.approx(found.x, abs=1e-6)


def test_a_signal_within_its_error_moves_nothing_and_a_clear_one_moves_fully():
    steps, p, s = Steps(gate=1.0), np.full(2, 0.5), np.array([1.0, 2.0])
    # s_i - mean = -+0.5, and its standard error is error / sqrt(2)
    assert steps.pull(p, s, np.full(2, 0.5 * math.sqrt(2) * 1.01)).tolist() == [0, 0]
    assert steps.pull(p, s, np.full(2, 1e-9)) == pytest.approx([-1 / 3, 1 / 3])
    assert steps.pull(p, s, np.full(2, 0.25 * math.sqrt(2))) == pytest.approx([-0.25, 0.25]), "1 - (1/2)^2 of it"
    assert steps.pull(p, s, np.full(2, np.inf)).tolist() == [0, 0]
    assert steps.pull(p, s, np.full(2, np.nan)) == pytest.approx([-1 / 3, 1 / 3]), "an unknown error holds nothing back"
    assert steps.pull(p, np.array([1.0, np.nan]), np.zeros(2)).tolist() == [0, 0], "nothing to compare with"


def test_the_error_of_a_deviation_is_that_of_the_difference():
    rng = np.random.default_rng(0)
    p, error = np.array([0.2, 0.3, 0.5]), np.array([0.3, 0.1, 0.2])
    draws = error * rng.normal(size=(200_000, 3))
    spread = (draws - (draws @ p)[:, None]).std(0)
    for at in range(3):
        s = np.zeros(3)
        s[at] = 1.0
        away = s - p @ s
        for gate, moves in ((0.98, True), (1.02, False)):  # 0.2 % is the error of the spread from 200,000 draws
            z = Steps(gate=gate * abs(away[at]) / spread[at]).pull(p, s, error)
            assert (z[at] != 0) == moves


def test_without_a_signal_a_mix_goes_back_to_its_prior():
    p, p0 = np.array([0.5, 0.4, 0.1]), np.array([0.2, 0.3, 0.5])
    for _ in range(40):
        p = Steps().move(p, p0, np.full(3, np.nan), np.full(3, np.nan), np.ones(3)).weights
    assert p == pytest.approx(p0, abs=1e-5)  # 0.7^40 = 6e-7


def test_a_share_of_zero_stays_and_a_small_start_is_not_lifted_to_the_floor():
    p = np.array([0.0, 0.005, 0.995])
    moved = Steps(floor=0.1).move(p, p, np.array([9.0, 1.0, 1.0]), np.zeros(3), np.ones(3))
    assert moved.weights[0] == 0
    assert moved.weights[1] == pytest.approx(0.005)


def test_caps_win_over_floors_and_trust_and_say_when_they_cannot_all_be_kept():
    p = np.array([0.4, 0.4, 0.2])
    steps = Steps(floor=0.1)
    moved = steps.move(p, p, np.ones(3), np.zeros(3), np.array([0.0, 0.01, 1.0]))
    assert moved.weights == pytest.approx([0, 0.01, 0.99])
    assert moved.said == []
    short = steps.move(p, p, np.ones(3), np.zeros(3), np.array([0.1, 0.3, 0.0]))
    assert short.weights == pytest.approx([0.25, 0.75, 0])
    assert short.said == ["the caps leave no source for 60 % of what is still to be drawn, and can't be kept"]
    none = steps.move(p, p, np.ones(3), np.zeros(3), np.zeros(3))
    assert none.weights == pytest.approx(p)


def test_epoch_caps_leave_what_is_left_of_a_source():
    run = task(tokens={"a": 1000, "b": 5000})
    feedback = told(used={"a": 1500, "b": 1500}, progress=0.5)  # 3000 are still to be drawn
    assert epoch_caps(run, feedback, 2).tolist() == [500 / 3000, 1.0]
    assert epoch_caps(run, feedback, {"b": 0.5}).tolist() == [1.0, 1000 / 3000]
    assert epoch_caps(run, feedback, 1).tolist() == [0.0, 1.0]
    assert epoch_caps(run, feedback, None).tolist() == [1.0, 1.0]


def test_following_the_caps_keeps_every_source_within_its_epochs():
    run, steps, p0 = task(tokens={"a": 1000, "b": 100_000}), Steps(max_epochs=3), np.array([0.5, 0.5])
    p, used = p0, np.zeros(2)
    for at in range(20):
        used = used + 1000 * p
        feedback = told(used={"a": used[0], "b": used[1]}, progress=(at + 1) / 20)
        caps = epoch_caps(run, feedback, steps.max_epochs)
        p = steps.move(p, p0, np.array([2.0, 1.0]), np.zeros(2), caps).weights
    assert used[0] == pytest.approx(3000, rel=1e-9)


def test_a_move_is_said_largest_first_and_a_held_mix_too():
    before, after = np.array([0.2, 0.5, 0.3]), np.array([0.27, 0.40, 0.33])
    said = sentence(["gsm8k", "clinc", "c"], before, after, lambda at: f"r{at}", ["b capped"], "no reason")
    assert said == (
        "clinc down from 0.50 to 0.40: r1; gsm8k up from 0.20 to 0.27: r0; c up from 0.30 to 0.33: r2; b capped."
    )
    assert sentence(["a", "b", "c"], before, before, str, [], "no reason") == "held: no reason."
    many = np.full(6, 1 / 6)
    said = sentence(list("abcdef"), many, many + [0.05, -0.05] * 3, lambda at: "r", [], "")
    assert said.endswith("; 2 more moved.")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.0312, 0.0041, "0.031 ± 0.004"),
        (0.0312, 0.0012, "0.0312 ± 0.0012"),
        (12.0, 3.0, "12 ± 3"),
        (0.5, math.nan, "0.5"),
    ],
)
def test_numbers_are_written_to_the_digit_of_their_error(value, error, text):
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"eta": -1}, "`eta` must be a number, at least 0: got -1"),
        ({"prior_strength": 1.5}, "`prior_strength` must be a number, at least 0, at most 1"),
        ({"floor": "0.1"}, "`floor` must be a number"),
        ({"gate": math.nan}, "`gate` must be a number"),
        ({"trust": 0}, "`trust` must be positive: .* 'static'"),
        ({"max_epochs": {"a": 0}}, "`max_epochs` must be positive: to leave a source out"),
    ],
)
def test_bad_settings_are_refused(settings, rule):
    with pytest.raises(MixError, match=rule):
        Steps(**settings)


def test_a_floor_that_cannot_hold_and_a_cap_on_nothing_are_refused():
    with pytest.raises(MixError, match=r"`floor` 0.3 for 2 sources is a floor that cannot hold: .* at most 0.25"):
        Steps(floor=0.3).check(task())
    with pytest.raises(MixError, match=r"`max_epochs` names 'maths', which is no source of the run: it has a, b"):
        Steps(max_epochs={"maths": 2.0}).check(task())
