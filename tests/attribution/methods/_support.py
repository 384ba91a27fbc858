"""The slow truth of every method: gradients by autograd, a row at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastsft.attribution.methods import Checkpoint
from fastsft.attribution.methods._checkpoints import load, restored, trainable
from fastsft.attribution.methods._gradients import followed
from fastsft.data import Row, collate
from tests.attribution._support import make_rows, tiny_model
from tests.sketch._support import moved


def summed_loss(model: nn.Module, row: Row) -> Tensor:
    batch = collate([row], 0)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0, :-1]
    labels = batch["labels"][0, 1:]
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def gradient(model: nn.Module, row: Row) -> dict[str, Tensor]:
    """The gradient of a row's summed loss by parameter name, of the followed layers."""
    names = [layer.name for layer in followed(model)]
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(summed_loss(model, row), [parameters[name] for name in names])
    return dict(zip(names, found, strict=True))


def gradients(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Every row's gradient of its summed loss, all followed layers end to end [N, P]."""
    return torch.stack([torch.cat([g.flatten() for g in gradient(model, row).values()]) for row in rows])


def query_gradient(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """The gradient of a query's loss, in nats per response token [P]."""
    return gradients(model, rows).sum(0) / sum(row.num_supervised for row in rows)


def made(*, lora: bool, rows: int = 7) -> tuple[nn.Module, list[Row], dict[str, list[Row]]]:
    """A tiny model in float64 off its starting point, samples of two sources, and three queries, one of two rows."""
    model = moved(tiny_model(lora=lora))
    samples = make_rows(rows - rows // 2, source="red", seed=1) + make_rows(rows // 2, source="blue", seed=2)
    red, blue = make_rows(2, source="red", seed=3), make_rows(2, source="blue", seed=4)
    return model, samples, {"red": red, "blue": blue[:1], "other": blue[1:]}


def run_of(model: nn.Module, steps: int = 3) -> list[Checkpoint]:
    """Checkpoints of a run that wanders at random; its shares do not sum to one."""
    generator = torch.Generator().manual_seed(7)
    weights = trainable(model)
    found = []
    for step in range(steps):
        for name, weight in weights.items():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
            weights[name] = weight + 0.05 * noise
        found.append(Checkpoint(f"step {step}", dict(weights), share=float(step + 1)))
    return found


def at(model: nn.Module, checkpoint: Checkpoint, look: Callable[[], Tensor]) -> Tensor:
    """What `look` finds at a checkpoint's weights."""
    with restored(model):
        load(model, checkpoint)
        return look()


def assert_same(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    """Equal but for rounding; of what cancels, against the largest."""
    assert found.shape == expected.shape
    assert torch.allclose(found.to(expected), expected, rtol=rtol, atol=1e-3 * rtol * float(expected.abs().max()))
