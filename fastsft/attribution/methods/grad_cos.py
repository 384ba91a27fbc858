"""Gradient cosine: the gradient dot product without the lengths."""

# N samples, Q queries, T tokens

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsft.attribution.methods._base import Moments, Per
from fastsft.attribution.methods._dots import Dots
from fastsft.attribution.methods._gradients import Directions, GradientMethod, Turn, contracted
from fastsft.data import Row


class GradCos(GradientMethod):
    """score(i, q) = <g_q, g_i> / (|g_q| |g_i|) over all followed layers together; of several checkpoints the mean by
    share.

    A token's score is its share of the dot product, divided by the same norms. Each sample's gradient is formed a few
    rows at a time for its norm. A gradient that is zero has the cosine 0 with all.
    """

    name = "grad_cos"
    unit = "cosine, -1 to 1: no amount of loss"

    def turn(self, moments: Moments | None) -> Turn:
        return _unit

    def contract(
        self, batches: Sequence[Sequence[Row]], directions: Directions, per: Per
    ) -> tuple[Tensor, list[Tensor]]:
        """Dot each row's gradient, divided by its norm, with `directions` -> [n, Q], and of each row [T, Q]."""
        dots = Dots(directions, per, squares=True)
        values, tokens, squares = contracted(self.model, batches, dots, self.batching)
        assert squares is not None
        factors = _inverse_norms(squares)
        parts = [part * factor for part, factor in zip(tokens, factors, strict=True)] if tokens else []
        return values * factors[:, None], parts


def _unit(directions: Directions) -> Directions:
    """Divide each query's gradient by its norm over all layers."""
    squares = torch.stack([direction.flatten(1).square().sum(1) for direction in directions.values()]).sum(0)
    factors = _inverse_norms(squares)[:, None, None]
    return {name: direction * factors for name, direction in directions.items()}


def _inverse_norms(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.rsqrt(), 0)
