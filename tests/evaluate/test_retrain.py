"""Retraining: on all samples it is the run again, on some it is the run that had only these, and it leaves no trace."""

import subprocess
import sys

import pytest
import torch
import yaml

from fastsft.data import DataError
from fastsft.evaluate import query_losses, retrain
from fastsft.evaluate.retrain import evenly, study_of
from fastsft.train import Draws, FinishedRun, Steering, load_config
from fastsft.train.loop import run as run_file
from tests.attribution.methods._support import summed_loss
from tests.train._run_file import write_run_file
from tests.train._steered import ABILITIES, Follow, Lean
from tests.train._support import make_model, make_rows


def job(run, **changed):
    return {"run": str(run), "root": None, "keep": None, "seed": 3, "queries": None, **changed}


def losses_of(run):
    """The query losses at a run's last checkpoint."""
    finished = FinishedRun.open(run)
    model, _, pad_id = finished.load(finished.checkpoint())
    queries = study_of(str(run), None).queries(None)
    return query_losses(model, [query.row for query in queries], pad_id).tolist()


def test_what_a_worker_imports_is_light():
    heavy = ["scipy", "sklearn", "altair", "datasets", "typer", "jinja2", "triton", "trl"]
    code = f"import sys, fastsft.evaluate.retrain; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_on_all_samples_it_is_the_run_again(tiny_run):
    found = retrain(job(tiny_run))
    assert found["after"] == losses_of(tiny_run)
    assert found["steps"] == 6
    assert found["rows"] == 36
    assert found["before"] != found["after"]
    again = retrain(job(tiny_run))  # the base model was not touched
    assert (again["before"], again["after"]) == (found["before"], found["after"])
    other = retrain(job(tiny_run, seed=4))
    assert other["before"] == found["before"]
    assert other["after"] != found["after"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_on_some_it_is_the_run_that_had_only_these(tmp_path, method):
    """Two of three sources: two thirds of the steps."""
    runs = []
    for name, steps, sources in (("all", 6, ("apples", "bricks", "clouds")), ("two", 4, ("apples", "clouds"))):
        folder = tmp_path / name
        paths = {each: {"path": f"{each}.jsonl"} for each in sources}
        path = write_run_file(folder, sections={"train": {"steps": steps, "method": method}}, sources=paths)
        # what retraining reads of a run directory
        (folder / "out").mkdir()
        settings = {**yaml.safe_load(path.read_text()), "root": str(folder)}
        (folder / "out" / "config.yaml").write_text(yaml.safe_dump(settings))
        runs.append(folder / "out")
    kept = [f"{source}-{number}" for source in ("clouds", "apples") for number in range(12)]
    before = set(tmp_path.rglob("*"))
    found = retrain(job(runs[0], keep=kept))
    assert found["steps"] == 4
    assert found["after"] == retrain(job(runs[1]))["after"]
    assert found["after"] != found["before"]
    assert set(tmp_path.rglob("*")) == before


def test_queries_are_spread_over_each_target_or_read_from_a_file(tiny_run):
    study = study_of(str(tiny_run), None)
    names = [query.name for query in study.queries(2)]
    assert names == ["code/code-0", "code/code-2", "maths/maths-0", "maths/maths-2"]
    assert len(study.queries(None)) == len(study.queries(99)) == 8
    assert [row.id for row in evenly(make_rows(7, prefix="r"), 3)] == ["r-0", "r-2", "r-4"]
    file = study.queries("apples.jsonl")
    assert [query.name for query in file[:2]] == ["queries/apples-0", "queries/apples-1"]
    with pytest.raises(DataError, match="1 or more: got 0"):
        study.queries(0)


def test_samples_to_keep_must_be_the_runs(tiny_run):
    with pytest.raises(DataError, match=r"2 ids, of which 1 are of no row \(plums-0 ...\)"):
        retrain(job(tiny_run, keep=["apples-0", "plums-0"]))
    with pytest.raises(DataError, match="at least one: got 0 ids"):
        retrain(job(tiny_run, keep=[]))


@pytest.mark.parametrize("max_tokens", [1, 40, 10**6])
def test_losses_are_each_rows_own_whatever_stands_beside_it(max_tokens):
    model = make_model(dropout=0.3).double().train()
    rows = make_rows(9)
    found = query_losses(model, rows, 0, max_tokens=max_tokens)
    assert model.training
    model.eval()
    expected = [summed_loss(model, row).item() / row.num_supervised for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def steered_run(folder, **given):
    """A run under a policy that follows the books."""
    path = write_run_file(folder, mix={"policy": "follow"}, sections={"train": {"save_every": 14}})
    steering = Steering(policy=Follow(), draws=Draws(seed=3), abilities=ABILITIES, **given)
    run_file(load_config(path), root=folder, steering=steering)
    return folder / "out"


def test_a_steered_run_is_repeated_by_its_recorded_mixes(tmp_path):
    run = steered_run(tmp_path)
    found = retrain(job(run, root=str(tmp_path)))
    finished = FinishedRun.open(run, root=tmp_path)
    model, _, pad_id = finished.load(finished.checkpoint())
    queries = study_of(str(run), str(tmp_path)).queries(None)
    assert found["after"] == query_losses(model, [query.row for query in queries], pad_id).tolist()
    keep = [row.id for row in study_of(str(run), str(tmp_path)).prepared.rows if row.source != "bricks"]
    assert retrain(job(run, root=str(tmp_path), keep=keep))["steps"] == 9  # 24 of 36 rows, 14 steps


def test_a_run_under_a_resolver_is_not_repeated(tmp_path):
    path = write_run_file(tmp_path, conflict={"resolver": "upgrad"})
    run_file(load_config(path), root=tmp_path, steering=Steering(resolver=Lean(), abilities=ABILITIES))
    with pytest.raises(DataError, match="judge scores on a run without a resolver"):
        retrain(job(tmp_path / "out", root=str(tmp_path)))
