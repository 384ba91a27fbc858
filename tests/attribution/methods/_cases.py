"""Two checkpoints of a tiny model with samples and queries, and the laws that every method keeps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastsft.attribution.methods._checkpoints import Checkpoint, load, restored, trainable
from fastsft.attribution.methods._gradients import followed
from fastsft.data import Row
from fastsft.sketch.passes import Batching
from tests.attribution._support import make_rows, tiny_model
from tests.sketch._support import moved

SHARES = (3.0, 1.0)


def samples() -> list[Row]:
    return make_rows(5, source="red", seed=1) + make_rows(4, source="blue", seed=2)


def targets() -> dict[str, list[Row]]:
    return {"one": make_rows(2, source="red", seed=7), "two": make_rows(1, source="blue", seed=8)}


def model_with_checkpoints(*, lora: bool, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Checkpoint]]:
    model = moved(tiny_model(lora=lora, dtype=dtype))
    generator = torch.Generator().manual_seed(5)
    found = []
    for number, share in enumerate(SHARES):
        weights = {
            name: value + 0.03 * torch.randn(value.shape, generator=generator).to(value)
            for name, value in trainable(model).items()
        }
        found.append(Checkpoint(f"step {number}", weights, share))
    return model, found


def averaged(model: nn.Module, checkpoints: list[Checkpoint], score: Callable[[int], Tensor]) -> Tensor:
    """Take the mean by shares of what `score(number)` gives at each checkpoint's weights."""
    total = torch.zeros(())
    with restored(model):
        for number, (checkpoint, share) in enumerate(zip(checkpoints, SHARES, strict=True)):
            load(model, checkpoint)
            total = total + share / sum(SHARES) * score(number)
    return total


def by_layer(model: nn.Module) -> list[slice]:
    """Where each followed layer's numbers are in a flat gradient."""
    ends = torch.tensor([0, *(layer.weight.numel() for layer in followed(model))]).cumsum(0).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def check_laws(make: Callable[[Batching], Any], moments: list[Any] | None = None, *, rtol: float = 1e-7) -> None:
    """Scores depend neither on batches, packing nor order; a row twice scores twice; the model stays as it was."""
    model, checkpoints = model_with_checkpoints(lora=True)
    rows = samples()
    before = [(p.requires_grad, p.detach().clone()) for p in model.parameters()]
    model.train()
    expected = make(Batching()).fit(model, checkpoints, rows, moments).score(targets()).matrix()
    assert expected.isfinite().all()
    scale = float(expected.abs().max())
    for settings in ({"max_tokens": 1}, {"max_tokens": 31}, {"max_tokens": 40, "packing": True}):
        found = make(Batching(**settings)).fit(model, checkpoints, rows[::-1], moments).score(targets())
        assert torch.allclose(found.matrix().flip(0), expected, rtol=rtol, atol=rtol * scale), settings
    stopped = iter(make(Batching(max_tokens=1)).fit(model, checkpoints, rows, moments).score(targets()))
    next(stopped)
    assert all(p.requires_grad == was and torch.equal(p, value) for p, (was, value) in zip(model.parameters(), before))
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    twice = make(Batching()).fit(model, checkpoints, [*rows, rows[0]], moments).score(targets()).matrix()
    assert torch.allclose(twice[0], twice[-1], rtol=rtol, atol=0)


def check_helps(make: Callable[[], Any], moments: list[Any] | None = None) -> None:
    """A sample that is the query itself helps it, more than all others do."""
    model, checkpoints = model_with_checkpoints(lora=True)
    rows = samples()
    scores = make().fit(model, checkpoints, rows, moments).score([rows[2], rows[7]]).matrix()
    assert scores[2, 0] > 0
    assert scores[7, 1] > 0
    assert scores.argmax(0).tolist() == [2, 7]


def check_device(make: Callable[[], Any], device: torch.device, moments: list[Any] | None = None) -> None:
    """Scores of a model on the suite's device are those of the same model in float64 on the CPU."""
    model, checkpoints = model_with_checkpoints(lora=True)
    expected = make().fit(model, checkpoints, samples(), moments).score(targets()).matrix()
    narrow, same = model_with_checkpoints(lora=True, dtype=torch.float32)
    found = make().fit(narrow.to(device), same, samples(), moments).score(targets()).matrix()
    assert found.device.type == "cpu"
    # float32 through a model, and an inverse damped by a hundredth or more
    assert (found - expected).norm() < 1e-3 * expected.norm()
