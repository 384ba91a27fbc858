"""Tail-patch: one more step on a query's best-scored samples, and how far the query's loss falls. No retraining."""

# N samples, Q queries, P trainable numbers

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsft.data import IGNORED, Row, collate, told_labels
from fastsft.evaluate.intervals import Value, between, crossed_draws, mean_over, weighted_mean
from fastsft.evaluate.lds import query_scores
from fastsft.evaluate.retrain import Query, query_losses
from fastsft.evaluate.truth import EvaluationError
from fastsft.train.config import TrainConfig
from fastsft.train.history import learning_rates


@dataclass(frozen=True)
class TailRow:
    """How far one step on a method's top samples takes a query's loss down, in nats per response token.

    The mean is over queries, with its 95 % interval; `above_random` is the paired difference to random samples.
    """

    method: str
    fall: Value
    above_random: Value | None


def tail_patch(
    model: nn.Module,
    samples: Sequence[Row],
    queries: Sequence[Query],
    scores: Mapping[str, Tensor],
    *,
    length: float,
    top: int = 5,
    pad_id: int = 0,
    seed: int = 0,
) -> list[TailRow]:
    """Step once from the model's weights on the `top` samples of each query and method, measure, step back.

    scores: [N, Q] by method, or [N, A] with abilities in the order of their first query; "random" among them is what
    the others are compared with. The step is plain: along minus the gradient of the samples' mean loss per response
    token, over all trainable weights, and `length` long (see `step_length`), so that no method gains by naming samples
    with large gradients. Dropout is off. Costs a pass over `top` samples and one over the query for each.
    """
    if not 0 < top <= len(samples):
        raise EvaluationError(f"`top` must be from 1 to the {len(samples)} samples: got {top}.")
    abilities = [query.ability for query in queries]
    before = query_losses(model, [query.row for query in queries], pad_id)
    falls = {}
    known: dict[tuple[int, tuple[int, ...]], float] = {}  # methods often agree
    for method, matrix in scores.items():
        best = query_scores(method, matrix, len(samples), abilities).topk(top, dim=0).indices.T.tolist()
        found = []
        for at, chosen in enumerate(best):
            key = at, tuple(sorted(chosen))
            if key not in known:
                known[key] = _after(model, [samples[i] for i in key[1]], queries[at].row, length, pad_id)
            found.append(float(before[at]) - known[key])
        falls[method] = torch.tensor(found, dtype=torch.float64)
    draws = crossed_draws(1, len(queries), seed=seed).queries
    rows = []
    for method, fall in falls.items():
        above = None
        if "random" in falls and method != "random":
            difference = fall - falls["random"]
            above = Value(float(difference.mean()), *between(weighted_mean(difference.expand_as(draws), draws)))
        rows.append(TailRow(method, mean_over(fall, seed=seed), above))
    return sorted(rows, key=lambda row: -row.fall.mean)


def step_length(train: TrainConfig, model: nn.Module) -> float:
    """Say how long the step is: the run's last learning rate above 0, times the square root of P.

    That is the length of a step of Adam at this rate, which moves every weight by about the rate. A schedule that ends
    near 0 would leave a change below the rounding of float32, so the rate is at least a hundredth of the run's peak.
    """
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    last = next(rate for rate in reversed(learning_rates(train)) if rate > 0)
    return max(last, train.learning_rate / 100) * math.sqrt(size)


def _after(model: nn.Module, samples: Sequence[Row], query: Row, length: float, pad_id: int) -> float:
    """Measure the query's loss after one step on the samples, and put the weights back."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(_mean_loss(model, samples, pad_id), weights, allow_unused=True)
    norm = torch.stack([g.double().square().sum() for g in gradients if g is not None]).sum().sqrt()
    scale = float(length / norm) if norm > 0 else 0.0
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.sub_(gradient * scale)
        found = float(query_losses(model, [query], pad_id)[0])
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
    return found


def _mean_loss(model: nn.Module, rows: Sequence[Row], pad_id: int) -> Tensor:
    """The rows' loss in nats per response token, dropout off."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(rows, pad_id).items()}
    labels = batch.pop("labels")
    training = model.training
    model.eval()
    with told_labels(labels):
        logits = model(**batch, use_cache=False).logits[:, :-1]
    model.train(training)
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED)
