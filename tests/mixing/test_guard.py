"""The guard: whom it stops, whom it leaves, what it caps; around a policy that never moves and one that does."""

import numpy as np
import pytest

from fastsft.mixing.align import Align
from fastsft.mixing.guard import Guard, capped
from fastsft.mixing.odm import Odm
from fastsft.mixing.static import Static
from fastsft.tasks import MixError
from tests.mixing._support import simulate, task, told, worlds

SOURCES = ("a", "b", "c")
OWN = {"a": "a", "b": "a", "c": "c"}


def run(losses, entries, policy=None, **settings):
    """Let a guard see ability a's losses, each source's entries for it the same at every decision."""
    guard = Guard(policy or Static(), **settings)
    weights = guard.begin(task(SOURCES, ("a", "c"), own=OWN)).weights
    decisions = []
    for loss in losses:
        feedback = told(
            SOURCES,
            ("a", "c"),
            losses={"a": loss, "c": 1.0},
            entries={"a": entries, "c": dict.fromkeys(SOURCES, 0.1)},
            weights=weights,
        )
        decisions.append(guard.decide(feedback))
        weights = decisions[-1].weights
    return decisions


def test_a_source_that_raises_its_own_ability_is_stopped_after_patience_and_for_good():
    entries = {"a": 0.1, "b": -0.05, "c": 0.3}
    losses = [1.0, 1.3, 1.05, 1.3, 1.3, 0.9]  # errors are 0.1: 1.05 is no rise, and breaks the row
    shares = [decision.weights for decision in run(losses, entries)]
    assert [share["a"] for share in shares] == pytest.approx([1 / 3] * 4 + [0, 0])
    # b helps its ability, and c was gathered for another: both stay, and take what a had in proportion
    assert shares[-1] == pytest.approx({"a": 0, "b": 0.5, "c": 0.5})


def test_what_was_done_is_said():
    last = run([1.0, 1.3, 1.4], {"a": 0.1, "b": -0.05, "c": 0.3})[-1]
    assert (
        "a is drawn no more: a has lain 0.4 nats above its lowest loss for 2 decisions, and a raised it by 0.2"
        in last.why
    )
    assert last.details["guard"]["stopped"] == {"a": "a"}


def test_patience_and_standard_errors_are_kept():
    entries = {"a": 0.1, "b": -0.05, "c": 0.3}
    assert run([1.0, 1.3, 1.3], entries, patience=3)[-1].weights["a"] > 0
    assert run([1.0, 1.3, 1.3, 1.3], entries, patience=3)[-1].weights["a"] == 0
    assert run([1.0, 1.3, 1.3], entries, standard_errors=4.0)[-1].weights["a"] > 0


def test_the_last_source_is_kept():
    guard = Guard(Static(start={"a": 1.0, "b": 0.0, "c": 0.0}))
    weights = guard.begin(task(SOURCES, ("a", "c"), own=OWN)).weights
    for loss in (1.0, 1.5, 1.5, 1.5):
        entries = {ability: dict.fromkeys(SOURCES, 0.1) for ability in ("a", "c")}
        weights = guard.decide(
            told(SOURCES, ("a", "c"), losses={"a": loss, "c": 1.0}, entries=entries, weights=weights)
        ).weights
    assert weights == {"a": 1, "b": 0, "c": 0}


def test_epochs_are_capped_for_policies_that_have_no_caps():
    guard = Guard(Static(start={"a": 0.5, "b": 0.3, "c": 0.2}), max_epochs={"a": 2.0})
    guard.begin(task(SOURCES, ("a", "c"), own=OWN))
    decision = guard.decide(told(SOURCES, ("a", "c"), used={"a": 1500, "b": 300, "c": 200}, progress=0.5))
    # 500 of a are left, 2000 tokens are still to be drawn
    assert decision.weights == pytest.approx({"a": 0.25, "b": 0.45, "c": 0.3})
    assert "a capped at 0.25 by its epochs" in decision.why


def test_caps_that_leave_too_little_are_said():
    assert capped(np.array([0.5, 0.5]), np.array([0.2, 0.2]))[1] is False
    guard = Guard(Static(), max_epochs=1.0)
    guard.begin(task())
    decision = guard.decide(told())
    assert decision.weights == pytest.approx({"a": 0.5, "b": 0.5})
    assert "the caps leave too little" in decision.why


def test_around_a_steered_policy_a_stopped_source_stays_stopped():
    world = worlds()["harmful"]
    _, mixes, decisions = simulate(world, Guard(Align()))
    assert mixes.sum(1) == pytest.approx(np.ones(len(mixes)))
    decisions_alike = simulate(world, Align())[1]
    assert mixes == pytest.approx(decisions_alike), "nothing overfits here, so the guard changes nothing"
    guarded = run([1.0, 1.5, 1.5, 1.5, 1.5], {"a": 0.1, "b": -0.05, "c": 0.3}, policy=Align())
    assert [decision.weights["a"] for decision in guarded[2:]] == [0, 0, 0]
    assert decisions[-1].details["guard"]["stopped"] == {}


def test_a_new_run_forgets_what_was_stopped():
    guard = Guard(Static())
    weights = guard.begin(task(SOURCES, ("a", "c"), own=OWN)).weights
    entries = {ability: dict.fromkeys(SOURCES, 0.1) for ability in ("a", "c")}
    for _ in range(2):
        for loss in (1.0, 1.5, 1.5):
            feedback = told(SOURCES, ("a", "c"), losses={"a": loss, "c": 1.0}, entries=entries, weights=weights)
            stopped = guard.decide(feedback).details["guard"]["stopped"]
        assert stopped == {"a": "a", "b": "a"}
        assert guard.begin(guard.task).weights == weights
        first = guard.decide(told(SOURCES, ("a", "c"), entries=entries, weights=weights))
        assert first.details["guard"]["stopped"] == {}
        guard.begin(guard.task)


def test_what_the_policy_needs_is_passed_on():
    assert Guard(Odm()).needs_train_losses
    assert not Guard(Static()).needs_train_losses


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"policy": object()}, "`policy` must have `begin` and `decide`: got object"),
        ({"patience": 0}, "`patience` must be a whole number of decisions, at least 1"),
        ({"standard_errors": -1}, "`standard_errors` must be a number"),
        ({"max_epochs": 0}, "`max_epochs` must be positive"),
    ],
)
def test_bad_settings_are_refused(settings, rule):
    with pytest.raises(MixError, match=rule):
        Guard(**{"policy": Static(), **settings})
