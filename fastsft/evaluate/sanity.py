"""Checks that need no truth: do scores look at the model, at more than lengths, at more than a few samples?"""

# N samples, Q queries

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsft.attribution.methods import Checkpoint, Method, Moments, Targets
from fastsft.data import Row
from fastsft.evaluate.finding import check_matrix, mean_of
from fastsft.evaluate.intervals import Value

# rank correlation with the randomised model's scores above which a method does not look at the model
_BLIND = 0.99


def redrawn(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw every tensor anew from a normal distribution with its own mean and standard deviation.

    The mean is kept too: a norm's weights are about 1 with hardly a spread, and at 0 nothing would pass. A tensor
    that is constant stays as it is. The same seed gives the same numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(
                f"{name} holds {weight.dtype}, which can't be drawn anew: load the model in float32 or bfloat16, "
                f"unquantised, for this check."
            )
        wide = weight.detach().double()
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        found[name] = (wide.mean() + wide.std(correction=0) * noise).to(weight.dtype)
    return found


@contextmanager
def randomised(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Draw all weights of `model` anew, followed and frozen ones and adapters alike (`redrawn`); put them back after.

    A copy of the weights lies on the CPU meanwhile.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    try:
        _copy(redrawn(before, seed), parameters)
        yield
    finally:
        _copy(before, parameters)


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
        parameters[name].copy_(weight)


@dataclass(frozen=True)
class Randomisation:
    """Rank correlation of a method's scores with those it gives on a randomised model: near 0 is as it should be."""

    method: str
    correlation: Value

    @property
    def sees_model(self) -> bool:
        return self.correlation.mean < _BLIND

    def __str__(self) -> str:
        if not self.sees_model:
            return (
                f"{self.method}: {self.correlation}, so its scores say nothing about the model: it does not look at it."
            )
        return f"{self.method}: {self.correlation} with the scores on a model of random weights; 0 is best."


def randomisation(
    make: Callable[[], Method],
    model: nn.Module,
    samples: Sequence[Row],
    targets: Targets,
    *,
    checkpoints: Sequence[Checkpoint] = (),
    optimizer_state: Sequence[Moments] | None = None,
    seed: int = 0,
) -> Randomisation:
    """Score by a method on the real and on a randomised model, and correlate the ranks of the samples by query.

    make: gives the method, unfitted. The checkpoints' weights are drawn anew too, each with a seed of its own; the
    optimizer's moments are handed on as they are. Costs two fits and two scorings (Adebayo et al., "Sanity checks for
    saliency maps", NeurIPS 2018).
    """
    real, name = _scores(make(), model, checkpoints, samples, optimizer_state, targets)
    drawn = [_redrawn_checkpoint(checkpoint, seed + at) for at, checkpoint in enumerate(checkpoints, start=1)]
    with randomised(model, seed):
        other, _ = _scores(make(), model, drawn, samples, optimizer_state, targets)
    return Randomisation(name, _mean_correlation(real, other, seed))


def _scores(
    method: Method,
    model: nn.Module,
    checkpoints: Sequence[Checkpoint],
    samples: Sequence[Row],
    moments: Sequence[Moments] | None,
    targets: Targets,
) -> tuple[Tensor, str]:
    scores = method.fit(model, checkpoints, samples, moments).score(targets)
    return scores.matrix(), scores.method


def _redrawn_checkpoint(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    def weights() -> Mapping[str, Tensor]:
        found = checkpoint.weights() if callable(checkpoint.weights) else checkpoint.weights
        return redrawn(found, seed)

    return replace(checkpoint, name=f"{checkpoint.name}, drawn anew", weights=weights)


def length_correlation(matrix: Tensor, lengths: Sequence[int] | Tensor, *, seed: int = 0) -> Value:
    """Correlate the ranks of a query's scores with those of the samples' lengths, averaged over the queries.

    matrix [N, Q], lengths [N]: response tokens, say. Near 1 or -1 the scores tell long samples from short ones.
    """
    lengths = torch.as_tensor(lengths).double()
    if lengths.shape != matrix.shape[:1]:
        raise ValueError(
            f"`lengths` must have the {len(matrix)} rows of `matrix`: got the shape {list(lengths.shape)}."
        )
    return _mean_correlation(matrix, lengths[:, None].expand(matrix.shape), seed)


def distinct_top(matrix: Tensor, k: int) -> float:
    """Count the different samples among the k best of all queries, as a share of k * Q.

    matrix [N, Q]. 1: every query has samples of its own; 1 / Q: all have the same. Equal scores by place.
    """
    check_matrix(matrix)
    N, Q = matrix.shape
    if not 1 <= k <= N:
        raise ValueError(f"`k` must be 1 to {N}, the number of samples: got {k}.")
    best = matrix.argsort(dim=0, descending=True, stable=True)[:k]
    return len(best.unique()) / (k * Q)


def _mean_correlation(one: Tensor, other: Tensor, seed: int) -> Value:
    """Average Spearman's correlation of the columns of [N, Q]; queries that one side scores alike are left out."""
    check_matrix(one)
    check_matrix(other)
    ranks = [np.stack([_ranks(column) for column in each.double().numpy().T], axis=1) for each in (one, other)]
    parts = [rank - rank.mean(0) for rank in ranks]
    sizes = [np.linalg.norm(part, axis=0) for part in parts]
    told = (sizes[0] > 0) & (sizes[1] > 0)
    if not told.any():
        raise ValueError("no query ranks the samples: all its scores, or all lengths, are equal.")
    found = (parts[0] * parts[1]).sum(0)[told] / (sizes[0] * sizes[1])[told]
    return mean_of(torch.from_numpy(found), seed=seed)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank values [N], equal ones at their mean rank."""
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[group]
