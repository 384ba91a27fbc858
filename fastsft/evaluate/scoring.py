"""Scores of a finished run by any method's name, computed once and kept beside the retrainings."""

# N samples, Q queries, A abilities

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsft.attribution.methods.registry import entry
from fastsft.evaluate.measure import Plan
from fastsft.evaluate.truth import EvaluationError
from fastsft.sketch.passes import Batching
from fastsft.store import write_whole
from fastsft.train.config import ConfigError
from fastsft.train.finished import FinishedRun
from fastsft.train.scoring import check_method, decoder, fitted, places_of


@dataclass(frozen=True, eq=False)
class Scorer:
    """Score a run's samples for the plan's queries, at the checkpoints that each method reads.

    folder: keeps each method's scores, which are taken from there while the run is the same.
    """

    plan: Plan
    folder: Path
    say: Callable[[str], None] = print

    @cached_property
    def run(self) -> FinishedRun:
        return FinishedRun.open(self.plan.run, root=self.plan.root)

    @cached_property
    def loaded(self) -> tuple[Any, Any, int]:
        """The model at the last checkpoint, its tokenizer and its padding id."""
        return self.run.load(self.run.checkpoint("last"))

    def score(self, name: str) -> Tensor:
        """Score by one method -> [N, Q], or [N, A] by one that knows the run's abilities only; float32."""
        path = self.folder / f"{name}.npz"
        kept = _kept(path, self.plan.trained_digest)
        if kept is not None:
            return kept
        start = time.perf_counter()
        study = self.plan.study
        model, tokenizer, pad_id = self.loaded
        # what a run booked is by ability; the others are asked for every query
        by_ability = "run_dir" in entry(name).needs
        targets = study.prepared.targets if by_ability else {query.name: [query.row] for query in self.plan.queries}
        context = {"batching": Batching(pad_id=pad_id), "decode": decoder(tokenizer)}
        places = places_of(self.run, entry(name), name, "all")
        found = fitted(self.run, name, model, study.prepared.rows, places, context).score(targets)
        matrix = found.matrix().float()
        if matrix.shape[0] != len(study.prepared.rows) or not bool(torch.isfinite(matrix).all()):
            raise EvaluationError(
                f"{name} must give a finite score to each of the run's {len(study.prepared.rows)} samples: got "
                f"{int(torch.isfinite(matrix).all(1).sum())} such rows."
            )
        file = io.BytesIO()
        np.savez_compressed(file, digest=self.plan.trained_digest, scores=matrix.numpy(), unit=found.unit)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, [file.getvalue()])
        self.say(f"scored by {name} in {time.perf_counter() - start:.1f} s")
        return matrix


def check(run: FinishedRun, name: str) -> None:
    """Refuse a method that there is not, or that this run can't answer by, before anything is loaded."""
    try:
        known = entry(name)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
    try:
        check_method(run, name, {}, places_of(run, known, name, "all"), names=list(run.config.targets), tokens=False)
    except ConfigError as error:
        raise EvaluationError(f"{name} can't score {run.out}: {error}") from None


def _kept(path: Path, digest: str) -> Tensor | None:
    """Read scores of the same run; None where there are none."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["scores"]) if str(file["digest"]) == digest else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise EvaluationError(f"{path} can't be read ({error}). Delete it: the method scores again.") from None
