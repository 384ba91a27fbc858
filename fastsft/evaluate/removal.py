"""Removal: train without the samples that a method calls most helpful, and see what it costs the ability."""

# N samples, S seeds, Q queries, R retrainings of a seed

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastsft.evaluate.intervals import Value, mean_over
from fastsft.evaluate.lds import ability_scores
from fastsft.evaluate.measure import Plan
from fastsft.evaluate.retrain import WORK
from fastsft.evaluate.truth import EvaluationError, Truth
from fastsft.launch import launch

ALL = "all abilities"


@dataclass(frozen=True)
class RemovalRow:
    """What removing a method's top samples adds to an ability's loss, nats per response token; above 0: they helped.

    The mean is over seeds and the ability's queries, the 95 % interval over both, drawn crossed. removed: samples.
    """

    method: str
    ability: str
    removed: int
    cost: Value


def removal(
    run_dir: str | Path,
    scores: Mapping[str, Tensor],
    truth: Truth,
    *,
    out: str | Path,
    share: float = 0.05,
    seeds: int = 2,
    processes: int = 2,
    threads: int = 1,
    deadline: float | None = None,
    root: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[RemovalRow]:
    """Retrain without the `share` of samples that each method scores highest for each ability, several seeds each.

    scores: [N, Q] or [N, A] by method, as in `truth`, whose queries are asked again; "random" among them is what any
    removal of that size costs. The loss is compared with that of a full retraining with the same seed.
    """
    names = list(truth.grouped().queries)
    number = max(1, round(share * len(truth.ids)))
    if not number < len(truth.ids):
        raise EvaluationError(f"`share` of the samples to remove must leave some: {share} removes {number}.")
    plan = Plan.of(run_dir, int(truth.about["queries_per_target"]), root)
    kept: dict[tuple[str, str], Tensor] = {}
    for method, matrix in scores.items():
        table = ability_scores(method, matrix, truth)
        for column, ability in enumerate(names):
            kept[method, ability] = without_top(table[:, column], number)
    ids = [f"remove-{method}-{ability}-{_digest(keep)}" for (method, ability), keep in kept.items()]
    options = {"processes": processes, "threads": threads, "deadline": deadline, "say": say}
    results = launch(WORK, plan.jobs(ids, torch.stack(list(kept.values())), seeds), out, **options)  # type: ignore[arg-type]
    found = plan.truth(ids, torch.stack(list(kept.values())), seeds, results, {})
    costs = dict(zip(kept, found.losses - found.full[None], strict=True))  # [S, Q] each
    return [row for method in scores for row in _rows(method, {a: costs[method, a] for a in names}, truth, number)]


def without_top(scores: Tensor, number: int) -> Tensor:
    """Which samples [N] are left without the `number` highest; equal ones in the order of the samples."""
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:number]] = False
    return keep


def _rows(method: str, costs: Mapping[str, Tensor], truth: Truth, removed: int) -> list[RemovalRow]:
    """One row an ability, and one over all queries, each at the removal meant for its own ability."""
    own = {}
    for ability, cost in costs.items():
        columns = [of == ability for of in truth.abilities]
        whole = ~cost.isnan().any(1)  # seeds that were retrained before the deadline
        own[ability] = cost[whole][:, columns]
    rows = [RemovalRow(method, ability, removed, mean_over(cost)) for ability, cost in own.items() if len(cost)]
    if len(rows) == len(own):
        seeds = min(len(cost) for cost in own.values())
        rows.append(RemovalRow(method, ALL, removed, mean_over(torch.cat([c[:seeds] for c in own.values()], dim=1))))
    return rows


def _digest(keep: Tensor) -> str:
    return hashlib.sha256(bytes(keep.tolist())).hexdigest()[:8]
