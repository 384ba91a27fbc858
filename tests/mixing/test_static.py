"""Mixes without feedback: what they start with, and when a schedule changes."""

import pytest

from fastsft.mixing.static import Schedule, Static, TwoStage, start_mix
from fastsft.tasks import Mix, MixError
from tests.mixing._support import task, told

SIZES = {"a": 1000, "b": 4000}


def test_starts_are_uniform_by_size_or_as_given():
    run = task(tokens=SIZES)
    assert start_mix(None, run).weights == start_mix("uniform", run).weights == {"a": 0.5, "b": 0.5}
    assert start_mix("proportional", run).weights == pytest.approx({"a": 0.2, "b": 0.8})
    assert start_mix({"b": 0.9, "a": 0.1}, run) == start_mix(Mix({"a": 0.1, "b": 0.9}), run)
    tempered = Static(start="proportional", temperature=2.0).begin(run)
    assert tempered.weights == pytest.approx({"a": 1 / 3, "b": 2 / 3})


@pytest.mark.parametrize(
    ("start", "rule"),
    [
        ({"a": 1.2, "b": -0.2}, "the weight of source 'b' must not be negative"),
        ({"a": 0.5, "b": 0.2}, "must sum to one: these sum to 0.7"),
        ({"a": 0.5, "c": 0.5}, "names 'c', which is none of the run's sources a, b"),
        ({"a": 1.0}, "leaves out 'b'"),
        ("even", "must be 'uniform', 'proportional' or"),
    ],
)
def test_bad_starts_are_refused(start, rule):
    with pytest.raises(MixError, match=rule):
        Static(start=start).begin(task())


def test_a_static_mix_stays_whatever_it_is_told():
    policy = Static(start={"a": 0.3, "b": 0.7})
    mix = policy.begin(task())
    assert policy.decide(told(weights={"a": 0.9, "b": 0.1})).weights == mix.weights


def test_a_schedule_changes_at_its_progress():
    policy = Schedule([(0, {"a": 1.0, "b": 0.0}), (0.5, {"a": 0.2, "b": 0.8}), (0.9, {"a": 0.0, "b": 1.0})])
    assert policy.begin(task()).weights == {"a": 1, "b": 0}
    shares = [policy.decide(told(progress=progress)).weights["a"] for progress in (0.25, 0.5, 0.75, 0.9, 1.0)]
    assert shares == [1, 0.2, 0.2, 0, 0]


def test_two_stages_replay_a_share_of_the_first():
    policy = TwoStage(first=["a"], replay=0.25)
    assert policy.begin(task(tokens=SIZES)).weights == {"a": 1, "b": 0}
    # one epoch of a, 1000, then one of b with 250 of a: the second stage begins at 1000 / 5250
    assert policy.decide(told(progress=0.18)).weights["a"] == 1
    late = policy.decide(told(progress=0.2)).weights
    assert late == pytest.approx({"a": 250 / 4250, "b": 4000 / 4250})


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Static(temperature=0), "`temperature` must be positive"),
        (lambda: Static(start="uniform", temperature=2.0), "`temperature` tempers a proportional start"),
        (lambda: Schedule([]), "`stages` must list pairs"),
        (lambda: Schedule([(0.1, {"a": 1.0})]), "must begin at progress 0"),
        (lambda: Schedule([(0, {"a": 1.0}), (0, {"a": 1.0})]), "and rise"),
        (lambda: TwoStage(first="a"), "`first` must list the sources"),
        (lambda: TwoStage(first=["a"], replay=2), "`replay` must be a share"),
        (lambda: TwoStage(first=["c"]).begin(task()), "`first` names 'c', which is none of the run's sources a, b"),
        (lambda: TwoStage(first=["a", "b"]).begin(task()), "`first` holds all of the run's sources"),
    ],
)
def test_bad_settings_are_refused(make, rule):
    with pytest.raises(MixError, match=rule):
        make()
