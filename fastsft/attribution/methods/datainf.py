"""DataInf: the inverse curvature as a mean of inverses, each of one sample, in closed form (Kwon et al. 2024)."""

# N samples, Q queries, D documents of a batch, O outputs, I inputs of a layer, T tokens

from __future__ import annotations

import torch
from torch import Tensor

from fastsft.attribution.methods._base import Moments
from fastsft.attribution.methods._dots import products, sweep
from fastsft.attribution.methods._gradients import Directions, GradientMethod, Turn
from fastsft.capturing import Layer
from fastsft.sketch.passes import Batching


class DataInf(GradientMethod):
    """score(i, q) = <H^-1 g_q, g_i> / N, layer by layer, with (arXiv 2310.00902, equation 5)

        H^-1 g = 1 / (N lambda) sum over samples j of (g - g_j <g_j, g> / (lambda + |g_j|^2))
        lambda = damping * mean over samples of |g_j|^2 / (O I)

    The mean of inverses stands for the inverse of the mean. Along N samples at right angles to one another it is nearly
    1 / lambda where the other is 1 / (lambda + |g|^2 / N), that is O I / (damping N) times too large: the scores rank
    samples, and do not measure them in nats.

    A pass over the samples at `fit` for lambda, and one more for each block of queries; in memory are as many matrices
    as there are queries. Layers that no gradient reaches (LoRA's A while B = 0) score 0.
    """

    name = "datainf"
    unit = "relative: nats per response token by an inverse that is too large where samples differ; ranks count"

    def __init__(self, *, damping: float = 0.1, batching: Batching | None = None, direction_bytes: int = 2**31) -> None:
        super().__init__(batching=batching, direction_bytes=direction_bytes)
        if damping <= 0:
            raise ValueError(f"`damping` of datainf, a share of the mean squared gradient, must be above 0: {damping}.")
        self.damping = damping

    def turn(self, moments: Moments | None) -> Turn:
        """Learn each layer's lambda; return the map that takes the second pass."""
        squares: dict[str, float] = {}

        def measure(layer: Layer, x: Tensor, dy: Tensor, offsets: Tensor) -> None:
            total = sum(float(grads.double().square().sum()) for _, grads in products(x, dy, offsets))
            squares[layer.name] = squares.get(layer.name, 0.0) + total / layer.weight.numel()

        for _ in sweep(self.model, self.batching.plan(self.samples), self.batching, measure):
            pass
        lambdas = {name: self.damping * total / len(self.samples) for name, total in squares.items()}
        return lambda directions: self._turned(directions, lambdas)

    def _turned(self, directions: Directions, lambdas: dict[str, float]) -> Directions:
        """Apply H^-1 / N at the model's weights."""
        sums = {name: torch.zeros_like(direction) for name, direction in directions.items()}

        def gather(layer: Layer, x: Tensor, dy: Tensor, offsets: Tensor) -> None:
            if layer.name not in directions or not lambdas[layer.name]:
                return
            direction, total = directions[layer.name].flatten(1), sums[layer.name].view(len(sums[layer.name]), -1)
            for _, grads in products(x, dy, offsets):
                flat = grads.flatten(1).to(direction)
                weights = flat @ direction.T / (lambdas[layer.name] + flat.square().sum(1))[:, None]  # [D, Q]
                total.addmm_(weights.T, flat)

        for _ in sweep(self.model, self.batching.plan(self.samples), self.batching, gather):
            pass
        N = len(self.samples)
        return {
            name: (directions[name] - total / N) / (lambdas[name] * N) if lambdas.get(name) else total
            for name, total in sums.items()
        }
