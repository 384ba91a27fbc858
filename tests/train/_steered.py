"""A steered run on tiny rows, its own policy and resolver; as a module: one rank of it, killed when told.

`python -m tests.train._steered OUT BATCH WORKERS APPLY KILL RESUME`: SIGKILL at the beginning of step KILL (-1: never);
RESUME is a checkpoint's folder, or "none".
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

import fastsft
from fastsft.data import RowDataset
from fastsft.tasks import Decision, Mix
from fastsft.train import Draws, Steering
from fastsft.train.attach import Run
from tests.train._support import SOURCES, make_lora, make_rows, make_targets, make_trainer

STEPS, PER_STEP = 16, 8
ABILITIES = {"apples": "maths", "bricks": "code"}


class Follow:
    """Draw more of what the books say helped; every digit of them shows in the mix."""

    def __init__(self, rate=2.0):
        self.rate = rate

    def begin(self, task):
        self.task = task
        return Mix.uniform(task.names)

    def decide(self, feedback):
        helped = {name: -sum(entry[name] for entry in feedback.entries.values()) for name in feedback.weights}
        size = sum(map(abs, helped.values()))
        scaled = {name: w * np.exp(self.rate * helped[name] / size) for name, w in feedback.weights.items()}
        total = sum(scaled.values())
        weights = {name: float(w / total) for name, w in scaled.items()}
        return Decision(weights=weights, signal=helped, error=dict.fromkeys(weights, 0.1), why="they helped.")


class Lean:
    """Weigh each ability by what its gradient shares with the others'."""

    def __call__(self, gram):
        return np.maximum(gram.sum(1), 0.1)


def make_steering(apply, *, resolver=True, policy=True, **draws):
    return Steering(
        policy=Follow() if policy else None,
        draws=Draws(**{"seed": 3, **draws}),
        resolver=Lean() if resolver else None,
        apply=apply,
        abilities=ABILITIES,
    )


def train(out, *, batch=PER_STEP, workers=0, apply="lagged", resume=None, save_steps=1, rows=None, **settings):
    """Train, or go on from a checkpoint -> the run, with the weights in its trainer's model."""
    model = make_lora().double()
    trainer = make_trainer(
        out / "trainer",
        model,
        RowDataset(rows or make_rows(60)),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        dataloader_num_workers=workers,
        save_strategy="steps",
        save_steps=save_steps,
        adam_epsilon=1e-4,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **settings,
    )
    run = fastsft.attach(
        trainer,
        make_targets(),
        out=out / "run",
        settings=fastsft.Attribution(refresh_every=2),
        steering=make_steering(apply),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return run


def drawn_of(record):
    """The ids of each step's samples, sorted: ranks write their own."""
    table = record.influence().to_pydict()
    steps = {}
    for step, sample, ability in zip(table["step"], table["sample_id"], table["ability"], strict=True):
        if ability == "code":
            steps.setdefault(step, []).append(sample)
    return {step: sorted(samples) for step, samples in steps.items()}


def mixes_of(record):
    keys = ("step", "version", "draw", "weights", "signal")
    return [tuple(event[key] for key in keys) for event in record.events("mix")]


def factors_of(record):
    return [(event["step"], event["factors"]) for event in record.events("conflict")]


def main(out, batch, workers, apply, kill_at, resume):
    torch.set_num_threads(1)
    step = Run.training_step

    def training_step(self, *given, **named):
        if self.trainer.state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given, **named)

    Run.training_step = training_step
    run = train(out, batch=batch, workers=workers, apply=apply, resume=resume, save_steps=4)
    rank = int(os.environ.get("RANK", "0"))
    weights = {name: weight.detach() for name, weight in run.trainer.model.named_parameters()}
    torch.save(weights, out / f"weights-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        Path(given[0]),
        int(given[1]),
        int(given[2]),
        given[3],
        int(given[4]),
        None if given[5] == "none" else Path(given[5]),
    )
    # Torch's gloo thread may still free a gathered tensor while the interpreter ends, and aborts (torch 2.13). All is
    # written: leave at once.
    sys.stdout.flush()
    os._exit(0)

assert set(ABILITIES) < set(SOURCES)
