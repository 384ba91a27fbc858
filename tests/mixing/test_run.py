"""A run file's `mix` and `conflict` become a policy and a resolver, and `fastsft run` trains under them."""

import numpy as np
import pytest

import fastsft
from fastsft.mixing import Align, Guard, Static, UPGrad
from fastsft.mixing.run import steering_of
from fastsft.record import Record
from fastsft.train import ConfigError, Draws, load_config
from tests.train._run_file import write_run_file

ABILITIES = {"apples": "maths", "bricks": "code"}


def steered(folder, *, mix=None, conflict=None):
    sources = {
        source: {"path": f"{source}.jsonl", **({"ability": ABILITIES[source]} if source in ABILITIES else {})}
        for source in ("apples", "bricks", "clouds")
    }
    keys = {key: value for key, value in (("mix", mix), ("conflict", conflict)) if value is not None}
    return write_run_file(folder, sources=sources, **keys)


def test_a_run_file_names_policy_start_draws_and_resolver(tmp_path):
    mix = {"policy": "align", "start": "proportional", "unit": "rows", "max_epochs": 3, "guard": True, "eta": 0.5}
    path = steered(tmp_path, mix={**mix, "max_epochs": 3.0}, conflict={"resolver": "upgrad", "apply": "exact"})
    steering = steering_of(load_config(path))
    assert steering.policy == Guard(Align(start="proportional", eta=0.5, max_epochs=3.0))
    assert steering.draws == Draws(unit="rows", max_epochs=3.0, seed=3)
    assert steering.resolver == UPGrad()
    assert steering.apply == "exact"
    assert steering_of(load_config(steered(tmp_path / "plain"))) is None
    assert steering_of(load_config(steered(tmp_path / "u", mix={"policy": "uniform"}))).policy == Static(
        start="uniform"
    )


@pytest.mark.parametrize(
    ("mix", "conflict", "words"),
    [
        ({"policy": "alin"}, None, "no policy 'alin': did you mean 'align'"),
        ({"policy": "align", "etta": 1.0}, None, "no setting `etta`: did you mean 'eta'"),
        ({"policy": "align", "eta": "big"}, None, "`eta` of the policy 'align' must be a number"),
        ({"policy": "align", "start": {"apples": 0.5, "bricks": 0.6}}, None, "sum to one"),
        ({"policy": "align", "start": {"apples": 1.5, "bricks": -0.5}}, None, "must not be negative"),
        ({"policy": "align", "floor": 0.2}, None, "a floor that cannot hold"),
        ({"policy": "align", "start": {"apples": 1.0}}, None, "leaves out 'bricks'"),
        ({"policy": "align", "start": "plan.yaml"}, None, "no file: write it with `fastsft mix plan`"),
        ({"policy": "slope", "protected": {"cooking": 0.1}}, None, "cooking"),
        (None, {"resolver": "upgrade"}, "no resolver 'upgrade': did you mean 'upgrad'"),
        (None, {"resolver": "gem", "protected": ["cooking"]}, "'cooking', and the run's abilities are code, maths"),
    ],
)
def test_what_can_not_hold_is_refused_before_a_step_is_taken(tmp_path, mix, conflict, words):
    path = steered(tmp_path, mix=mix, conflict=conflict)
    with pytest.raises(ValueError, match=words):
        fastsft.run(load_config(path), root=tmp_path)
    assert not (tmp_path / "out/record.jsonl").exists()


def test_a_source_of_an_ability_without_a_target_is_refused(tmp_path):
    path = steered(tmp_path, mix={"policy": "align"})
    text = path.read_text()
    path.write_text(text.replace("ability: maths", "ability: cooking"))
    with pytest.raises(ConfigError, match=r"sources\.apples\.ability is 'cooking', which has no target"):
        fastsft.run(load_config(path), root=tmp_path)


def test_a_run_under_align_and_upgrad_draws_what_it_decided(tmp_path):
    path = steered(tmp_path, mix={"policy": "align", "max_epochs": 6.0}, conflict={"resolver": "upgrad"})
    run = fastsft.run(load_config(path), root=tmp_path)
    record = Record.open(tmp_path / "out")
    events = list(record.events("mix"))
    assert events[0]["policy"] == "align"
    assert len(events) > 3
    assert any(event["weights"] != event["before"] for event in events[1:])
    supervised = [step["supervised"] for step in record.events("step")]
    weights = {}
    for event in events:
        weights.update(dict.fromkeys(range(event["from_step"], 15), event["weights"]))
    for name in ("apples", "bricks", "clouds"):
        drawn = np.array([step[name] for step in supervised])
        total = np.array([sum(step.values()) for step in supervised])
        wanted = np.array([weights[step][name] for step in range(1, 15)])
        assert abs(drawn.sum() - wanted @ total) < 10  # within one row, the longest has 9 supervised tokens
    assert list(record.events("conflict"))[-1]["resolver"] == "upgrad"
    page = run.record.out / "report.html"
    assert "steered what was drawn" in page.read_text()


def test_a_policy_of_ones_own_is_a_class_with_two_methods(tmp_path, monkeypatch):
    path = steered(tmp_path, mix={"policy": "tests.train._steered:Follow", "rate": 0.5})
    steering = steering_of(load_config(path))
    assert steering.policy.rate == 0.5
    fastsft.run(load_config(path), root=tmp_path)
    assert next(Record.open(tmp_path / "out").events("mix"))["policy"] == "follow"
    with pytest.raises(ConfigError, match="does not take its settings"):
        steering_of(load_config(steered(tmp_path / "b", mix={"policy": "tests.train._steered:Follow", "speed": 1})))
