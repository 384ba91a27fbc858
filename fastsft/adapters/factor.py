"""Where a gated adapter keeps its weights: a small module a matrix, so that each can be frozen, saved and followed."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn


class Factor(nn.Module):
    """A matrix that a stacked product reads. Calling it changes nothing: it is where a capture sees both sides.

    weight [O, I]: its gradient is the sum over tokens of (gradient of `out`_t) x_t^T, for what it was called with.
    part: the expert, "memory" or "router" that the matrix belongs to.
    """

    def __init__(self, weight: Tensor, part: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.part = part

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out

    @property
    def is_followed(self) -> bool:
        """Whether someone listens, so that the two sides must be shown."""
        return bool(self._forward_hooks)


class Pair(nn.Module):
    """A low-rank map x -> x A^T B^T: A [r, I], B [O, r]."""

    def __init__(self, a: Tensor, b: Tensor, part: str) -> None:
        super().__init__()
        self.A, self.B = Factor(a, part), Factor(b, part)

    @classmethod
    def new(
        cls, rank: int, inputs: int, outputs: int, part: str, *, key: str, device: torch.device, dtype: torch.dtype
    ) -> Pair:
        """A drawn as PEFT draws it (Kaiming, uniform), from `key` alone; B zero: outputs begin as the base's."""
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator_of(key))
        return cls(a.to(device, dtype), torch.zeros(outputs, rank, device=device, dtype=dtype), part)


def generator_of(key: str) -> torch.Generator:
    """Random numbers that depend on `key` alone, not on what was drawn before."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def freeze(module: nn.Module, *, frozen: bool = True) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.grad = None
