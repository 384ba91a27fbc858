"""Models off their starting point, and a model's sketches by id."""

from __future__ import annotations

import torch
from torch import nn

from fastsft.capturing import find_layers
from fastsft.sketch import SketchSpec, sketch_samples
from tests.attribution._support import trainable
from tests.capturing._support import one_by_one


def moved(model: nn.Module) -> nn.Module:
    """LoRA starts at B = 0, where half of the gradients are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return model


def collect(model: nn.Module, rows: list, spec: SketchSpec, **settings) -> dict[str, torch.Tensor]:
    found = {}
    for batch in sketch_samples(model, rows, spec, **settings):
        assert len(batch.sketches) == len(batch.ids) == len(batch.sources) == len(batch.tokens)
        found |= dict(zip(batch.ids, batch.sketches, strict=True))
    return found


def followed_grads(model: nn.Module, rows: list, extra: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Each row's own gradient {name: [D, O, I]} of the layers that a capture follows, by one backward pass a row."""
    found = one_by_one(model, rows)
    return {
        layer.name: torch.stack([grads[layer.name] for grads in found]).reshape(-1, *layer.shape)
        for layer in find_layers(model, extra)
    }
