"""Measure what training on some of a run's samples does: retrainings on random subsets, or without each source."""

# N samples, M subsets, S seeds, Q queries

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsft.evaluate.retrain import WORK, Query, Study, study_of
from fastsft.evaluate.truth import EvaluationError, Truth
from fastsft.launch import launch
from fastsft.record import versions
from fastsft.train.finished import FinishedRun
from fastsft.train.loop import model_places

TRUTH, SOURCES = "truth.npz", "sources.npz"


def draw_subsets(num_samples: int, number: int, share: float, seed: int) -> Tensor:
    """Draw subsets of exactly round(share * N) samples, uniformly -> bool [number, N].

    The first of more subsets are those of fewer.
    """
    size = round(share * num_samples)
    if not 0 < size < num_samples:
        raise EvaluationError(
            f"`share` must leave some of the {num_samples} samples out and keep some: {share} keeps {size}."
        )
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(number, num_samples, dtype=torch.bool)
    for row in found:
        row[torch.randperm(num_samples, generator=generator)[:size]] = True
    return found


def measure_truth(
    run_dir: str | Path,
    *,
    out: str | Path,
    subsets: int = 48,
    share: float = 0.5,
    seeds: int = 4,
    queries_per_target: int = 16,
    processes: int = 2,
    threads: int = 1,
    seed: int = 0,
    deadline: float | None = None,
    root: Path | None = None,
    say: Callable[[str], None] = print,
) -> Truth:
    """Retrain a finished run on random subsets of its samples, with several seeds each, and on all samples.

    A retraining's seed is the run's own and those after it: seed 0 on all samples is the run again. Subset 0..M-1 are
    trained with the first seed, then with the second, so that a `deadline` (of `time.time()`) leaves whole seeds.
    out: its finished.jsonl takes each retraining as it ends, truth.npz all of them; both are taken up again by a later
    call, which may ask for more subsets or seeds.
    """
    plan = Plan.of(run_dir, queries_per_target, root)
    study = plan.study
    stored = stored_truth(plan, out, share=share, seed=seed)
    if stored is not None and holds(stored, subsets, seeds):
        say(f"{Path(out) / TRUTH}: {len(stored.losses)} subsets x {len(stored.full)} seeds, measured before")
        return stored
    drawn = draw_subsets(len(study.prepared.rows), subsets, share, seed)
    names = [f"subset-{number:03d}" for number in range(subsets)]
    options = {"processes": processes, "threads": threads, "deadline": deadline, "say": say}
    results = launch(WORK, plan.jobs(names, drawn, seeds), out, **options)  # type: ignore[arg-type]
    about = {"digest": plan.truth_digest(share=share, seed=seed), "share": share, "seed": seed}
    truth = plan.truth(names, drawn, seeds, results, about)
    truth.save(Path(out) / TRUTH)
    return truth


def stored_truth(plan: Plan, out: str | Path, *, share: float, seed: int) -> Truth | None:
    """Read what an earlier call measured of the same run with the same settings; None where there is no such file."""
    path = Path(out) / TRUTH
    truth = Truth.load(path) if path.exists() else None
    return truth if truth is not None and truth.about["digest"] == plan.truth_digest(share=share, seed=seed) else None


def leave_source_out(
    run_dir: str | Path,
    *,
    out: str | Path,
    seeds: int = 3,
    queries_per_target: int = 16,
    processes: int = 2,
    threads: int = 1,
    deadline: float | None = None,
    root: Path | None = None,
    say: Callable[[str], None] = print,
) -> Truth:
    """Retrain a finished run without each of its sources -> a truth whose subsets are all samples but one source's.

    about["left_out"]: the sources, in the order of the subsets. `grouped()` gives the losses of the abilities.
    """
    plan = Plan.of(run_dir, queries_per_target, root)
    study = plan.study
    sources = sorted({row.source for row in study.prepared.rows})
    if len(sources) < 2:
        raise EvaluationError(f"{run_dir} has one source, {sources[0]!r}: nothing is left without it.")
    kept = torch.tensor([[row.source != source for row in study.prepared.rows] for source in sources])
    names = [f"without-{source}" for source in sources]
    options = {"processes": processes, "threads": threads, "deadline": deadline, "say": say}
    results = launch(WORK, plan.jobs(names, kept, seeds), out, **options)  # type: ignore[arg-type]
    about = {"digest": plan.truth_digest(left_out=sources), "left_out": sources}
    truth = plan.truth(names, kept, seeds, results, about)
    truth.save(Path(out) / SOURCES)
    return truth


def holds(truth: Truth, subsets: int, seeds: int) -> bool:
    """Whether a stored truth has all that is asked for."""
    M, S = truth.losses.shape[:2]
    return (
        M >= subsets
        and S >= seeds
        and not bool(truth.losses[:subsets, :seeds].isnan().any() or truth.full[:seeds].isnan().any())
    )


@dataclass(frozen=True, eq=False)
class Plan:
    """The retrainings of one run: their jobs, and the truth that their results make."""

    run: Path
    study: Study
    queries_per_target: int
    root: Path | None = None

    @classmethod
    def of(cls, run_dir: str | Path, queries_per_target: int, root: Path | None) -> Plan:
        """Read the run; `root` replaces the folder that its relative paths start from."""
        run, root = Path(run_dir).resolve(), None if root is None else root.resolve()
        return cls(run, study_of(str(run), None if root is None else str(root)), queries_per_target, root)

    @cached_property
    def queries(self) -> list[Query]:
        return self.study.queries(self.queries_per_target)

    @cached_property
    def digest(self) -> str:
        """Name by 64 hex digits all that a retraining depends on: the run's settings, its rows and queries, and the
        base model's weights (its name alone where it is of the hub). What the run itself became is no part of it."""
        finished = FinishedRun.open(self.run, root=self.root)
        config = {key: value for key, value in finished.config.as_dict().items() if key not in ("out", "attribution")}
        base = next((place for place in model_places(finished.config.model, finished.root) if place.is_dir()), None)
        weights = None if base is None else finished.digest(base)
        found = hashlib.sha256(json.dumps([config, weights], sort_keys=True).encode())
        for row in [*self.study.prepared.rows, *(query.row for query in self.queries)]:
            found.update(json.dumps([row.id, row.source, row.input_ids, row.labels]).encode())
        return found.hexdigest()

    @cached_property
    def trained_digest(self) -> str:
        """Name what scores of the run depend on: all that, and the weights of its last checkpoint."""
        finished = FinishedRun.open(self.run, root=self.root)
        return _with(self.digest, weights=finished.digest(finished.checkpoint("last")))

    def truth_digest(self, **settings: Any) -> str:
        """Name a truth of the run, measured with settings of its own."""
        return _with(self.digest, **settings)

    def job(self, keep: Sequence[str] | None, seed: int) -> dict[str, Any]:
        """One retraining; `seed` counts from the run's own. The digest tells its result from that of a changed run."""
        return {
            "run": str(self.run),
            "root": None if self.root is None else str(self.root),
            "keep": None if keep is None else list(keep),
            "seed": self.study.config.train.seed + seed,
            "queries": self.queries_per_target,
            "digest": self.digest,
        }

    def jobs(self, names: Sequence[str], kept: Tensor, seeds: int) -> dict[str, dict[str, Any]]:
        """The jobs on all samples, then seed by seed those on the samples `kept` [M, N]."""
        found = {f"full-{seed}": self.job(None, seed) for seed in range(seeds)}
        ids = [row.id for row in self.study.prepared.rows]
        chosen = [[ids[at] for at in row.nonzero()[:, 0].tolist()] for row in kept]
        for seed in range(seeds):
            found |= {f"{name}-{seed}": self.job(keep, seed) for name, keep in zip(names, chosen, strict=True)}
        return found

    def truth(
        self,
        names: Sequence[str],
        kept: Tensor,
        seeds: int,
        results: Mapping[str, Mapping[str, Any]],
        about: Mapping[str, Any],
    ) -> Truth:
        """Lay results out as a truth, nan where one is missing."""
        queries, rows = self.queries, self.study.prepared.rows
        missing = [float("nan")] * len(queries)

        def after(id: str) -> list[float]:
            return list(results[id]["after"]) if id in results else missing

        if not results:
            raise EvaluationError("not one retraining fitted before the deadline: raise the budget.")
        return Truth(
            ids=[row.id for row in rows],
            sources=[row.source for row in rows],
            queries=[query.name for query in queries],
            abilities=[query.ability for query in queries],
            tokens=torch.tensor([query.row.num_supervised for query in queries]),
            subsets=kept,
            losses=torch.tensor([[after(f"{name}-{s}") for s in range(seeds)] for name in names], dtype=torch.float64),
            base=torch.tensor(next(iter(results.values()))["before"], dtype=torch.float64),
            full=torch.tensor([after(f"full-{s}") for s in range(seeds)], dtype=torch.float64),
            about={
                **about,
                "queries_per_target": self.queries_per_target,
                "run_seed": self.study.config.train.seed,
                "versions": versions(),
            },
        )


def _with(digest: str, **told: Any) -> str:
    return hashlib.sha256(json.dumps([digest, told], sort_keys=True).encode()).hexdigest()
