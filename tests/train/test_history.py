"""A finished run's past: the checkpoints it kept, what they stand for, and its steps taken again."""

import pytest
import torch
import yaml

import fastsft
from fastsft.attribution.methods._checkpoints import load
from fastsft.attribution.methods._replay import Replay
from fastsft.record import Record
from fastsft.sketch.passes import Batching
from fastsft.train import ConfigError, FinishedRun
from fastsft.train.config import TrainConfig, parse_config
from fastsft.train.history import batches_of, initial, learning_rates, schedule_of
from fastsft.train.loop import prepare
from tests.train._run_file import write_run_file


def trained(folder, **train):
    path = write_run_file(folder, sections={"train": {"steps": 10, "save_every": 2, **train}})
    live = fastsft.run(fastsft.load_config(path), root=folder)
    return FinishedRun.open(folder / "out"), live.trainer.model


@pytest.fixture(scope="module", params=["lora", "full"])
def finished(request, tmp_path_factory):
    torch.set_num_threads(1)
    train = {"method": request.param, "warmup_steps": 3, "schedule": "cosine", "weight_decay": 0.1, "accumulation": 2}
    return trained(tmp_path_factory.mktemp(request.param), **train, batch_size=2, learning_rate=2e-3)


def test_lora_keeps_all_checkpoints_and_full_weights_two(finished):
    run, _ = finished
    assert run.steps == ([2, 4, 6, 8, 10] if run.config.train.method == "lora" else [8, 10])


def test_fewer_can_be_kept(tmp_path):
    run, _ = trained(tmp_path, keep_checkpoints=3)
    assert run.steps == [6, 8, 10]
    assert TrainConfig(method="full", keep_checkpoints=3).kept == 3
    with pytest.raises(ConfigError, match=r"train.keep_checkpoints must be at least 1, .*: got 0"):
        TrainConfig(keep_checkpoints=0)


def test_weights_of_a_checkpoint_have_the_models_names(finished):
    run, live = finished
    checkpoints = run.checkpoints()
    assert [checkpoint.about["step"] for checkpoint in checkpoints] == run.steps
    model, _, _ = run.load(run.checkpoint(run.steps[0]))
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    load(model, checkpoints[-1])
    trainable = {name for name, p in live.named_parameters() if p.requires_grad}
    assert trainable <= set(checkpoints[-1].weights())
    for name, parameter in live.named_parameters():
        found = dict(model.named_parameters())[name]
        assert torch.equal(found, parameter), name
        assert name not in trainable or not torch.equal(found, first[name]), name


def test_shares_are_the_learning_rates_that_were_booked(finished):
    run, _ = finished
    booked = {event["step"]: event["lr"] for event in Record.open(run.out).events("step")}
    assert learning_rates(run.config.train) == pytest.approx(list(booked.values()), rel=1e-12)
    before = 0
    for checkpoint in run.checkpoints():
        step = checkpoint.about["step"]
        assert checkpoint.share == pytest.approx(sum(booked[at] for at in range(before + 1, step + 1)))
        assert checkpoint.about["learning_rate"] == pytest.approx(booked[step])
        before = step


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_every_schedule_is_the_trainers(tmp_path, schedule, warmup):
    run, _ = trained(tmp_path, steps=5, save_every=5, schedule=schedule, warmup_steps=warmup)
    booked = [event["lr"] for event in Record.open(run.out).events("step")]
    assert learning_rates(run.config.train) == pytest.approx(booked, rel=1e-12)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_weights_before_step_1_are_made_again(tmp_path, method):
    """A learning rate that float32 can add to nothing but a zero leaves them as they were."""
    run, live = trained(tmp_path, method=method, steps=1, learning_rate=1e-30)
    weights = initial(run).weights()
    trainable = {name: p for name, p in live.named_parameters() if p.requires_grad}
    assert weights.keys() == trainable.keys()
    assert all((weights[name] - trainable[name]).abs().max() < 1e-29 for name in trainable)
    assert sum(bool(weights[name].any()) for name in trainable) > 10


def test_the_steps_taken_again_end_where_the_run_did(finished):
    """Clipping, decay by name, warmup, accumulation and moments included."""
    run, live = finished
    model, tokenizer, _ = run.load(run.checkpoint())
    rows = prepare(run.config, tokenizer, run.root).rows
    schedule = schedule_of(run, model, rows)
    assert [len(batch) for batch in schedule.batches] == [4] * 10
    load(model, initial(run))
    before = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    replay = Replay(model, rows, schedule, batching=Batching(), keep_bytes=2**30, smooth=0.0)
    after = torch.cat([p.detach().flatten() for p in live.parameters() if p.requires_grad])
    # Adam's first steps divide by a root that is next to nothing: rounding of float32 shows
    assert (replay.final - after).norm() < 2e-3 * (after - before).norm()


def test_batches_are_those_of_the_books(finished):
    run, _ = finished
    table = Record.open(run.out).influence().to_pylist()
    for step, batch in enumerate(batches_of(run), start=1):
        assert sorted(batch) == sorted(
            row["sample_id"] for row in table if (row["step"], row["ability"]) == (step, "maths")
        )


def test_moments_are_those_of_the_checkpoints_optimizer(finished):
    run, _ = finished
    place = run.checkpoint(8)
    model, _, _ = run.load(place)
    moments, optimizer = run.moments(model, place), run.optimizer(model, place)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert moments.keys() == trainable.keys()
    for name, parameter in trainable.items():
        assert torch.equal(moments[name]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])
        assert moments[name]["step"] == 8


def changed(run, section, key, value):
    path = run.out / "config.yaml"
    raw = yaml.safe_load(path.read_text())
    raw[section][key] = value
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return FinishedRun.open(run.out)


def test_what_cannot_be_had_is_said(tmp_path):
    run, _ = trained(tmp_path, steps=4, save_every=2)
    assert parse_config(run.config.as_dict()) == run.config
    with pytest.raises(ConfigError, match=r"trained with torch 1.0 and the adapter before step 1 is made again"):
        initial(changed(run, "versions", "torch", "1.0"))
    with pytest.raises(ConfigError, match="was trained in bf16, and its steps can be taken again in fp32 only"):
        batches_of(changed(run, "train", "precision", "bf16"))
    changed(run, "train", "precision", "fp32")
    sorted((run.out / "influence").glob("*.parquet"))[-1].unlink()
    with pytest.raises(ConfigError, match=r"have no samples of step \d, of 4 steps"):
        batches_of(FinishedRun.open(run.out))
    with pytest.raises(ConfigError, match=r"booked sources alone \(samples: false\)"):
        batches_of(changed(run, "attribution", "samples", False))
    place = run.checkpoint(2)
    (place / "optimizer.pt").unlink()
    with pytest.raises(ConfigError, match=r"optimizer.pt is missing, .*: take 'ekfac'"):
        run.moments(run.load(place)[0], place)
    (place / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"adapter_model.safetensors can't be read .*: take other checkpoints"):
        run.checkpoints()[0].weights()
    with pytest.raises(ConfigError, match="trained with sgd, which keeps no second moments: take 'ekfac'"):
        changed(run, "train", "optimizer", "sgd").check_moments(place)
