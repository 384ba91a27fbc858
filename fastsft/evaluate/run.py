"""`fastsft evaluate RUN`: are the scores of a run any good? Judged by retraining, beside BM25 and chance."""

# N samples, M subsets, S seeds, Q queries

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsft.evaluate.budget import MIN_SEEDS, MIN_SUBSETS, Clock, seconds_of
from fastsft.evaluate.intervals import Value
from fastsft.evaluate.lds import LdsRow, lds_table
from fastsft.evaluate.measure import Plan, holds, measure_truth, stored_truth
from fastsft.evaluate.removal import RemovalRow, removal
from fastsft.evaluate.retrain import WORK
from fastsft.evaluate.scoring import Scorer, check
from fastsft.evaluate.table import lds_lines, plain, removal_lines, text, verdict
from fastsft.evaluate.tail_patch import TailRow, step_length, tail_patch
from fastsft.evaluate.truth import EvaluationError, Truth
from fastsft.launch import launch
from fastsft.record import write_text
from fastsft.train.finished import FinishedRun

# always in the table
BASELINES = ("bm25", "embedding", "random")
_REMOVAL_SEEDS = 2
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well methods' scores of a run agree with retraining it. `about`: sizes, seconds, settings."""

    run: str
    rows: list[LdsRow]
    tail: list[TailRow]
    removal: list[RemovalRow]
    ceiling: Value
    # nats per response token, averaged over queries: before training, after it on all samples
    losses: tuple[float, float]
    about: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Tell it as a table and a sentence."""
        about, (before, after) = self.about, self.losses
        found = [
            f"{self.run}: {about['samples']} samples, {about['queries']} queries; {about['subsets']} subsets of "
            f"{about['share']:.0%} retrained with {about['seeds']} seeds each, {about['seconds']:.0f} s in all",
            f"fine-tuning took the queries' loss from {before:.3f} to {after:.3f} nats a token",
            f"ceiling of the LDS, by how much seeds differ: {text(self.ceiling)}",
            *lds_lines(self.rows, self.tail),
        ]
        if self.removal:
            found += [
                f"cost of removing the {self.removal[0].removed} most helpful samples, nats a token "
                f"({_REMOVAL_SEEDS} seeds):",
                *removal_lines(self.removal),
            ]
        return [*found, *self.notes, verdict(self.rows)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, of types that JSON knows."""
        return {**plain(self), "verdict": verdict(self.rows)}


def evaluate(
    run_dir: str | Path,
    *,
    methods: Sequence[str] = ("ekfac", "grad_cos", *BASELINES),
    budget: str | float = "30m",
    subsets: int | None = None,
    seeds: int | None = None,
    share: float = 0.5,
    queries_per_target: int = 16,
    top: int = 5,
    with_removal: bool = False,
    out: str | Path | None = None,
    processes: int = 2,
    threads: int = 1,
    seed: int = 0,
    root: str | Path | None = None,
    say: Say = print,
) -> Evaluation:
    """Score a finished run's samples by each method, retrain on random subsets of them, and compare.

    BM25, embeddings and chance are always among the methods. budget: wall time, "90s", "30m", "2h" or seconds, all in
    all; the number of subsets and seeds follows from it and from the time of two retrainings on all samples. Given
    `subsets` and `seeds`, the budget is left aside. out (RUN/evaluate unless told) takes evaluate.json, and everything
    that a later call takes up again: retrainings, the truth, scores. Spawns processes: call it under
    `if __name__ == "__main__":` in a script.
    """
    start, chosen = time.time(), list(dict.fromkeys([*methods, *BASELINES]))
    limit = seconds_of(budget)
    if (subsets is None) != (seeds is None):
        raise EvaluationError(f"`subsets` and `seeds` go together: got {subsets} and {seeds}. Give both, or a budget.")
    home = None if root is None else Path(root)
    run = FinishedRun.open(run_dir, root=home)
    for name in chosen:
        check(run, name)
    place = Path(run_dir) / "evaluate" if out is None else Path(out)
    plan = Plan.of(run_dir, queries_per_target, home)
    pool = _Pool(place, processes, threads, home, say)
    clock = None
    if subsets is None:
        removals = len(chosen) * len(plan.study.prepared.targets) * _REMOVAL_SEEDS if with_removal else 0
        clock = _timed(plan, pool, start + limit, limit, share, removals)
        stored = stored_truth(plan, place, share=share, seed=seed)
        if stored is not None and holds(stored, MIN_SUBSETS, MIN_SEEDS):
            # an earlier call's plan, which a deadline may have cut off, is gone on with
            subsets, seeds = len(stored.losses), len(stored.full)
        else:
            clock.sizes()  # a budget that is too short is refused before anything is scored
    scorer = Scorer(plan, place / "scores", say)
    scores = {name: scorer.score(name) for name in chosen}
    tail, length = _tail(scorer, scores, top, seed)
    if clock is not None and subsets is None:
        subsets, seeds = clock.sizes()
    assert subsets is not None  # both or neither
    assert seeds is not None
    truth = measure_truth(
        run_dir,
        subsets=subsets,
        seeds=seeds,
        share=share,
        queries_per_target=queries_per_target,
        seed=seed,
        deadline=None if clock is None else clock.end - clock.removal_seconds,
        **pool.options,
    )
    removed = []
    if with_removal:
        deadline = None if clock is None else clock.end
        removed = removal(run_dir, scores, truth, seeds=_REMOVAL_SEEDS, deadline=deadline, **pool.options)
    about = {"share": share, "seed": seed, "top": top, "step_length": length, "budget": limit}
    found = _told(plan, truth, scores, tail, removed, {**about, "seconds": time.time() - start})
    write_text(place / "evaluate.json", json.dumps(found.as_dict(), indent=1, ensure_ascii=False) + "\n")
    return found


def _tail(scorer: Scorer, scores: Mapping[str, Tensor], top: int, seed: int) -> tuple[list[TailRow], float]:
    """Take one more step from the last checkpoint on what each method scores highest."""
    start = time.perf_counter()
    model, _, pad_id = scorer.loaded
    length = step_length(scorer.run.config.train, model)
    rows, queries = scorer.plan.study.prepared.rows, scorer.plan.queries
    found = tail_patch(model, rows, queries, scores, length=length, top=min(top, len(rows)), pad_id=pad_id, seed=seed)
    scorer.say(f"tail-patch in {time.perf_counter() - start:.1f} s")
    return found, length


def _told(
    plan: Plan,
    truth: Truth,
    scores: Mapping[str, Tensor],
    tail: list[TailRow],
    removed: list[RemovalRow],
    about: Mapping[str, Any],
) -> Evaluation:
    known = int(truth.known.sum())
    before, after = float(truth.base.mean()), float(truth.full.nanmean())
    notes = []
    finished = ~truth.losses.isnan().any(2)
    if not bool(finished.all()):
        notes.append(
            f"{int(finished.sum())} of {finished.numel()} retrainings on subsets were done before the budget ended: "
            f"call again for the others."
        )
    if before - after < 0.1:
        notes.append(
            "Training on all samples hardly moved the queries' loss, so subsets differ by little but noise: a longer "
            "run, or targets that it helps, would tell methods apart."
        )
    return Evaluation(
        run=str(plan.run),
        rows=lds_table(scores, truth),
        tail=tail,
        removal=removed,
        ceiling=truth.ceiling(),
        losses=(before, after),
        about={
            **about,
            "samples": len(truth.ids),
            "queries": len(truth.queries),
            "subsets": known,
            "seeds": len(truth.full),
        },
        notes=notes,
    )


@dataclass(frozen=True)
class _Pool:
    """Where and how retrainings run."""

    out: Path
    processes: int
    threads: int
    root: Path | None
    say: Say

    @property
    def options(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "processes": self.processes,
            "threads": self.threads,
            "root": self.root,
            "say": self.say,
        }


def _timed(plan: Plan, pool: _Pool, end: float, budget: float, share: float, removals: int) -> Clock:
    """Retrain on all samples with the first seeds, side by side as all retrainings run, and read the time."""
    jobs = {f"full-{seed}": plan.job(None, seed) for seed in range(MIN_SEEDS)}
    start = time.perf_counter()
    results = launch(WORK, jobs, pool.out, processes=pool.processes, threads=pool.threads, say=pool.say)
    wall = time.perf_counter() - start
    full = sum(result["seconds"] for result in results.values()) / len(results)
    # starting processes and reading the data, which the next launch does again
    overhead = max(0.0, wall - full * MIN_SEEDS / min(pool.processes, MIN_SEEDS))
    return Clock(end, budget, full, overhead, pool.processes, share, removals)
