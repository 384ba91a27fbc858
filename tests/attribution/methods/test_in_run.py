"""What a run booked, turned so that positive helps; and its stored sketches, asked for anything."""

import pytest
import torch
import yaml

import fastsft
from fastsft.attribution.methods import Queries
from fastsft.attribution.methods.in_run import InRun
from fastsft.data import Row
from fastsft.record import Record
from fastsft.train import FinishedRun
from fastsft.train.history import initial
from fastsft.train.loop import prepare
from fastsft.train.query import _sketches
from tests.attribution.methods._support import gradient
from tests.train._run_file import write_run_file
from tests.train._support import influence_of


def trained(folder, train, attribution):
    train = {"max_grad_norm": 0.0, **train}
    path = write_run_file(folder, sections={"train": train, "attribution": attribution})
    fastsft.run(fastsft.load_config(path), root=folder)
    run = FinishedRun.open(folder / "out")
    model, tokenizer, _ = run.load(run.checkpoint())
    return run, model, prepare(run.config, tokenizer, run.root)


@pytest.fixture(scope="module")
def booked(tmp_path_factory):
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("booked"), {"steps": 5, "save_every": 5}, {})


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two steps of SGD, with a checkpoint after each, and sketches whose noise is small."""
    torch.set_num_threads(1)
    train = {"steps": 2, "save_every": 1, "optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.0}
    attribution = {"store": True, "store_format": "bf16", "sketch_size": 1 << 16}
    return trained(tmp_path_factory.mktemp("stored"), train, attribution)


def test_scores_are_what_was_booked_with_the_other_sign(booked):
    run, model, prepared = booked
    found = InRun(run.out).fit(model, [], prepared.rows).score(prepared.targets)
    phi = influence_of(Record.open(run.out))
    assert found.queries == ["code", "maths"]
    assert "booked" in found.unit
    drawn = {sample for _, sample, _ in phi}
    assert 0 < len(drawn) < len(prepared.rows)
    for row, values in zip(prepared.rows, found.matrix().tolist(), strict=True):
        for name, value in zip(found.queries, values, strict=True):
            total = sum(each for (_, sample, ability), each in phi.items() if (sample, ability) == (row.id, name))
            assert value == pytest.approx(-total, rel=1e-5, abs=1e-9)
            assert row.id in drawn or value == 0.0


def test_other_queries_are_refused_without_a_store(booked, tmp_path):
    run, model, prepared = booked
    method = InRun(run.out).fit(model, [], prepared.rows)
    with pytest.raises(
        ValueError, match=r"own abilities, code, maths, by their names.*got 'x'. Name an ability, train"
    ):
        method.score({"x": prepared.rows[:1]})
    with pytest.raises(ValueError, match="in_run scores whole samples only"):
        method.score(prepared.targets, per="token")
    scores = InRun(run.out).fit(model, [], [Row("unknown", "s", [1, 2], [-100, 2])]).score(prepared.targets)
    with pytest.raises(ValueError, match="none of the 1 samples was drawn by"):
        scores.matrix()


def step_gradients(run, rows, model, step, weights):
    """Of each sample of a step its gradient over the step's supervised tokens, at `weights`."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
    table = Record.open(run.out).influence().to_pylist()
    ids = [row["sample_id"] for row in table if row["step"] == step and row["ability"] == "maths"]
    tokens = sum(rows[id].num_supervised for id in ids)
    return {id: {name: g / tokens for name, g in gradient(model, rows[id]).items()} for id in ids}


def test_a_store_answers_anything_by_gradients_along_the_run(stored):
    """lr * <g_q at the end, the sample's share of each step's gradient>, by autograd."""
    run, model, prepared = stored
    asked = {"own": prepared.rows[:1], "two": prepared.targets["code"][:2]}
    found = InRun(run.out, queries_at_once=1).fit(model, run.checkpoints(), prepared.rows).score(asked)
    matrix = found.matrix()
    assert "sketches of training" in found.unit

    rows = {row.id: row for row in prepared.rows}
    slow = FinishedRun.load(run, run.checkpoint())[0].eval()
    targets = []
    for part in asked.values():
        grads = [gradient(slow, row) for row in part]
        tokens = sum(row.num_supervised for row in part)
        targets.append({name: sum(g[name] for g in grads) / tokens for name in grads[0]})
    expected, bound = torch.zeros_like(matrix), torch.zeros_like(matrix)
    starts = [initial(run).weights(), run.checkpoints()[0].weights()]
    for step, weights in enumerate(starts, start=1):
        lr = [event["lr"] for event in Record.open(run.out).events("step")][step - 1]
        for id, grads in step_gradients(run, rows, slow, step, weights).items():
            place = [row.id for row in prepared.rows].index(id)
            for column, target in enumerate(targets):
                expected[place, column] += lr * sum((target[name] * g).sum() for name, g in grads.items()).detach()
                norms = [sum(g.square().sum() for g in each.values()).sqrt() for each in (target, grads)]
                bound[place, column] += 5 * lr * (norms[0] * norms[1]).detach() / 256  # 5 times a sketch's own noise
    assert (expected != 0).any(1).sum() == 8
    assert ((matrix - expected).abs() <= bound).all()
    assert float(torch.corrcoef(torch.stack([matrix.flatten(), expected.flatten()]))[0, 1]) > 0.99
    assert (matrix[(expected == 0).all(1)] == 0).all()


def test_queries_of_adams_steps_are_sketched_as_search_does(tmp_path):
    train = {"steps": 4, "save_every": 4}
    run, model, prepared = trained(tmp_path, train, {"store": True, "sketch_size": 512})
    rows = prepared.targets["code"]
    method = InRun(run.out)
    place = run.checkpoint()
    method.fit(model, run.checkpoints(), prepared.rows, [run.moments(model, place)])
    asked = {row.id: [row] for row in rows}
    found = method._sketches(Queries.of(asked))
    means = _sketches(method.store, run, place, model, rows, 0)  # of the mean loss, which is nats per response token
    torch.testing.assert_close(found, means, rtol=1e-5, atol=1e-5 * float(means.abs().max()))
    assert method.score(asked).matrix().abs().max() > 0
    method.fit(model, run.checkpoints(), prepared.rows)
    with pytest.raises(ValueError, match="in_run asks sketches of AdamW's steps with the optimizer's moments"):
        method.score(asked).matrix()
    # its own abilities are still what was booked
    assert "booked" in method.score(prepared.targets).unit


def test_a_run_without_samples_is_refused(booked, tmp_path):
    run, model, prepared = trained(tmp_path, {"steps": 2, "save_every": 2}, {"samples": False})
    assert not yaml.safe_load((run.out / "config.yaml").read_text())["attribution"]["samples"]
    with pytest.raises(ValueError, match="booked sources alone"):
        InRun(run.out).fit(model, [], prepared.rows).score(prepared.targets)
