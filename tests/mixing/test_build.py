"""Policies by name: each name with its settings, refusals with the nearest known word, starts from files."""

import pytest

import fastsft.mixing
from fastsft.mixing import Align, Guard, Odm, Schedule, Slope, Static, TwoStage, Velocity
from fastsft.mixing.build import POLICIES, make_policy, read_start, settings_of
from fastsft.tasks import Decision, Mix, MixError, MixPolicy
from tests.mixing._support import task

SHARES = {"a": 0.3, "b": 0.7}


class Mine:
    """A policy of a user's own."""

    def __init__(self, start=None, speed=1.0):
        self.start, self.speed = start, speed

    def begin(self, task):
        return Mix.uniform(task.names)

    def decide(self, feedback):
        return Decision(weights=feedback.weights, signal={}, error={}, why="mine.")


class Nothing:
    """No policy."""


@pytest.mark.parametrize(
    ("name", "settings", "start", "made"),
    [
        ("uniform", {}, None, Static(start="uniform")),
        ("static", {}, SHARES, Static(start=SHARES)),
        ("temperature", {"temperature": 3}, None, Static(start="proportional", temperature=3)),
        ("temperature", {}, None, Static(start="proportional", temperature=2.0)),
        ("schedule", {"stages": [[0, SHARES]]}, None, Schedule([[0, SHARES]])),
        ("two_stage", {"first": ["a"], "replay": 0.1}, None, TwoStage(first=["a"], replay=0.1)),
        ("odm", {"floor": 0.01}, None, Odm(floor=0.01)),
        ("velocity", {"reachable": {"a": 1.0}}, None, Velocity(reachable={"a": 1.0})),
        ("align", {"eta": 1, "balance": "rate", "max_epochs": {"a": 3}}, "proportional",
         Align(start="proportional", eta=1, balance="rate", max_epochs={"a": 3})),
        ("slope", {"protected": {"b": 0.1}}, SHARES, Slope(start=SHARES, protected={"b": 0.1})),
    ],
)  # fmt: skip
def test_every_name_makes_its_policy(name, settings, start, made):
    policy = make_policy(name, settings=settings, start=start)
    assert isinstance(policy, MixPolicy)
    assert policy == made
    assert sum(policy.begin(task()).weights.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "settings", "rule"),
    [
        ("alig", {}, "there is no policy 'alig': did you mean 'align'"),
        ("zzz", {}, "there are uniform, static"),
        ("align", {"etta": 1.0}, "the policy 'align' has no setting `etta`: did you mean 'eta'"),
        ("align", {"decided": 1}, "has no setting `decided`"),
        ("align", {"start": "uniform"}, "has no setting `start`"),
        ("align", {"eta": "1e-3"}, "`eta` of the policy 'align' must be a number: got '1e-3'"),
        ("align", {"eta": True}, "`eta` of the policy 'align' must be a number: got True"),
        ("align", {"objective": "loss"}, "`objective` must be one of relative, nats"),
        ("align", {"priorities": ["a"]}, "`priorities` of the policy 'align' must be a mapping of names or nothing"),
        ("align", {"max_epochs": "two"}, "must be a number or a mapping of names or nothing: got 'two'"),
        ("schedule", {}, "the policy 'schedule' needs the setting `stages`"),
        ("schedule", {"stages": "late"}, "`stages` of the policy 'schedule' must be a list: got 'late'"),
        ("static", {}, "the policy 'static' draws by its `start`"),
        ("uniform", {"temperature": 2.0}, "the policy 'uniform' has no setting `temperature`"),
        ("no.such.module:Mine", {}, r"can't be loaded \(No module named 'no'\)"),
        ("tests.mixing.test_build:Other", {}, "can't be loaded"),
        ("tests.mixing.test_build:Mine", {"sped": 2.0}, "does not take its settings: got an unexpected .* 'sped'"),
        ("tests.mixing.test_build:SHARES", {}, "does not take its settings"),
        ("tests.mixing.test_build:Nothing", {}, r"must have `begin\(task\)` and `decide\(feedback\)`"),
    ],
)
def test_what_is_wrong_is_refused_with_the_nearest_known(name, settings, rule):
    with pytest.raises(MixError, match=rule):
        make_policy(name, settings=settings)


def test_a_start_where_none_is_taken_is_refused():
    for name in ("uniform", "temperature", "two_stage", "schedule"):
        settings = {"two_stage": {"first": ["a"]}, "schedule": {"stages": [[0, SHARES]]}}.get(name, {})
        with pytest.raises(MixError, match=f"the policy '{name}' takes no `start`"):
            make_policy(name, settings=settings, start=SHARES)
    assert make_policy("uniform", start="uniform") == Static(start="uniform")


def test_a_guard_goes_around_any_policy():
    policy = make_policy("odm", guard=True)
    assert policy == Guard(Odm())
    assert policy.needs_train_losses
    assert make_policy("uniform", guard={"patience": 5}).patience == 5
    with pytest.raises(MixError, match="the policy 'guard' has no setting `patient`: did you mean 'patience'"):
        make_policy("uniform", guard={"patient": 5})


def test_ones_own_policy_is_made_with_its_settings():
    policy = make_policy("tests.mixing.test_build:Mine", settings={"speed": 2.0}, start=SHARES)
    assert type(policy).__name__ == "Mine"
    assert (policy.start, policy.speed) == (SHARES, 2.0)


def test_starts_are_read(tmp_path):
    assert read_start(None) is None
    assert read_start("uniform") == "uniform"
    assert read_start(SHARES) == Mix(SHARES)
    (tmp_path / "mix.yaml").write_text("weights: {a: 0.3, b: 0.7}\nwhy: pilots\n", encoding="utf-8")
    assert read_start("mix.yaml", tmp_path) == read_start(str(tmp_path / "mix.yaml")) == Mix(SHARES)


@pytest.mark.parametrize(
    ("text", "value", "rule"),
    [
        (None, "proportionl", "there is no start 'proportionl': did you mean 'proportional'"),
        (None, "absent.yaml", "absent.yaml, which is no file: write it with `fastsft mix plan`"),
        (None, 3, "`start` must be uniform, proportional, .* got 3"),
        (None, {"a": -1, "b": 2}, "must not be negative"),
        ("weights: [", "mix.yaml", "mix.yaml is not YAML in UTF-8"),
        ("a: 0.5", "mix.yaml", "mix.yaml must hold `weights"),
        ("weights: {a: 0.5}", "mix.yaml", "mix.yaml: the weights of a mix must sum to one"),
        ("weights: {a: much}", "mix.yaml", "mix.yaml: the weight of source 'a' must be a number"),
    ],
)
def test_bad_starts_are_refused(tmp_path, text, value, rule):
    if text is not None:
        (tmp_path / "mix.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(MixError, match=rule):
        read_start(value, tmp_path)


def test_every_setting_that_can_be_told_is_a_real_one():
    for name, kind in POLICIES.items():
        assert settings_of(kind), name
        assert not {"task", "prior", "decided", "intervals", "rewards", "ridges"} & set(settings_of(kind))


def test_every_public_name_is_there_and_another_is_refused_with_them():
    assert all(getattr(fastsft.mixing, name) is not None for name in fastsft.mixing.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'Alignment'; public names: .*Align"):
        _ = fastsft.mixing.Alignment
