"""How well scores find what was planted: wrong answers, the true samples of a query, copies; each with an interval.

Scores are [N, Q], positive where training on the sample lowers the query's loss. Ties count as what drawing their order
would give on average, so a method that scores everything alike gets what chance gets.
"""

# N samples, Q queries, G different scores, B draws

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsft.evaluate.intervals import DRAWS, Value, between, mean_over

Flags = Sequence[bool] | Tensor


def auc(scores: Tensor, wrong: Flags, *, seed: int = 0) -> Value:
    """Give the chance that a wrong sample scores below a right one; a tie counts one half.

    scores [N], wrong [N]. 1: all wrong ones at the bottom; 0.5: chance. The interval draws wrong and right samples
    anew, each kind by itself.
    """
    wrong = torch.as_tensor(wrong, dtype=torch.bool)
    _check_scores(scores)
    if scores.dim() != 1 or wrong.shape != scores.shape:
        raise ValueError(f"`scores` and `wrong` must be [N] alike: got {list(scores.shape)} and {list(wrong.shape)}.")
    if wrong.all() or not wrong.any():
        raise ValueError(f"an AUC needs wrong and right samples: {int(wrong.sum())} of {len(wrong)} are wrong.")
    _, group = np.unique(scores.double().numpy(), return_inverse=True)
    kinds = [np.bincount(group[kind.numpy()], minlength=int(group.max()) + 1) for kind in (wrong, ~wrong)]
    generator = np.random.default_rng(seed)
    draws = [
        _auc(*(generator.multinomial(kind.sum(), kind / kind.sum())[None] for kind in kinds)) for _ in range(DRAWS)
    ]
    return Value(float(_auc(*(kind[None] for kind in kinds))[0]), *between(torch.tensor(np.concatenate(draws))))


def _auc(wrong: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many of each kind have each score, lowest first [B, G] -> [B]."""
    above = right.sum(1, keepdims=True) - right.cumsum(1)
    return (wrong * (above + right / 2)).sum(1) / (wrong.sum(1) * right.sum(1))


def wrong_label_auc(
    matrix: Tensor,
    wrong: Flags,
    *,
    sources: Sequence[str],
    abilities: Sequence[str],
    targets: Sequence[str],
    seed: int = 0,
) -> Value:
    """Give the chance that a sample with a wrong answer scores below a right one for the ability it is to teach.

    matrix [N, Q], wrong [N], source and ability of each sample [N], ability of each query [Q]. A sample's score is its
    mean over the queries of its own ability; only samples of the sources that hold wrong ones are compared.
    """
    check_matrix(matrix)
    wrong = torch.as_tensor(wrong, dtype=torch.bool)
    N, Q = matrix.shape
    if not len(wrong) == len(sources) == len(abilities) == N or len(targets) != Q:
        raise ValueError(
            f"`wrong`, `sources` and `abilities` must have the {N} rows of `matrix`, `targets` its {Q} columns: got "
            f"{len(wrong)}, {len(sources)}, {len(abilities)} and {len(targets)}."
        )
    homes = {source for source, is_wrong in zip(sources, wrong.tolist(), strict=True) if is_wrong}
    rows = [row for row, source in enumerate(sources) if source in homes]
    if missing := {abilities[row] for row in rows} - set(targets):
        raise ValueError(f"`targets` has no query of the abilities {', '.join(sorted(missing))} of the wrong samples.")
    of = {name: matrix[:, [at for at, one in enumerate(targets) if one == name]].mean(1) for name in set(targets)}
    return auc(torch.stack([of[abilities[row]][row] for row in rows]), wrong[rows], seed=seed)


def recall_at(matrix: Tensor, true_rows: Sequence[Collection[int]], k: int, *, seed: int = 0) -> Value:
    """Give the share of a query's true samples that are among its k best, averaged over the queries.

    matrix [N, Q]; of each query the rows of its true samples. k below their number can't reach 1.
    """
    if k < 1:
        raise ValueError(f"`k` must be 1 or more: got {k}.")
    found = []
    for scores, true in _queries(matrix, true_rows):
        own = scores[true]
        above, alike = (scores > own[:, None]).sum(1), (scores == own[:, None]).sum(1)
        found.append(((k - above) / alike).clamp(0, 1).mean())
    return mean_of(torch.stack(found), seed=seed)


def mrr(matrix: Tensor, true_rows: Sequence[Collection[int]], *, seed: int = 0) -> Value:
    """Average over the queries 1 / rank of the best of their true samples. matrix [N, Q], true rows of each query."""
    found = []
    for scores, true in _queries(matrix, true_rows):
        best = scores[true].max()
        above, alike = int((scores > best).sum()), int((scores == best).sum())
        found.append(_reciprocal(above, alike, int((scores[true] == best).sum())))
    return mean_of(torch.tensor(found), seed=seed)


def _reciprocal(above: int, alike: int, true: int) -> float:
    """Average 1 / rank of the first true one over all orders of `alike` equal scores, `true` of them true."""
    behind = torch.arange(alike, dtype=torch.float64)
    # chance that the first `place` of them are all untrue, for place 0, 1, ...
    none_yet = torch.cat([torch.ones(1), ((alike - true - behind).clamp(min=0) / (alike - behind)).cumprod(0)])
    return float(((none_yet[:-1] - none_yet[1:]) / (above + behind + 1)).sum())


def duplicate_agreement(matrix: Tensor, pairs: Sequence[tuple[int, int]], *, seed: int = 0) -> Value:
    """Say how nearly a copy's scores equal its original's: 1 alike, 0 as far apart as two samples drawn at random.

    matrix [N, Q], pairs of rows. Of each pair 1 - mean over queries of |difference| / mean |difference| of any two
    samples for that query; the interval draws pairs.
    """
    check_matrix(matrix)
    if not pairs:
        raise ValueError("`pairs` is empty: name the rows of at least one sample and its copy.")
    values = matrix.double()
    N = len(values)
    # mean |a - b| of two different rows, from the sorted column: each gap is crossed by so many pairs
    weights = (2 * torch.arange(N) + 1 - N).double()
    usual = 2 * (weights[:, None] * values.sort(0).values).sum(0) / (N * (N - 1))
    if bool((usual <= 0).any()):
        raise ValueError(f"query {int((usual <= 0).nonzero()[0])} scores all samples alike: leave it out.")
    first, second = torch.tensor(list(pairs)).T
    return mean_of(1 - ((values[first] - values[second]).abs() / usual).mean(1), seed=seed)


def mean_of(values: Tensor, *, seed: int = 0) -> Value:
    """Average values [n] with the interval over draws of them; from a single one no interval can be had: nan."""
    if len(values) < 2:
        return Value(float(values.mean()), float("nan"), float("nan"))
    return mean_over(values, seed=seed)


def _queries(matrix: Tensor, true_rows: Sequence[Collection[int]]) -> list[tuple[Tensor, Tensor]]:
    """Of each query its scores [N] and the rows of its true samples."""
    check_matrix(matrix)
    if len(true_rows) != matrix.shape[1]:
        raise ValueError(f"`true_rows` must name rows for each of {matrix.shape[1]} queries: got {len(true_rows)}.")
    for at, rows in enumerate(true_rows):
        if not rows or not all(0 <= row < len(matrix) for row in rows):
            raise ValueError(f"query {at} must have true rows, all below {len(matrix)}: got {sorted(rows)}.")
    return [(scores, torch.tensor(sorted(rows))) for scores, rows in zip(matrix.T, true_rows, strict=True)]


def check_matrix(matrix: Tensor) -> None:
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"`matrix` must be scores [N, Q], not empty: got the shape {list(matrix.shape)}.")
    _check_scores(matrix)


def _check_scores(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores must be finite: there is a nan or an infinity among them.")
