"""Two gloo processes under DDP keep the books of one process on the same global batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsft.record import Record
from tests.train import _one_rank
from tests.train._support import assert_adds_up, assert_close, influence_of, ledger_of

ROOT = Path(__file__).parents[2]
RANKS = 2


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train_on_two(out, method):
    port = str(free_port())
    processes = []
    for rank in range(RANKS):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "tests.train._one_rank", str(out), method, str(_one_rank.PER_STEP // RANKS)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_keep_the_books_of_one(tmp_path, method):
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        out.mkdir()
    _one_rank.main(one, method, _one_rank.PER_STEP)
    train_on_two(two, method)

    weights = [torch.load(two / f"weights-{rank}.pt") for rank in range(RANKS)]
    single = torch.load(one / "weights-0.pt")
    for name in single:
        assert torch.equal(weights[0][name], weights[1][name]), name
        torch.testing.assert_close(weights[0][name], single[name], rtol=1e-6, atol=1e-9)

    alone, merged = Record.open(one / "run"), Record.open(two / "run")
    # float64 models; phi is stored as float32, and the loss is averaged over ranks in float32
    assert_close(influence_of(merged), influence_of(alone), share=1e-5)
    assert_close(ledger_of(merged), ledger_of(alone), share=1e-5)
    assert_adds_up(merged)
    decay = [abs(value) for key, value in ledger_of(merged).items() if key[-1] == "decay"]
    assert min(decay) > 0
    parts = [path.name for path in merged.influence_parts()]
    spans = {name.rsplit("-", 1)[0] for name in parts}
    assert sorted(parts) == sorted(f"{span}-rank{rank:03d}.parquet" for span in spans for rank in range(RANKS))
    assert merged.influence().num_rows == alone.influence().num_rows == _one_rank.STEPS * _one_rank.PER_STEP * 2
    assert merged.samples().sort_by("id").equals(alone.samples().sort_by("id"))
    for event, other in zip(merged.events("step"), alone.events("step"), strict=True):
        assert event["documents"] == other["documents"]
        assert event["tokens"] == other["tokens"]
        assert sum(event["documents"].values()) == _one_rank.PER_STEP
        assert event["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert event["identity_error"] < 1e-5
