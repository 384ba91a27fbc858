"""A plan from end to end: pilots launched and taken up again, files that a run can start from, what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
import yaml

from fastsft.evaluate import EvaluationError
from fastsft.launch import FINISHED, LaunchError
from fastsft.mixing import plan as module
from fastsft.mixing import read_start
from fastsft.mixing.design import design
from fastsft.mixing.pilots import Ground
from fastsft.mixing.plan import plan_mix
from fastsft.tasks import Mix, MixError
from fastsft.train.config import SourceConfig, load_config
from tests.mixing._planted import exponential
from tests.train._run_file import write_run_file


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    mix = {"policy": "align", "unit": "rows", "max_epochs": 2, "floor": 0.03, "start": "not/yet.yaml"}
    return write_run_file(folder, sections={"train": {"steps": 12}}, mix=mix)


@pytest.fixture
def planted(monkeypatch):
    """In the place of launched pilots, ones whose losses follow a planted law; gives how they were asked for."""
    asked, changed = [], {}
    truth = exponential(2, sources=3)

    def launch(work, jobs, out, **options):
        assert work == "fastsft.mixing.pilots:train_pilot"
        asked.append({"jobs": jobs, "out": out, **options})
        found = {}
        for id, job in jobs.items():
            losses = truth(np.array([list(job["mix"].values())]))[0]
            told = {"before": {"code": 3.0, "maths": 3.0}, "after": dict(zip(("code", "maths"), losses, strict=True))}
            found[id] = {**told, "seconds": 1.0, "tokens": {}, "steps": job["steps"]}
        return {id: {**told, **changed.get(id, {})} for id, told in found.items() if changed.get(id, {}) is not None}

    monkeypatch.setattr(module, "launch", launch)
    return asked, changed, truth


def plan(run_file, **given):
    return plan_mix(run_file, root=run_file.parent, say=lambda line: None, **given)


def test_the_mix_is_found_written_and_readable(run_file, planted, tmp_path):
    asked, _, truth = planted
    found = plan(run_file, out=tmp_path, pilots=12, share=0.5, seed=3)
    [call] = asked
    assert call["out"] == tmp_path
    assert [job["steps"] for job in call["jobs"].values()] == [6] * 12
    tried = np.array([list(job["mix"].values()) for job in call["jobs"].values()])
    assert np.array_equal(tried, design([12, 12, 12], 12, seed=3, least=0.03, most=[0.5] * 3))
    shares = np.array([list(found.weights.values())])
    assert shares.min() >= 0.03 - 1e-9  # the run file's floor
    assert shares.max() <= 0.5 + 1e-9  # 2 epochs of 12 rows, of the 48 that the run draws
    assert truth(shares).mean() < truth(np.full((1, 3), 1 / 3)).mean()
    assert found.predicted.keys() == found.interval.keys() == {"maths", "code"}

    written = yaml.safe_load((tmp_path / "mix.yaml").read_text())
    assert read_start("mix.yaml", tmp_path).weights == Mix(found.weights).weights
    assert written["predicted"]["losses"]["maths"] == pytest.approx(found.predicted["maths"], abs=1e-6)
    assert written["predicted"]["intervals"]["maths"] == pytest.approx(found.interval["maths"], abs=1e-6)
    assert written["gain_over_uniform"]["interval"] == pytest.approx(found.choice.gain_interval, abs=1e-6)
    everything = json.loads((tmp_path / "plan.json").read_text())
    assert everything["choice"]["chosen"]["weights"] == found.weights
    assert [pilot["id"] for pilot in everything["pilots"]] == [f"pilot-{at:03d}" for at in range(12)]
    assert everything["pilots"][4]["after"] == found.pilots[4].after
    assert everything["verdict"] == written["verdict"] == found.choice.verdict
    assert everything["about"]["most"] == {"apples": 0.5, "bricks": 0.5, "clouds": 0.5}


def test_what_is_printed_has_every_source_ability_and_the_verdict(run_file, planted, tmp_path):
    lines = plan(run_file, out=tmp_path, pilots=8).lines()
    assert "8 pilots of 3 steps (25% of the run)" in lines[0]
    firsts = [line.split()[0] for line in lines]
    assert firsts[1:9] == ["source", "apples", "bricks", "clouds", "ability", "code", "maths", "mean"]
    assert len(lines[2].split()) == 5
    assert "gain over uniform: +" in lines[10]
    assert "standard error" in lines[10]
    assert lines[-1].startswith("The p")


def test_priorities_and_prior_reach_the_choice(run_file, planted, tmp_path):
    one = plan(run_file, out=tmp_path, pilots=8, priorities={"maths": 3}, prior="proportional", strength=0.5)
    assert one.choice.priorities == {"code": 0.25, "maths": 0.75}
    assert (one.about["prior"], one.about["strength"]) == ("proportional", 0.5)


def test_pilots_that_ended_late_or_not_finite_are_left_out_and_told(run_file, planted, tmp_path):
    _, changed, _ = planted
    changed["pilot-003"] = {"after": {"code": math.nan, "maths": 2.0}}
    changed["pilot-008"] = None
    found = plan(run_file, out=tmp_path, pilots=9)
    assert [pilot.id for pilot in found.pilots] == [f"pilot-{at:03d}" for at in (0, 1, 2, 4, 5, 6, 7)]
    assert found.notes == [
        "1 of 9 pilots did not fit before the deadline.",
        "Left out, for their losses are not finite: pilot-003. Is train.learning_rate too high?",
    ]
    assert "pilot-003" in str(found)
    changed.update(dict.fromkeys(("pilot-005", "pilot-006", "pilot-007"), None))
    with pytest.raises(MixError, match=r"4 of 9 pilots are usable, and 3 sources need 5 .* kept in"):
        plan(run_file, out=tmp_path, pilots=9)


def test_a_budget_is_a_moment_after_which_no_pilot_is_begun(run_file, planted, tmp_path):
    asked, _, _ = planted
    plan(run_file, out=tmp_path, pilots=6)
    plan(run_file, out=tmp_path, pilots=6, budget="2h")
    assert asked[0]["deadline"] is None
    assert 7100 < asked[1]["deadline"] - module.time.time() < 7200
    with pytest.raises(EvaluationError, match="`budget` must be a time"):
        plan(run_file, out=tmp_path, pilots=6, budget="soon")


def test_settings_that_cannot_hold_are_refused_before_anything_is_loaded(run_file, monkeypatch, tmp_path):
    monkeypatch.setattr(Ground, "of", None)
    for given, words in (
        ({"pilots": 4}, r"4 pilots can't tell 3 sources apart.* give `pilots` 5 or more, better 10"),
        ({"share": 0}, "`share` of the run's steps must be above 0 and at most 1: got 0"),
        ({"share": 1.5}, "got 1.5"),
        ({"seed": -1}, "`seed` must be 0 or more: got -1"),
        ({"prior": "size"}, "`prior` must be one of uniform, proportional"),
        ({"strength": -1}, "`strength` must be a number, at least 0"),
        ({"priorities": {"sums": 1}}, "`priorities` names 'sums', which is no ability of the run"),
    ):
        with pytest.raises(MixError, match=words):
            plan(run_file, out=tmp_path, **given)
    config = load_config(run_file)
    lone = dataclasses.replace(config, sources={"apples": SourceConfig(path="apples.jsonl")})
    with pytest.raises(MixError, match="has one source, 'apples': there is nothing to mix"):
        plan_mix(lone, root=run_file.parent)


def test_pilots_are_trained_once(tmp_path):
    """The real thing: a process is spawned, a tiny model trained four times by a step; then nothing is left to do."""
    sources = {name: {"path": f"{name}.jsonl"} for name in ("apples", "clouds")}
    run_file = write_run_file(tmp_path, sections={"train": {"steps": 4}}, sources=sources)
    out, told = tmp_path / "out-mix", []  # beside the run's own folder
    options = {"root": tmp_path, "pilots": 4, "processes": 1, "say": told.append}
    first = plan_mix(run_file, **options)
    assert first.out == str(out)
    assert [line.split(":")[0] for line in told] == [f"{at} of 4" for at in range(1, 5)]
    lines = (out / FINISHED).read_bytes()
    for pilot in first.pilots:
        assert pilot.after.keys() == {"maths", "code"}
        assert pilot.after != pilot.before
        assert pilot.before == first.pilots[0].before
    assert Mix(first.weights).over(["apples", "clouds"])

    again = plan_mix(run_file, **options)
    assert len(told) == 4
    assert again == first
    assert (out / FINISHED).read_bytes() == lines
    with pytest.raises(LaunchError, match="settings or data changed"):
        plan_mix(run_file, **options, share=0.5)
    assert sorted(path.name for path in out.iterdir()) == ["finished.jsonl", "mix.yaml", "plan.json"]
