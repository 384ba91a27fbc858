"""Align in worlds whose best static mix is known; its estimates against hand computations; its laws."""

import numpy as np
import pytest

from fastsft.mixing.align import Align
from fastsft.mixing.rates import Intervals, followed
from fastsft.tasks import Mix, MixError
from tests.mixing._support import Conflict, World, closed, simulate, task, told, worlds

SEEDS = range(3)


def mean_closed(world, **settings):
    return np.mean([closed(world, simulate(world, Align(slack=0.0, **settings), seed=seed)[0]) for seed in SEEDS])


@pytest.mark.parametrize("name", ["transfer", "useless", "harmful", "saturating", "late"])
def test_it_closes_most_of_the_gap_between_uniform_and_the_best_static_mix(name):
    assert mean_closed(worlds()[name]) > 0.5


def test_where_a_source_harms_noise_may_be_four_times_as_large():
    assert mean_closed(worlds(noise=2.0)["harmful"]) > 0.4


def test_small_differences_move_nothing():
    """The slack is in units of the mix's mean return: 0.6 of it either way is no reason to move."""
    for least, moves in ((0.5, False), (0.1, True)):
        entries = {"a": {"a": -0.1, "b": 0.0}, "b": {"a": 0.0, "b": -0.1 * least}}
        policy = Align(horizon=0.0)
        policy.begin(task())
        for _ in range(3):
            decision = policy.decide(told(entries=entries))
        assert (decision.weights["a"] > 0.5) == moves


def test_a_mix_that_was_given_is_held_to():
    entries = {"a": {"a": -0.1, "b": 0.0}, "b": {"a": 0.0, "b": 0.0}}
    ends = {}
    for name, start in (("given", {"a": 0.5, "b": 0.5}), ("uniform", "uniform")):
        policy = Align(start=start)
        weights = policy.begin(task()).weights
        for _ in range(40):
            weights = policy.decide(told(entries=entries, weights=weights)).weights
        ends[name] = weights["a"]
    assert 0.6 < ends["given"] < ends["uniform"]


def test_without_noise_returns_are_equal_at_the_end():
    world = worlds(noise=0.0)["useless"]
    _, mixes, decisions = simulate(world, Align(prior_strength=0.05, eta=1.0, slack=0.0))
    value = np.array([decisions[-1].signal[name] for name in world.sources])
    useful = value[:4]
    assert useful.max() / useful.min() < 1.25  # uniform ends with a ratio of 2.4
    assert value[4] == pytest.approx(0, abs=1e-12)
    assert mixes[-1, 4] == pytest.approx(0.02), "the floor"


@pytest.mark.parametrize("name", ["no gain", "no gain, all transfer"])
@pytest.mark.parametrize(("noise", "most"), [(0.5, 1.005), (1.0, 1.005), (2.0, 1.006)])  # measured at 2: .53 %
def test_where_nothing_can_be_gained_it_loses_half_a_percent_at_most(name, noise, most):
    world = worlds(noise=noise)[name]
    K = len(world.sources)
    for seed in SEEDS:
        found, _, _ = simulate(world, Align(), seed=seed)
        assert found < most * world.static(np.full(K, 1 / K))


def test_a_contrary_source_is_left_and_a_short_sight_costs_little():
    world = Conflict(2, contrary=True, slow=1.0)
    found, mixes, _ = simulate(world, Align())
    uniform = world.static(np.full(5, 0.2))
    assert found < 0.9 * uniform, "the best static mix found ends at 0.862 of it"
    assert mixes[-1, 4] < 0.05
    # flat directions pay only late, which it does not see: here it loses to uniform, by 1.1 %
    short = Conflict(1, contrary=False, slow=1.0)
    assert simulate(short, Align())[0] < 1.02 * short.static(np.full(4, 0.25))


def test_replaying_feedback_gives_the_same_bits_and_a_new_run_starts_anew():
    world, policy, heard = worlds()["harmful"], Align(balance="rate"), []
    _, mixes, decisions = simulate(world, policy, told=heard)
    for again in (Align(balance="rate"), policy):
        assert list(again.begin(world.task()).weights.values()) == mixes[0].tolist()
        # by their text, since nan, an error that is not known, is not equal to itself
        assert repr([again.decide(feedback) for feedback in heard]) == repr(decisions)


def test_permuting_sources_permutes_the_answer():
    world, order = worlds()["eight"], [5, 2, 7, 0, 1, 6, 3, 4]
    heard = []
    _, mixes, _ = simulate(world, Align(), told=heard)
    run, policy = world.task(), Align()
    policy.begin(type(run)(**{**vars(run), "sources": tuple(run.sources[at] for at in order)}))
    for feedback, mix in zip(heard, mixes[1:], strict=True):
        again = policy.decide(feedback).weights
        # sums in another order: rounding, times the trust region's exp over 30 decisions
        assert [again[name] for name in world.sources] == pytest.approx(mix.tolist(), abs=1e-9)


def test_the_signal_is_what_a_thousand_tokens_do():
    intervals = Intervals(["a", "b"], ["x", "y"], decay=0.5)
    entries = [
        {"x": {"a": -0.2, "b": 0.0}, "y": {"a": 0.0, "b": -0.1}},
        {"x": {"a": -0.1, "b": 0.0}, "y": {"a": 0.0, "b": -0.05}},
    ]
    for each in entries:
        intervals.add(told(abilities=("x", "y"), entries=each, tokens={"a": 1000, "b": 500}))
    # half of everything happened in the second interval, so relative value is steady: 2/3 of what moved is a's, by
    # 2/3 of the tokens; the scale is what moves now, (0.5 * 0.15 + 0.075) / (0.5 * 1.5 + 1.5) a thousand, w = 1/2
    rates = intervals.rates(np.array([0.5, 0.5]))
    scale = (0.5 * 0.15 + 0.075) / 2.25
    assert rates.signal == pytest.approx([scale, scale])
    assert rates.error == pytest.approx([0, 0], abs=1e-15)
    A, errors = intervals.table()
    assert A == pytest.approx(np.array([[0.2 / 1.5 * 1.0, 0], [0, 0.1 / 1.5 * 2.0]]))
    assert errors == pytest.approx(np.zeros((2, 2)), abs=1e-15)


def test_standard_errors_cover_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), []
    tokens = rng.uniform(0.5, 2, (12, 3))
    for _ in range(400):
        values = tokens * [1.0, 2.0, 0.0] + np.sqrt(tokens) * rng.normal(size=tokens.shape)
        value, error = followed(values, tokens, decay=0.8)
        hits.append(np.abs(value - [1.0, 2.0, 0.0]) < error)
    # a normal's share within one is .68; .64 to .72 is 4 standard deviations of 1200 draws, and errors are estimates
    assert 0.60 < np.mean(hits) < 0.72


def test_a_trend_hardly_counts_as_noise_and_one_interval_has_no_error():
    tokens = np.ones((10, 2))
    steady = np.linspace(10, 1, 10)[:, None] * [1.0, 1.0]
    assert (followed(steady, tokens, 0.5)[1] < 1).all(), "the standard deviation of the values is 2.9"
    assert np.isinf(followed(steady[:1], tokens[:1], 0.5)[1]).all()


def test_a_source_that_is_not_drawn_has_no_signal():
    value, error = followed(np.array([[1.0, 0.0], [1.1, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]), 0.5)
    assert np.isfinite(value[0])
    assert np.isnan([value[1], error[1]]).all()
    policy = Align(start={"a": 1.0, "b": 0.0})
    policy.begin(task())
    entries = {"a": {"a": -0.1, "b": 0.0}, "b": {"a": -0.1, "b": 0.0}}
    for _ in range(3):
        decision = policy.decide(told(entries=entries, tokens={"a": 1000, "b": 0}, weights={"a": 1.0, "b": 0.0}))
    assert decision.weights == {"a": 1.0, "b": 0.0}
    assert decision.signal["b"] == 0
    assert np.isnan(decision.error["b"])


def test_the_first_interval_moves_nothing_and_says_so():
    policy = Align()
    mix = policy.begin(task())
    decision = policy.decide(told(entries={"a": {"a": -0.1, "b": 0.0}, "b": {"a": -0.1, "b": 0.0}}))
    assert Mix(decision.weights) == mix
    assert decision.why.startswith("held: 1 interval of the books has no standard error yet")


def test_moves_are_said_in_nats():
    policy = Align()
    weights = policy.begin(task()).weights
    for lower in (0.105, 0.095, 0.1):
        entries = {"a": {"a": -lower, "b": 0.0}, "b": {"a": 0.0, "b": 0.004}}
        decision = policy.decide(told(entries=entries, weights=weights))
    assert decision.why.startswith("a up from 0.50 to 0.")
    assert "a thousand more of its tokens lower the loss by 0.04" in decision.why
    assert "b down from 0.50 to 0." in decision.why
    assert "a thousand more of its tokens raise the loss by 0.00" in decision.why


def test_relative_losses_make_abilities_on_other_scales_alike():
    # the same world twice, the second ability's loss ten times as high
    entries = {"a": {"a": -0.1, "b": 0.0}, "b": {"a": 0.0, "b": -1.0}}
    found = {}
    for objective in ("relative", "nats"):
        policy = Align(objective=objective, slack=0.0)
        policy.begin(task())
        for _ in range(2):
            found[objective] = policy.decide(
                told(entries=entries, initial={"a": 2.0, "b": 20.0}, losses={"a": 1.0, "b": 10.0})
            ).weights["b"]
    assert found["relative"] == pytest.approx(0.5)
    assert found["nats"] > 0.54


def test_priorities_and_balance_move_what_abilities_count():
    entries = {"a": {"a": -0.1, "b": 0.0}, "b": {"a": 0.0, "b": -0.1}}
    policy = Align(priorities={"b": 3.0}, slack=0.0)
    policy.begin(task())
    for _ in range(2):
        decision = policy.decide(told(entries=entries))
    assert decision.details["importance"] == pytest.approx({"a": 0.25, "b": 0.75})
    assert decision.weights["b"] > 0.54
    # b improves slowly, so it counts more at every interval
    policy, counts = Align(balance="rate"), []
    policy.begin(task())
    for _ in range(3):
        decision = policy.decide(told(entries=entries, measured={"a": -0.3, "b": -0.1}))
        counts.append(decision.details["importance"]["b"])
    assert 0.5 < counts[0] < counts[1] < counts[2]
    # rates 0.15 and 0.05 of the initial loss differ from their mean by half of it: exp(0.2 * 0.5) against its inverse
    assert counts[0] == pytest.approx(1 / (1 + np.exp(-0.2)))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"decay": 1.0}, "`decay` must be below 1"),
        ({"objective": "loss"}, "`objective` must be one of relative, nats: got 'loss'"),
        ({"balance": "none"}, "`balance` must be one of fixed, rate"),
        ({"priorities": {"a": -1.0}}, r"`priorities\.a` must be a number, at least 0"),
    ],
)
def test_bad_settings_are_refused(settings, rule):
    with pytest.raises(MixError, match=rule):
        Align(**settings)


def test_priorities_for_what_the_run_has_not_are_refused():
    with pytest.raises(MixError, match="`priorities` names 'c', which is no ability with a target of the run"):
        Align(priorities={"c": 1.0}).begin(task())
    with pytest.raises(MixError, match="all are 0"):
        Align(priorities={"a": 0.0, "b": 0.0}).begin(task())
    with pytest.raises(MixError, match="a floor that cannot hold"):
        Align(floor=0.4).begin(task())


def test_floors_and_caps_hold_through_a_run():
    world = World([1, 1], [0.5, 1.5], [0.3, 0.5], np.eye(2), [60, 4])
    run = world.task(tokens=50_000)
    _, mixes, _ = simulate(world, Align(floor=0.1, max_epochs={"s0": 2.0}), task=run)
    assert (mixes[:-1, 1] >= 0.1 - 1e-12).all()
    used = 1000 * world.budget / world.decisions * mixes[:-1, 0].sum()
    assert used < 100_000 * (1 + 1e-3)  # tokens are told in whole numbers
    assert np.abs(np.diff(np.log(mixes[:3]), axis=0)).max() <= 0.5 + 1e-9
