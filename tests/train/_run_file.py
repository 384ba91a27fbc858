"""A run file on tiny jsonl data and a tiny saved model; run as a module it runs the file, and kills itself when told.

`python -m tests.train._run_file FOLDER STEP`: SIGKILL at the beginning of optimizer step STEP.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import yaml

import fastsft
from fastsft.train.attach import Run
from tests.train._support import SOURCES, make_model, make_rows, make_tokenizer, words


def write_rows(path, rows):
    path.write_text(
        "".join(
            json.dumps({"id": row.id, "prompt": prompt, "response": response}) + "\n"
            for row in rows
            for prompt, response in [words(row)]
        )
    )


def write_run_file(folder, *, sections=None, **keys):
    """Write data, model and run file into `folder`; `sections` change keys inside train and attribution."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for source in SOURCES:
        write_rows(folder / f"{source}.jsonl", make_rows(12, prefix=source))
    for ability in ("maths", "code"):
        write_rows(folder / f"{ability}.jsonl", make_rows(4, seed=7, prefix=ability))
    config = {
        "model": "model",
        "sources": {source: {"path": f"{source}.jsonl"} for source in SOURCES},
        "targets": {ability: {"path": f"{ability}.jsonl"} for ability in ("maths", "code")},
        "train": {
            "rank": 4,
            "steps": 14,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "max_length": 48,
            "save_every": 5,
            "seed": 3,
        },
        "attribution": {"refresh_every": 3},
        "out": "out",
        **keys,
    }
    for section, changed in (sections or {}).items():
        config[section] = {**config[section], **changed}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def main(folder, kill_at):
    torch.set_num_threads(1)
    step = Run.training_step

    def training_step(self, *given, **named):
        if self.trainer.state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *given, **named)

    Run.training_step = training_step
    fastsft.run(fastsft.load_config(folder / "run.yaml"), root=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
