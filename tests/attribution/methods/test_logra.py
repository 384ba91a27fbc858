"""LoGra equals the same scores from explicit projection matrices and dense inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.attribution.methods._gradients import followed
from fastsft.attribution.methods.logra import LoGra, sides_of
from fastsft.ops._project_sides import random_signs
from fastsft.ops._sjlt import derived_seed
from fastsft.sketch import SketchSpec
from tests.attribution._support import tiny_model
from tests.attribution.methods._cases import (
    averaged,
    by_layer,
    check_device,
    check_helps,
    check_laws,
    model_with_checkpoints,
    samples,
    targets,
)
from tests.attribution.methods._support import gradients, query_gradient

SIZE = 32


def projection(name: str, O: int, I: int) -> Tensor:
    """A layer's whole projection, written out [K, O * I]; a side that is four wide is kept as it is."""
    seed = SketchSpec(kind="kronecker", size=SIZE, seed=3).layer_seed(name)
    k_i = 4 if I == 4 else 8
    k_o = SIZE // k_i
    left = torch.eye(O) if O == k_o else random_signs(O, k_o, derived_seed(seed, 4)).T / k_o**0.5
    right = torch.eye(I) if I == k_i else random_signs(I, k_i, derived_seed(seed, 3)).T / k_i**0.5
    return torch.kron(left.contiguous().double(), right.contiguous().double())


def slow_scores(model: nn.Module, damping: float) -> Tensor:
    own = gradients(model, samples())
    aims = torch.stack([query_gradient(model, rows) for rows in targets().values()])
    total = torch.zeros(len(own), len(aims), dtype=own.dtype)
    for part, layer in zip(by_layer(model), followed(model), strict=True):
        P = projection(layer.name, *layer.shape)
        phi, query = own[:, part] @ P.T, aims[:, part] @ P.T
        fisher = phi.T @ phi / len(phi)
        fisher += damping * torch.linalg.eigvalsh(fisher).mean() * torch.eye(len(fisher))
        total += phi @ torch.linalg.inv(fisher) @ query.T
    return total / len(own)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_equals_explicit_projections_at_two_checkpoints(lora: bool) -> None:
    model, checkpoints = model_with_checkpoints(lora=lora)
    found = LoGra(size=SIZE, seed=3).fit(model, checkpoints, samples()).score(targets()).matrix()
    truth = averaged(model, checkpoints, lambda _: slow_scores(model, 0.1))
    assert torch.allclose(found, truth, rtol=1e-6, atol=1e-7 * float(truth.abs().max()))  # signs / sqrt(k) are float32


def test_sides_are_those_of_the_projecting_operator() -> None:
    spec = SketchSpec(kind="kronecker", size=32, seed=3)
    for layer in followed(tiny_model(lora=False)):
        O, I = layer.shape
        x, dy = torch.randn(5, I, dtype=torch.float64), torch.randn(5, O, dtype=torch.float64)
        made = sides_of(layer, spec)
        seed = spec.layer_seed(layer.name)
        found = ops.sample_grad_project(x, dy, torch.tensor([0, 5]), 32, kind="kronecker", seed=seed)[0]
        left, right = (torch.eye(n) if s is None else s for n, s in ((O, made.left), (I, made.right)))
        truth = left.double().T @ dy.T @ x @ right.double()
        assert torch.allclose(found, truth.flatten(), rtol=1e-6, atol=1e-6)  # signs / sqrt(k) are float32


def test_a_size_that_keeps_everything_is_exact() -> None:
    """LoRA's A [4, 16] and B [16, 4] are kept whole at 64: then projecting is turning by nothing."""
    model, checkpoints = model_with_checkpoints(lora=True)
    large = LoGra(size=4096).fit(model, checkpoints, samples()).score(targets()).matrix()
    other = LoGra(size=4096, seed=9).fit(model, checkpoints, samples()).score(targets()).matrix()
    # layers of 24 are projected to 16, all others are whole: seeds differ in those alone
    assert not torch.equal(large, other)
    assert torch.corrcoef(torch.stack([large.flatten(), other.flatten()]))[0, 1] > 0.9


def test_tokens_add_up_to_samples() -> None:
    model, checkpoints = model_with_checkpoints(lora=True)
    scores = LoGra(size=SIZE).fit(model, checkpoints, samples()).score(targets(), per="token")
    summed = torch.stack([scores.tokens()[row.id].sum(0) for row in samples()])
    assert torch.allclose(summed, scores.matrix(), rtol=1e-9, atol=1e-12)


def test_laws() -> None:
    check_laws(lambda batching: LoGra(size=SIZE, batching=batching))


def test_a_sample_like_the_query_helps() -> None:
    check_helps(LoGra)


def test_damping_is_each_layers_own() -> None:
    """A layer's scores do not depend on another's scale: one damping for all would."""
    model, _ = model_with_checkpoints(lora=True)
    method = LoGra(size=SIZE).fit(model, [], samples())
    names = [layer.name for layer in followed(model)]
    ones = {layer.name: torch.ones(1, *layer.shape, dtype=torch.float64) for layer in followed(model)}
    alone = method.turns[0]({names[-1]: ones[names[-1]]})[names[-1]]
    assert torch.equal(method.turns[0](ones)[names[-1]], alone)
    for layer in followed(model)[:-1]:
        layer.weight.requires_grad_(False)
    last = LoGra(size=SIZE).fit(model, [], samples()).turns[0]({names[-1]: ones[names[-1]]})[names[-1]]
    assert torch.allclose(last, alone, rtol=1e-9)


def test_layers_that_no_gradient_reaches_score_nothing() -> None:
    scores = LoGra(size=SIZE).fit(tiny_model(lora=True), [], samples()).score(targets()).matrix()
    assert scores.isfinite().all()
    assert scores.abs().sum() > 0


def test_the_suites_device(device: torch.device) -> None:
    check_device(lambda: LoGra(size=SIZE), device)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`damping` of logra"):
        LoGra(damping=-1.0)
    with pytest.raises(ValueError, match="power of two"):
        LoGra(size=48)
