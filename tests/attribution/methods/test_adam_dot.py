"""Adam's dot product equals the sum by hand, and refuses to run without moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastsft.attribution.methods._checkpoints import load, restored
from fastsft.attribution.methods._gradients import followed
from fastsft.attribution.methods.adam_dot import AdamDot
from tests.attribution.methods._support import assert_same, gradients, made, query_gradient, run_of


def _moments(model: nn.Module, steps: int, seed: int) -> dict[str, dict[str, Tensor | float]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in followed(model):
        second = torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64).square() * 1e-4
        found[layer.name] = {"exp_avg": torch.zeros_like(second), "exp_avg_sq": second, "step": torch.tensor(steps)}
    return found


def _scale(moments: dict, beta2: float, eps: float) -> Tensor:
    parts = [1 / ((state["exp_avg_sq"] / (1 - beta2 ** int(state["step"]))).sqrt() + eps) for state in moments.values()]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_scores_are_sums_over_checkpoints_each_in_its_own_metric(lora: bool) -> None:
    model, samples, targets = made(lora=lora)
    checkpoints = run_of(model)
    moments = [_moments(model, 3 + number, number) for number in range(3)]
    expected = torch.zeros(len(samples), len(targets), dtype=torch.float64)
    for checkpoint, state in zip(checkpoints, moments, strict=True):
        with restored(model):
            load(model, checkpoint)
            queries = torch.stack([query_gradient(model, rows) for rows in targets.values()])
            expected += checkpoint.share / 6 * gradients(model, samples) @ (queries * _scale(state, 0.99, 1e-3)).T
    method = AdamDot(beta2=0.99, eps=1e-3).fit(model, checkpoints, samples, moments)
    for per in ("sample", "token"):
        assert_same(method.score(targets, per=per).matrix(), expected)


def test_what_is_missing_is_a_sentence() -> None:
    model, samples, _ = made(lora=True)
    with pytest.raises(ValueError, match="none were given: pass `optimizer_state`"):
        AdamDot().fit(model, [], samples)
    moments = _moments(model, 1, 0)
    name = next(iter(moments))
    wrong = {
        "got nothing at step 0": {},
        r"got \[2\] at step 1": {"exp_avg_sq": torch.zeros(2), "step": 1.0},
        "after 1 or more steps: got .* at step 0": {**moments[name], "step": 0.0},
    }
    for sentence, state in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            AdamDot().fit(model, [], samples, [{**moments, name: state}])
    with pytest.raises(ValueError, match="`beta2` must be in"):
        AdamDot(beta2=1.0)
