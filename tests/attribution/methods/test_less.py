"""LESS equals its formula, sample by sample; what it can't do without moments, or for tokens, it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.attribution.methods import _dots
from fastsft.attribution.methods._gradients import followed
from fastsft.attribution.methods.less import Less
from fastsft.sketch import SketchSpec
from tests.attribution._support import make_rows
from tests.attribution.methods._cases import (
    averaged,
    check_device,
    check_helps,
    check_laws,
    model_with_checkpoints,
    samples,
    targets,
)
from tests.attribution.methods._support import gradients, query_gradient

SPEC = SketchSpec(size=64, seed=3)


def moments(model: nn.Module, number: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(9)

    def one(shape: torch.Size) -> dict[str, Any]:
        first = 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)
        second = 0.01 * torch.rand(shape, generator=generator, dtype=torch.float64)
        return {"exp_avg": first, "exp_avg_sq": second, "step": 7.0}

    return [{name: one(p.shape) for name, p in model.named_parameters() if p.requires_grad} for _ in range(number)]


def flat(model: nn.Module, state: Any, key: str) -> Tensor:
    return torch.cat([state[layer.name][key].flatten() for layer in followed(model)])


def gammas(model: nn.Module, state: Any, momentum: bool, mean: bool) -> Tensor:
    rows = samples()
    own = gradients(model, rows)
    if mean:
        own = own / torch.tensor([row.num_supervised for row in rows])[:, None]
    first = 0.9 * flat(model, state, "exp_avg") * momentum + 0.1 * own
    return first / (0.999 * flat(model, state, "exp_avg_sq") + 0.001 * own**2 + 1e-8).sqrt()


def sketch_matrix_of(model: nn.Module) -> Tensor:
    """The projection of all layers, written out [P, K]: what the operator makes of each unit matrix."""
    parts = []
    for layer in followed(model):
        units = torch.eye(layer.weight.numel(), dtype=torch.float64).view(-1, *layer.shape)
        parts.append(ops.sketch_matrix(units, SPEC.size, SPEC.layer_seed(layer.name)))
    return torch.cat(parts)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def slow_scores(model: nn.Module, gamma: Tensor, P: Tensor | None, aggregate: str) -> Tensor:
    aims = []
    for rows in targets().values():
        parts = [query_gradient(model, [row]) for row in rows] if aggregate == "examples" else []
        parts = torch.stack(parts or [query_gradient(model, rows)])
        aims.append(unit(parts if P is None else parts @ P).mean(0))
    return unit(gamma if P is None else gamma @ P) @ torch.stack(aims).T


@pytest.mark.parametrize("aggregate", ["examples", "gradient"])
@pytest.mark.parametrize("sketched", [False, True], ids=["exact", "sketched"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_equals_the_formula_at_two_checkpoints(lora: bool, sketched: bool, aggregate: str) -> None:
    model, checkpoints = model_with_checkpoints(lora=lora)
    states = moments(model)
    P = sketch_matrix_of(model) if sketched else None
    method = Less(sketch=SPEC if sketched else None, aggregate=aggregate)
    found = method.fit(model, checkpoints, samples(), states).score(targets()).matrix()

    def truth_at(number: int) -> Tensor:
        return slow_scores(model, gammas(model, states[number], True, True), P, aggregate)

    truth = averaged(model, checkpoints, truth_at)
    # the shares 1/n of a mean loss are float32
    assert torch.allclose(found, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_momentum_and_loss_are_options(momentum: bool, loss: str) -> None:
    model, checkpoints = model_with_checkpoints(lora=True)
    states = moments(model)
    method = Less(momentum=momentum, loss=loss).fit(model, checkpoints, samples(), states)

    def truth_at(number: int) -> Tensor:
        return slow_scores(model, gammas(model, states[number], momentum, loss == "mean"), None, "examples")

    truth = averaged(model, checkpoints, truth_at)
    assert torch.allclose(method.score(targets()).matrix(), truth, rtol=1e-6, atol=1e-7)


def test_scores_are_cosines_and_many_rows_of_a_query_are_read_in_parts(monkeypatch) -> None:
    model, checkpoints = model_with_checkpoints(lora=True)
    query = {"many": make_rows(5, source="red", seed=7)}
    method = Less().fit(model, checkpoints, samples(), moments(model))
    whole = method.score(query).matrix()
    alone = method.score(query["many"]).matrix()
    assert alone.abs().max() <= 1
    assert torch.allclose(whole[:, 0], alone.mean(1), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(_dots, "_PRODUCTS", 1)
    assert torch.allclose(method.score(query).matrix(), whole, rtol=1e-9, atol=1e-12)


def test_laws() -> None:
    states = moments(model_with_checkpoints(lora=True)[0])
    check_laws(lambda batching: Less(batching=batching), states, rtol=1e-6)  # the shares 1/n are float32
    check_laws(lambda batching: Less(batching=batching, sketch=SPEC, aggregate="gradient"), states, rtol=1e-6)


def test_a_sample_like_the_query_helps() -> None:
    model, _ = model_with_checkpoints(lora=True)
    check_helps(lambda: Less(momentum=False), moments(model))


def test_adam_that_has_seen_equal_curvature_without_momentum_is_the_gradients_cosine() -> None:
    model, _ = model_with_checkpoints(lora=True)
    flat_state = {
        name: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, 1e6), "step": 1.0}
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    found = Less(aggregate="gradient").fit(model, [], samples(), [flat_state]).score(targets()).matrix()
    aims = torch.stack([query_gradient(model, rows) for rows in targets().values()])
    assert torch.allclose(found, unit(gradients(model, samples())) @ unit(aims).T, atol=1e-6)


def test_rows_without_a_gradient_score_zero() -> None:
    model, _ = model_with_checkpoints(lora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()  # A = B = 0: no gradient anywhere
    found = Less(momentum=False).fit(model, [], samples(), moments(model, 1)).score(targets()).matrix()
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("sketch", [None, SPEC], ids=["exact", "sketched"])
def test_the_suites_device(device: torch.device, sketch: SketchSpec | None) -> None:
    check_device(lambda: Less(sketch=sketch), device, moments(model_with_checkpoints(lora=True)[0]))


def test_refusals() -> None:
    model, checkpoints = model_with_checkpoints(lora=True)
    with pytest.raises(ValueError, match="read_moments"):
        Less().fit(model, checkpoints, samples())
    with pytest.raises(ValueError, match="one state a checkpoint"):
        Less().fit(model, checkpoints, samples(), moments(model, 1))
    with pytest.raises(ValueError, match="per='sample'"):
        Less().fit(model, checkpoints, samples(), moments(model)).score(targets(), per="token")
    with pytest.raises(ValueError, match="`aggregate`"):
        Less(aggregate="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of kind 'sjlt'"):
        Less(sketch=SketchSpec(kind="factored", size=64))
    states = moments(model)
    del states[1][followed(model)[3].name]
    with pytest.raises(ValueError, match="moments have none of"):
        Less().fit(model, checkpoints, samples(), states).score(targets()).matrix()
