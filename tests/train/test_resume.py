"""A run that was killed and resumed is the run that was never stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastsft
from fastsft.record import Record
from fastsft.train.checkpoint import NAME, latest_checkpoint
from tests.train._run_file import write_run_file
from tests.train._support import (
    assert_adds_up,
    assert_close,
    attach,
    influence_of,
    ledger_of,
    make_lora,
    make_trainer,
    weights_of,
)

ROOT = Path(__file__).parents[2]


def kill(folder, step):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.train._run_file", str(folder), str(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def last_weights(folder):
    return load_file(str(folder / "out/checkpoints/checkpoint-14/adapter_model.safetensors"))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        # the checkpoint falls on a refresh, with samples of the steps before still open
        {"train": {"packing": True, "batch_size": 1}, "attribution": {"refresh_every": 1}},
        {"train": {"optimizer": "sgd", "schedule": "cosine", "weight_decay": 0.1, "learning_rate": 0.5}},
    ],
    ids=["padded", "packed, open samples", "sgd"],
)
def test_a_killed_run_resumes_as_if_never_stopped(tmp_path, sections):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        write_run_file(folder, sections=sections)
    fastsft.run(fastsft.load_config(whole / "run.yaml"), root=whole)
    kill(broken, 8)  # three steps and a refresh after the checkpoint of step 5
    torn = Record.open(broken / "out")
    assert latest_checkpoint(broken / "out/checkpoints").name == "checkpoint-5"
    assert max(event["step"] for event in torn.events()) > 5
    assert not list(torn.events("end"))
    fastsft.run(fastsft.load_config(broken / "run.yaml"), root=broken, resume=True)

    one, other = Record.open(whole / "out"), Record.open(broken / "out")
    assert [event["step"] for event in other.events("resume")] == [5]
    steps = [{key: event[key] for key in ("step", "documents", "tokens", "lr")} for event in one.events("step")]
    again = [{key: event[key] for key in ("step", "documents", "tokens", "lr")} for event in other.events("step")]
    assert again == steps
    assert [event["step"] for event in other.events("step")] == list(range(1, 15))
    for kind in ("start", "refresh", "interval", "note", "end"):
        spans = [(event.get("from"), event["step"]) for event in one.events(kind)]
        assert [(event.get("from"), event["step"]) for event in other.events(kind)] == spans, kind
    refreshes = [event["losses"] for event in one.events("refresh")]
    for losses, event in zip(refreshes, other.events("refresh"), strict=True):
        assert event["losses"] == pytest.approx(losses, rel=1e-6)
    assert one.influence().num_rows == other.influence().num_rows
    assert_close(influence_of(other), influence_of(one), share=1e-6)
    assert_close(ledger_of(other), ledger_of(one), share=1e-6)
    assert_adds_up(other)
    assert other.samples().sort_by("id").equals(one.samples().sort_by("id"))
    weights, expected = last_weights(broken), last_weights(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_run_file_is_on_record_before_the_first_step(tmp_path):
    write_run_file(tmp_path, sections={"train": {"max_length": 12}})  # drops the longer rows: a note
    kill(tmp_path, 0)
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert written["train"]["max_length"] == 12
    assert written["train"]["steps"] == 14
    assert written["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    events = [event["event"] for event in Record.open(tmp_path / "out").events()]
    assert events[0] == "start"
    notes = [event["text"] for event in Record.open(tmp_path / "out").events("note")]
    assert any("over 12 tokens" in note for note in notes)


def test_a_checkpoint_without_books_is_carried(tmp_path):
    """What the momentum of earlier steps does is a line of its own, and the ledger adds up."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    plain = make_lora()
    make_trainer(tmp_path / "trainer", plain, **settings).train()
    checkpoint = tmp_path / "trainer/checkpoint-4"
    assert not (checkpoint / NAME).exists()

    model = make_lora()
    trainer = make_trainer(tmp_path / "trainer", model, **settings)
    run = attach(trainer, tmp_path / "run")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(one, weights_of(plain)[name]) for name, one in weights_of(model).items())
    record = run.record
    assert [event["step"] for event in record.events("step")] == [5, 6, 7, 8]
    assert any("holds no books" in event["text"] for event in record.events("note"))
    assert_adds_up(record)
    entries = [entry for event in record.events("interval") for entry in event["abilities"].values()]
    carried = sum(abs(entry["carried"]) for entry in entries)
    residual = sum(abs(entry["residual"]) for entry in entries)
    assert carried > 10 * residual  # without the line the books would not close
    for event in record.events("interval"):
        assert event["displacement_error"] < 1e-4


def test_books_are_read_from_the_checkpoint_that_was_resumed(tmp_path):
    """It may lie in another folder than the trainer's own."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path / "trainer", make_lora(), **settings)
    run = attach(trainer, tmp_path / "run")
    trainer.train()
    influence, ledger = influence_of(run.record), ledger_of(run.record)
    elsewhere = (tmp_path / "trainer/checkpoint-4").rename(tmp_path / "moved")

    trainer = make_trainer(tmp_path / "trainer", make_lora(), **settings)
    run = attach(trainer, tmp_path / "run")
    trainer.train(resume_from_checkpoint=str(elsewhere))
    assert [event["checkpoint"] for event in run.record.events("resume")] == ["moved"]
    assert_close(influence_of(run.record), influence, share=1e-6)
    assert_close(ledger_of(run.record), ledger, share=1e-6)


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    path = write_run_file(tmp_path)
    with pytest.raises(fastsft.train.ConfigError, match="holds no whole checkpoint to resume from: start the run"):
        fastsft.run(fastsft.load_config(path), root=tmp_path, resume=True)


def test_a_torn_checkpoint_is_not_chosen(tmp_path):
    """Books are written last: a checkpoint without them was cut off."""
    for step, files in ((5, ("trainer_state.json", NAME)), (10, ("trainer_state.json",)), (15, (NAME,))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in files:
            (folder / name).write_text("")
    (tmp_path / "checkpoint-final").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-5"
