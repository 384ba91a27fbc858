"""A steered run, killed and resumed, draws the same samples by the same mixes and ends with the same weights."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsft.record import Record, RecordError
from fastsft.tasks import MixError
from fastsft.train.checkpoint import latest_checkpoint
from fastsft.train.steerer import NAME
from tests.train import _steered
from tests.train._steered import PER_STEP, STEPS, drawn_of, factors_of, mixes_of
from tests.train._support import assert_same_bits, weights_of
from tests.train.test_two_processes import free_port

ROOT = Path(__file__).parents[2]


def same(out, whole):
    """The record of a run equals that of the run never stopped, digit for digit."""
    one, other = Record.open(out / "run"), Record.open(whole / "run")
    assert drawn_of(one) == drawn_of(other)
    assert mixes_of(one) == mixes_of(other)
    assert factors_of(one) == factors_of(other)


@pytest.mark.parametrize("apply", ["lagged", "exact"])
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_run_resumes_at_any_step(tmp_path, workers, apply):
    whole = tmp_path / "whole"
    run = _steered.train(whole, workers=workers, apply=apply)
    weights = weights_of(run.trainer.model)
    assert len(mixes_of(run.record)) > 4  # with four workers a mix holds ten steps later
    assert len({step for step, _ in factors_of(run.record)}) > 4
    steps = range(1, STEPS)
    if (workers, apply) != (0, "lagged"):
        steps = random.Random(f"{workers} {apply}").sample(steps, 2)
    for step in steps:
        broken = tmp_path / f"from-{step}"
        shutil.copytree(whole, broken)
        resumed = _steered.train(broken, workers=workers, apply=apply, resume=broken / f"trainer/checkpoint-{step}")
        same(broken, whole)
        assert_same_bits(weights_of(resumed.trainer.model), weights)


def start(out, ranks, workers, apply, kill_at, resume):
    """Run `ranks` processes to their end; their exit codes."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = [out, PER_STEP // ranks, workers, apply, kill_at, resume or "none"]
        command = [sys.executable, "-m", "tests.train._steered", *map(str, given)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize(
    ("ranks", "workers", "apply"), [(1, 0, "lagged"), (1, 2, "exact"), (2, 0, "exact"), (2, 2, "lagged")]
)
def test_a_killed_run_resumes_as_if_never_stopped(tmp_path, ranks, workers, apply):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    codes, outputs = start(whole, ranks, workers, apply, -1, None)
    assert codes == [0] * ranks, outputs
    at = random.Random(f"{ranks} {workers}").choice([5, 6, 7, 9, 10, 11])
    codes, outputs = start(broken, ranks, workers, apply, at, None)
    assert codes == [-signal.SIGKILL] * ranks, outputs
    checkpoint = latest_checkpoint(broken / "trainer")
    assert checkpoint is not None
    codes, outputs = start(broken, ranks, workers, apply, -1, checkpoint)
    assert codes == [0] * ranks, outputs
    same(broken, whole)
    for rank in range(ranks):
        one, other = (torch.load(out / f"weights-{rank}.pt") for out in (broken, whole))
        assert_same_bits(one, other)


def test_two_ranks_draw_what_one_draws(tmp_path):
    """The plan knows global batches; each rank takes its slice. Mixes agree to the rounding of sums over ranks."""
    one, two = tmp_path / "one", tmp_path / "two"
    for out, ranks in ((one, 1), (two, 2)):
        codes, outputs = start(out, ranks, 0, "lagged", -1, None)
        assert codes == [0] * ranks, outputs
    alone, both = Record.open(one / "run"), Record.open(two / "run")
    assert drawn_of(both) == drawn_of(alone)
    for mine, other in itertools.zip_longest(mixes_of(both), mixes_of(alone)):
        assert mine[:3] == other[:3]
        assert mine[3] == pytest.approx(other[3], rel=1e-4)  # float64 models, targets measured in float32
    single = torch.load(one / "weights-0.pt")
    for rank in range(2):
        weights = torch.load(two / f"weights-{rank}.pt")
        for name in single:
            torch.testing.assert_close(weights[name], single[name], rtol=1e-4, atol=1e-7)


def test_the_delay_is_what_the_loader_fetches_ahead(tmp_path):
    """A mix decided after step t is first drawn by in a step that no worker has begun; its event says in which."""
    delays = {}
    for workers in (0, 2, 4):
        run = _steered.train(tmp_path / str(workers), workers=workers, save_steps=50)
        stream = run.steerer.controller.stream
        events = [event for event in run.record.events("mix") if event["version"]]
        delays[workers] = {event["from_step"] - event["step"] for event in events}
        for event in events:
            assert stream.in_force(event["draw"]).version == event["version"]
            assert event["draw"] == (event["from_step"] - 1) * PER_STEP
        drawn = drawn_of(run.record)
        ids = [row.id for row in run.trainer.train_dataset.rows]
        for step, samples in drawn.items():
            draws = range((step - 1) * PER_STEP, step * PER_STEP)
            assert samples == sorted(ids[stream.item(draw)] for draw in draws)
    # the batch that accelerate holds ready, and two of each worker
    assert delays == {0: {2}, 2: {6}, 4: {10}}


class Whim(_steered.Follow):
    """Not a function of what it is told."""

    calls = 0

    def decide(self, feedback):
        type(self).calls += 1
        self.rate = 1.0 + 0.1 * self.calls
        return super().decide(feedback)


def test_a_policy_that_decides_otherwise_than_it_did_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_steered, "Follow", Whim)
    run = _steered.train(tmp_path)
    with pytest.raises(MixError, match=r"'whim' decides otherwise .* at step 1 it gave"):
        _steered.train(tmp_path, resume=tmp_path / "trainer/checkpoint-6")
    assert run.record.path.exists()


def test_a_checkpoint_without_its_steering_is_refused(tmp_path):
    _steered.train(tmp_path)
    (tmp_path / "trainer/checkpoint-6" / NAME).unlink()
    with pytest.raises(RecordError, match="was not steered"):
        _steered.train(tmp_path, resume=tmp_path / "trainer/checkpoint-6")
    path = tmp_path / "trainer/checkpoint-5" / NAME
    path.write_text(path.read_text()[:-9])
    with pytest.raises(RecordError, match="delete checkpoint-5"):
        _steered.train(tmp_path, resume=tmp_path / "trainer/checkpoint-5")
