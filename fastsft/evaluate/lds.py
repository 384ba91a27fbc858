"""The linear datamodelling score: do summed scores of a subset's samples rank the subsets as retraining does?

Park et al., "TRAK: Attributing Model Behavior at Scale", 2023: Spearman over subsets between the sum of the scores of
the samples in a subset and the outcome of training on it. Here the outcome is minus the query's loss, averaged over
seeds, so that scores of which positive helps reach +1.
"""

# N samples, M subsets, Q queries, A abilities, B draws

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastsft.evaluate.intervals import Draws, Value, between, crossed_draws, spearman, spearman_draws, weighted_mean
from fastsft.evaluate.truth import EvaluationError, Truth


@dataclass(frozen=True)
class LdsRow:
    """The LDS of one method, averaged over queries: with its 95 % interval, and minus the baseline's on the same draws.

    per: what a query was, "query" or "ability"; of_ceiling: the share of what the noise of seeds leaves to be reached.
    """

    method: str
    per: str
    lds: Value
    difference: Value | None
    of_ceiling: float


def lds(matrix: Tensor, truth: Truth) -> Tensor:
    """Score a method [N, Q], queries as in `truth` -> [Q]: its Spearman correlation over the subsets."""
    return spearman(*_sides(matrix, truth))


def lds_table(scores: Mapping[str, Tensor], truth: Truth, *, baseline: str = "bm25", seed: int = 0) -> list[LdsRow]:
    """Score every method, [N, Q] each, or [N, A] by one that scores abilities only -> rows, the best first.

    A method that scores abilities is judged on `truth.grouped()`, and compared with the baseline's scores added up
    there by tokens: its row says per="ability".
    """
    found = []
    for per, of in (("query", truth), ("ability", truth.grouped())):
        tables = {name: matrix for name, matrix in scores.items() if _per(name, matrix, truth) == per}
        if not tables:
            continue
        if baseline in scores and baseline not in tables:
            tables[baseline] = ability_scores(baseline, scores[baseline], truth)
        ceiling = of.ceiling(seed=seed).mean
        rows = _rows(tables, of, baseline, per, ceiling, seed)
        found += [row for row in rows if _per(row.method, scores[row.method], truth) == per]
    return sorted(found, key=lambda row: (row.per != "query", -row.lds.mean))


def ability_scores(name: str, matrix: Tensor, truth: Truth) -> Tensor:
    """Average scores [N, Q] over the queries of each ability by their tokens -> [N, A]; [N, A] stay as they are."""
    matrix = matrix.detach().cpu().double()
    return matrix if _per(name, matrix, truth) == "ability" else matrix @ truth.shares(truth.grouped().queries)


def query_scores(name: str, matrix: Tensor, num_samples: int, abilities: Sequence[str]) -> Tensor:
    """Give every query a column -> [N, Q]: its own, or its ability's where the method scores only these [N, A]."""
    names = list(dict.fromkeys(abilities))
    if tuple(matrix.shape) == (num_samples, len(abilities)):
        return matrix
    if tuple(matrix.shape) != (num_samples, len(names)):
        raise EvaluationError(_misshapen(name, matrix, num_samples, len(abilities), len(names)))
    return matrix[:, [names.index(ability) for ability in abilities]]


def _per(name: str, matrix: Tensor, truth: Truth) -> str:
    N, Q, A = len(truth.ids), len(truth.queries), len(set(truth.abilities))
    if tuple(matrix.shape) == (N, Q):
        return "query"
    if tuple(matrix.shape) == (N, A):
        return "ability"
    raise EvaluationError(_misshapen(name, matrix, N, Q, A))


def _misshapen(name: str, matrix: Tensor, N: int, Q: int, A: int) -> str:
    return (
        f"scores of {name!r} must be [samples, queries] = [{N}, {Q}], or [{N}, {A}] by ability: got "
        f"{list(matrix.shape)}."
    )


def _rows(
    tables: Mapping[str, Tensor], truth: Truth, baseline: str, per: str, ceiling: float, seed: int
) -> list[LdsRow]:
    sides = {name: _sides(matrix, truth) for name, matrix in tables.items()}
    draws = crossed_draws(len(truth.measured().losses), len(truth.queries), seed=seed)
    means = {name: float(spearman(*side).mean()) for name, side in sides.items()}
    drawn = {name: _drawn(side, draws) for name, side in sides.items()}
    rows = []
    for name in tables:
        difference = None
        if baseline in tables and name != baseline:
            difference = Value(means[name] - means[baseline], *between(drawn[name] - drawn[baseline]))
        rows.append(LdsRow(name, per, Value(means[name], *between(drawn[name])), difference, means[name] / ceiling))
    return rows


def _drawn(sides: tuple[Tensor, Tensor], draws: Draws) -> Tensor:
    return weighted_mean(spearman_draws(*sides, draws.subsets), draws.queries)


def _sides(matrix: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
    """What the scores say of each subset, and what became of it, both [M, Q]."""
    if tuple(matrix.shape) != (len(truth.ids), len(truth.queries)):
        raise EvaluationError(
            f"scores must be [samples, queries] = [{len(truth.ids)}, {len(truth.queries)}]: got {list(matrix.shape)}."
        )
    measured = truth.measured()
    if len(measured.losses) < 2:
        raise EvaluationError(f"ranking subsets needs 2 of them at least: {len(measured.losses)} were measured.")
    return measured.subsets.double() @ matrix.detach().cpu().double(), -measured.mean_losses()
