"""DataInf equals its formula written out with dense matrices, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastsft.attribution.methods import _dots
from fastsft.attribution.methods.datainf import DataInf
from tests.attribution._support import make_rows, tiny_model
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


def slow_inverse(grads: Tensor, damping: float) -> Tensor:
    """1 / (n lambda) sum of (Id - g g^T / (lambda + |g|^2)), a dense matrix [P, P]."""
    n, P = grads.shape
    shift = damping * grads.square().sum(1).mean() / P
    inverse = torch.zeros(P, P, dtype=grads.dtype)
    for g in grads:
        inverse += torch.eye(P, dtype=grads.dtype) - torch.outer(g, g) / (shift + g @ g)
    return inverse / (n * shift)


def slow_scores(model: nn.Module, damping: float) -> Tensor:
    own = gradients(model, samples())
    aims = torch.stack([query_gradient(model, rows) for rows in targets().values()])
    total = torch.zeros(len(own), len(aims), dtype=own.dtype)
    for part in by_layer(model):
        total += own[:, part] @ slow_inverse(own[:, part], damping) @ aims[:, part].T
    return total / len(own)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_equals_dense_inverses_at_two_checkpoints(lora: bool) -> None:
    model, checkpoints = model_with_checkpoints(lora=lora)
    found = DataInf().fit(model, checkpoints, samples()).score(targets()).matrix()
    truth = averaged(model, checkpoints, lambda _: slow_scores(model, 0.1))
    assert torch.allclose(found, truth, rtol=1e-6, atol=1e-9 * float(truth.abs().max()))


def test_each_term_is_the_inverse_of_its_samples_curvature() -> None:
    grads = torch.randn(1, 6, dtype=torch.float64)
    inverse = slow_inverse(grads, 0.1)
    curvature = grads.T @ grads + 0.1 * grads.square().mean() * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(inverse @ curvature, torch.eye(6, dtype=torch.float64), atol=1e-10)


def test_blocks_of_queries_and_of_documents_change_nothing(monkeypatch) -> None:
    model, checkpoints = model_with_checkpoints(lora=True)
    expected = DataInf().fit(model, checkpoints, samples()).score(targets()).matrix()
    monkeypatch.setattr(_dots, "_PRODUCTS", 1)
    found = DataInf(direction_bytes=1).fit(model, checkpoints, samples()).score(targets())
    assert [block.values.shape[1] for block in found] == [1, 1]
    assert torch.allclose(found.matrix(), expected, rtol=1e-9)


def test_tokens_add_up_to_samples() -> None:
    model, checkpoints = model_with_checkpoints(lora=True)
    scores = DataInf().fit(model, checkpoints, samples()).score(targets(), per="token")
    summed = torch.stack([scores.tokens()[row.id].sum(0) for row in samples()])
    assert torch.allclose(summed, scores.matrix(), rtol=1e-9, atol=1e-12)


def test_laws() -> None:
    check_laws(lambda batching: DataInf(batching=batching))


def test_a_sample_like_the_query_helps() -> None:
    check_helps(DataInf)


def test_layers_that_no_gradient_reaches_score_nothing() -> None:
    model = tiny_model(lora=True)  # B = 0: no gradient reaches A
    scores = DataInf().fit(model, [], samples()).score(targets()).matrix()
    assert scores.isfinite().all()
    assert scores.abs().sum() > 0


def test_the_suites_device(device: torch.device) -> None:
    check_device(DataInf, device)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`damping` of datainf"):
        DataInf(damping=0.0)
    with pytest.raises(ValueError, match="`samples` is empty"):
        DataInf().fit(tiny_model(lora=True), [], [])

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(24, 4).requires_grad_(False)
            self.layer = nn.Linear(4, 4, bias=False)
            self.out = nn.Linear(4, 24, bias=False)

        def forward(self, input_ids: Tensor, use_cache: bool) -> object:
            hidden = self.layer(self.layer(self.embed(input_ids)))
            return type("Output", (), {"logits": self.out(hidden)})()

    with pytest.raises(ValueError, match=r"layer\.weight was used twice in a pass"):
        DataInf().fit(Twice(), [], make_rows(2, source="red", seed=1))
