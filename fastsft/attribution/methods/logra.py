"""LoGra: each layer's gradients projected from both sides, and the inverse Fisher matrix of what remains."""

# N samples, Q queries, D documents of a batch, O outputs, I inputs of a layer, K numbers kept of it

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsft import ops
from fastsft.attribution.methods._base import Moments
from fastsft.attribution.methods._dots import sweep
from fastsft.attribution.methods._gradients import GradientMethod, Turn, followed
from fastsft.capturing import Layer
from fastsft.ops._project import KRONECKER_DY, KRONECKER_X
from fastsft.ops._project_sides import kronecker_sides, random_signs
from fastsft.ops._sjlt import derived_seed
from fastsft.sketch import SketchSpec
from fastsft.sketch.passes import Batching


class LoGra(GradientMethod):
    """score(i, q) = sum over layers of phi_q^T (F + lambda)^-1 phi_i / N (arXiv 2405.13954), with

        phi = vec(P_o G P_i^T),   F = mean over samples of phi phi^T,   lambda = damping * mean eigenvalue of F

    P_o, P_i: random signs over the root of their number, seeded by the layer's name, as a SketchSpec of kind
    "kronecker" has them; a side that is kept whole is not projected. F and lambda are each layer's own, in float64.

    size: numbers kept of a layer, a power of two; of a smaller layer as many as it allows. F takes size^2 * 8 bytes a
    layer and checkpoint. As <phi_q', P_o G P_i^T> = <P_o^T phi_q' P_i, G>, samples are contracted with the queries
    projected, turned and taken back, so that nothing is stored of them, and tokens have their shares.
    """

    name = "logra"
    unit = "nats per response token that removing the sample would cost the query, within the projected layers"

    def __init__(
        self,
        *,
        size: int = 1024,
        seed: int = 0,
        damping: float = 0.1,
        batching: Batching | None = None,
        direction_bytes: int = 2**31,
    ) -> None:
        super().__init__(batching=batching, direction_bytes=direction_bytes)
        if damping <= 0:
            raise ValueError(
                f"`damping` of logra, a share of each layer's mean eigenvalue, must be above 0: {damping}."
            )
        self.damping, self.spec = damping, SketchSpec(kind="kronecker", size=size, seed=seed)

    def turn(self, moments: Moments | None) -> Turn:
        """Learn each layer's projected Fisher matrix at the model's weights."""
        sides = {layer.name: sides_of(layer, self.spec) for layer in followed(self.model)}
        fisher: dict[str, Tensor] = {}

        def gather(layer: Layer, x: Tensor, dy: Tensor, offsets: Tensor) -> None:
            phi = _project(sides[layer.name], x, dy, offsets).double()
            known = fisher.setdefault(layer.name, phi.new_zeros(phi.shape[1], phi.shape[1]))
            known.addmm_(phi.T, phi)

        for _ in sweep(self.model, self.batching.plan(self.samples), self.batching, gather):
            pass
        factors = {name: self._factor(sums / len(self.samples)) for name, sums in fisher.items()}
        N = len(self.samples)
        return lambda directions: {
            name: sides[name].solved(direction, factors.get(name)) / N for name, direction in directions.items()
        }

    def _factor(self, fisher: Tensor) -> Tensor | None:
        """Factor F + lambda; None where no gradient reached the layer."""
        damping = self.damping * fisher.diagonal().mean()
        if damping == 0:
            return None
        fisher.diagonal().add_(damping)
        return torch.linalg.cholesky(fisher)


class Sides(NamedTuple):
    """The two projections of a layer: P_o^T [O, k_o], P_i^T [I, k_i], None where a side is kept; K = k_o * k_i."""

    left: Tensor | None
    right: Tensor | None
    size: int
    seed: int

    def solved(self, directions: Tensor, factor: Tensor | None) -> Tensor:
        """Project directions [Q, O, I], divide by the matrix of which `factor` is the root, and take them back."""
        if factor is None:
            return torch.zeros_like(directions)
        left, right = (side if side is None else side.to(directions) for side in (self.left, self.right))
        inner = directions if left is None else left.T @ directions
        inner = inner if right is None else inner @ right
        solved = torch.cholesky_solve(inner.flatten(1).T.double(), factor).T.to(inner).view_as(inner)
        solved = solved if left is None else left @ solved
        return solved if right is None else solved @ right.T


def sides_of(layer: Layer, spec: SketchSpec) -> Sides:
    """Make a layer's projections, those of `sample_grad_project`."""
    O, I = layer.shape
    size = min(spec.size, (1 << O.bit_length() >> 1) * (1 << I.bit_length() >> 1))
    k_o, k_i = kronecker_sides(size, O, I)
    seed, device = spec.layer_seed(layer.name), layer.weight.device
    left = None if k_o == O else random_signs(O, k_o, derived_seed(seed, KRONECKER_DY), device) * k_o**-0.5
    right = None if k_i == I else random_signs(I, k_i, derived_seed(seed, KRONECKER_X), device) * k_i**-0.5
    return Sides(left, right, size, seed)


def _project(sides: Sides, x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    x, dy = (each.to(torch.promote_types(x.dtype, dy.dtype)) for each in (x, dy))
    return ops.sample_grad_project(x, dy, offsets, sides.size, kind="kronecker", seed=sides.seed)
