"""One tiny finished run for all tests of this folder: 36 samples, 8 held-out rows, LoRA, 6 steps."""

import sys

import pytest

import fastsft
import fastsft.evaluate
from tests.train._run_file import write_run_file


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    path = write_run_file(folder, sections={"train": {"steps": 6, "save_every": 3, "learning_rate": 1e-2}})
    fastsft.run(fastsft.load_config(path), root=folder)
    return folder / "out"


@pytest.fixture
def linear_retraining(monkeypatch):
    """Put, in the place of launched retrainings, ones whose losses are linear in the samples that are kept.

    after[q] = 3 - sum of effect(id, q) over the kept + 0.001 * seed; gives the jobs that were asked, and the effects.
    """
    asked = []

    def effect(id, query):
        return ((sum(map(ord, id)) * 7919 + query * 104729) % 101 - 50) / 1000

    def launch(work, jobs, out, *, deadline=None, **options):
        assert work == "fastsft.evaluate.retrain:retrain"
        asked.extend(jobs)
        found = {}
        for id, job in jobs.items():
            if deadline is not None and id.endswith("-1"):
                continue
            keep = every if job["keep"] is None else job["keep"]
            after = [3 - sum(effect(each, q) for each in keep) + 0.001 * job["seed"] for q in range(8)]
            found[id] = {"before": [3.0] * 8, "after": after, "seconds": 1.0}
        return found

    every = [f"{source}-{number}" for source in ("apples", "bricks", "clouds") for number in range(12)]
    # by sys.modules: the functions `removal` and `measure_truth` hide modules of their names
    for module in ("measure", "removal"):
        monkeypatch.setattr(sys.modules[f"fastsft.evaluate.{module}"], "launch", launch)
    return asked, effect, every
