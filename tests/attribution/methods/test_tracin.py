"""TracIn equals its sum over checkpoints, and foretells what a step of gradient descent does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsft.attribution.methods._checkpoints import restored
from fastsft.attribution.methods.tracin import TracIn
from fastsft.data import Row
from tests.attribution.methods._support import (
    assert_same,
    at,
    gradient,
    gradients,
    made,
    query_gradient,
    run_of,
    summed_loss,
)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_scores_are_sums_over_checkpoints_by_share(lora: bool) -> None:
    model, samples, targets = made(lora=lora)
    checkpoints = run_of(model)

    def dots() -> Tensor:
        queries = torch.stack([query_gradient(model, rows) for rows in targets.values()])
        return gradients(model, samples) @ queries.T

    expected = sum(checkpoint.share / 6 * at(model, checkpoint, dots) for checkpoint in checkpoints)
    assert_same(TracIn().fit(model, checkpoints, samples).score(targets).matrix(), expected)


def test_a_positive_score_is_the_loss_that_a_step_on_the_sample_takes_off() -> None:
    model, samples, targets = made(lora=True)
    scores = TracIn().fit(model, [], samples).score(targets).matrix()
    rate = 1e-3  # Llama's norms round to float32 whatever the weights are: a shorter step would drown

    def loss_after(sample: Row, rate: float) -> Tensor:
        step = gradient(model, sample)
        with restored(model), torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in step:
                    parameter.sub_(rate * step[name])
            rows = targets["red"]
            return sum(summed_loss(model, row) for row in rows) / sum(row.num_supervised for row in rows)

    for sample, score in zip(samples, scores[:, 0], strict=True):
        taken_off = (loss_after(sample, -rate) - loss_after(sample, rate)) / (2 * rate)
        assert torch.allclose(taken_off, score, rtol=0.01, atol=0.01)
