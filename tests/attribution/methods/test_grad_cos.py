"""Gradient cosine equals its definition on gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastsft.attribution.methods.grad_cos import GradCos
from fastsft.attribution.methods.grad_dot import GradDot
from fastsft.data import Row
from fastsft.sketch.passes import Batching
from tests.attribution._support import tiny_model
from tests.attribution.methods._support import assert_same, at, gradients, made, query_gradient, run_of
from tests.attribution.methods.test_gradients import BATCHINGS


def _cosines(model: nn.Module, samples: list[Row], targets: dict[str, list[Row]]) -> Tensor:
    queries = torch.stack([query_gradient(model, rows) for rows in targets.values()])
    return nn.functional.normalize(gradients(model, samples), dim=1) @ nn.functional.normalize(queries, dim=1).T


@pytest.mark.parametrize("batching", BATCHINGS.values(), ids=BATCHINGS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_scores_are_cosines_over_all_layers_together(lora: bool, batching: Batching) -> None:
    model, samples, targets = made(lora=lora)
    expected = _cosines(model, samples, targets)
    assert_same(GradCos(batching=batching).fit(model, [], samples).score(targets).matrix(), expected)


def test_tokens_are_their_share_of_the_dot_product() -> None:
    model, samples, targets = made(lora=True)
    scores = GradCos(batching=Batching(max_tokens=30)).fit(model, [], samples).score(targets, per="token")
    assert_same(scores.matrix(), _cosines(model, samples, targets))
    dots = GradDot().fit(model, [], samples).score(targets, per="token")
    for row, values in zip(samples, scores.matrix(), strict=True):
        tokens, shares = scores.tokens()[row.id], dots.tokens()[row.id]
        assert_same(tokens.sum(0), values)
        assert_same(tokens / tokens.sum(0), shares / shares.sum(0))


def test_checkpoints_add_by_share_each_with_norms_of_its_own() -> None:
    model, samples, targets = made(lora=True)
    checkpoints = run_of(model)
    parts = [at(model, checkpoint, lambda: _cosines(model, samples, targets)) for checkpoint in checkpoints]
    expected = (parts[0] + 2 * parts[1] + 3 * parts[2]) / 6
    assert_same(GradCos().fit(model, checkpoints, samples).score(targets).matrix(), expected)


def test_a_row_is_like_itself_and_a_zero_gradient_like_nothing() -> None:
    model, samples, _ = made(lora=True)
    found = GradCos().fit(model, [], samples).score(samples).matrix()
    assert torch.allclose(found.diagonal(), torch.ones(len(samples), dtype=found.dtype))
    assert float(found.abs().max()) <= 1 + 1e-12
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()  # no gradient reaches either side
    for per in ("sample", "token"):
        assert not GradCos().fit(model, [], samples).score(samples[:2], per=per).matrix().any()


def test_a_layer_used_twice_is_refused() -> None:
    model = tiny_model(lora=False)
    model.model.layers[1] = model.model.layers[0]
    _, samples, targets = made(lora=False)
    with pytest.raises(ValueError, match="was used twice"):
        GradCos().fit(model, [], samples).score(targets).matrix()
    assert GradDot().fit(model, [], samples).score(targets).matrix().any()
