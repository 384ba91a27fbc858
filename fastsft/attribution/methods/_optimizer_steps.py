"""One step of an optimizer in plain torch, and its transposed derivative: how adjoints go back through it.

start: the state before step 1. step: (state, clipped gradient, learning rate, step from 1) -> the next state.
back: the same arguments, and the adjoint of the state after the step -> the adjoint of the state before it, less what
flows through the gradient, and the adjoint of the clipped gradient [Q, P].
"""

# P parameters end to end, Q adjoint vectors

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """What an optimizer carries from step to step, each [P]; or the adjoints of it, each [Q, P].

    first: the first moment, or SGD's momentum; second: the second moment, None for SGD.
    """

    weights: Tensor
    first: Tensor
    second: Tensor | None = None

    def to(self, where: torch.device | torch.dtype | str) -> State:
        return State(*(None if tensor is None else tensor.to(where) for tensor in self))  # type: ignore[arg-type]

    @property
    def num_tensors(self) -> int:
        return sum(tensor is not None for tensor in self)


@dataclass(frozen=True, eq=False)
class AdamW:
    """torch.optim.AdamW: decay [P] a parameter.

    smooth: the derivative is taken of sqrt(v_hat + smooth) in place of sqrt(v_hat); 0 is the derivative of the step
    that was taken. There it is 0 by v where v = 0 (torch's autograd gives infinity).
    """

    decay: Tensor
    beta1: float
    beta2: float
    eps: float
    smooth: float = 0.0

    def start(self, weights: Tensor) -> State:
        return State(weights, torch.zeros_like(weights), torch.zeros_like(weights))

    def _moments(self, state: State, gradient: Tensor) -> tuple[Tensor, Tensor]:
        assert state.second is not None
        first = state.first.lerp(gradient, 1 - self.beta1)
        return first, (state.second * self.beta2).addcmul(gradient, gradient, value=1 - self.beta2)

    def step(self, state: State, gradient: Tensor, rate: float, count: int) -> State:
        first, second = self._moments(state, gradient)
        root = second.sqrt() / (1 - self.beta2**count) ** 0.5 + self.eps
        weights = state.weights * (1 - rate * self.decay)
        return State(weights.addcdiv(first, root, value=-rate / (1 - self.beta1**count)), first, second)

    def back(self, state: State, gradient: Tensor, rate: float, count: int, adjoint: State) -> tuple[State, Tensor]:
        assert adjoint.second is not None
        first, second = self._moments(state, gradient)
        c2 = 1 - self.beta2**count
        root = (second / c2 + self.smooth).sqrt()
        by_first = rate / (1 - self.beta1**count) / (root + self.eps)  # minus d weights / d first
        by_second = torch.where(root > 0, by_first * first / (root + self.eps) / (2 * c2 * root), 0.0)
        of_first = adjoint.first - adjoint.weights * by_first
        of_second = adjoint.second + adjoint.weights * by_second
        of_gradient = (1 - self.beta1) * of_first + 2 * (1 - self.beta2) * gradient * of_second
        weights = adjoint.weights * (1 - rate * self.decay)
        return State(weights, self.beta1 * of_first, self.beta2 * of_second), of_gradient


@dataclass(frozen=True, eq=False)
class Sgd:
    """torch.optim.SGD with momentum, no dampening; decay [P] is added to the gradient after clipping."""

    decay: Tensor
    momentum: float

    def start(self, weights: Tensor) -> State:
        return State(weights, torch.zeros_like(weights))

    def step(self, state: State, gradient: Tensor, rate: float, count: int) -> State:
        first = state.first * self.momentum + (gradient + self.decay * state.weights)
        return State(state.weights - rate * first, first)

    def back(self, state: State, gradient: Tensor, rate: float, count: int, adjoint: State) -> tuple[State, Tensor]:
        of_first = adjoint.first - rate * adjoint.weights
        return State(adjoint.weights + self.decay * of_first, self.momentum * of_first), of_first


Rule = AdamW | Sgd


def clip_factor(parts: Sequence[Tensor], most: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_'s factor: most / (norm + 1e-6), at most 1; parts: each parameter's gradient."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
    return (most / (norm + 1e-6)).clamp(max=1.0)


def clip_back(gradient: Tensor, most: float, factor: Tensor, adjoint: Tensor) -> Tensor:
    """Take the adjoint of the clipped gradient [Q, P] back to that of the gradient [P] as it was."""
    if factor >= 1:
        return adjoint
    norm = torch.linalg.vector_norm(gradient)
    bend = most / (norm + 1e-6) ** 2 / norm  # minus d factor / d gradient, over the gradient
    return factor * adjoint - (bend * (adjoint @ gradient))[:, None] * gradient
