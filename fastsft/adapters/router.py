"""Where gates come from: rows that multiply a block's input, or a table by task."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsft.adapters.config import GatedConfig
from fastsft.adapters.factor import Factor, generator_of
from fastsft.adapters.layer import Named
from fastsft.ops.gated_adapter import Sequences, gates

ROUTER = "router"


class Row(nn.Module):
    """One expert's row of a router: logit = (settled + weight (I - Q Q^T)) . x + bias."""

    def __init__(self, weight: Tensor, bias: float, *, trains_bias: bool) -> None:
        super().__init__()
        self.weight = Factor(weight, ROUTER)
        self.bias = nn.Parameter(torch.full_like(weight[0, :1], bias), requires_grad=trains_bias)
        self.register_buffer("settled", torch.zeros_like(weight))
        self.settled: Tensor


class Router(nn.Module):
    """Logits of experts from I inputs.

    With `orthogonal`, what is trained acts on the part of an input outside the protected directions Q [I, k] alone:
    logits of inputs in their span stay as they were, whatever the optimizer.
    """

    def __init__(self, name: str, inputs: int, config: GatedConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.inputs, self.config, self.device, self.dtype = name, inputs, config, device, dtype
        self.experts = Named()
        self.register_buffer("protected", torch.zeros(inputs, 0, device=device, dtype=dtype))
        # sum of x x^T over what gates looked at since the last protection
        size = inputs if config.orthogonal else 0
        self.register_buffer("seen", torch.zeros(size, size, device=device, dtype=dtype))
        self.protected: Tensor
        self.seen: Tensor
        for expert in config.experts:
            self.add_expert(expert)

    def __len__(self) -> int:
        return len(self.experts)

    def add_expert(self, expert: str, bias: float | None = None) -> None:
        draw = torch.randn(1, self.inputs, generator=generator_of(f"{self.config.seed} {self.name} router {expert}"))
        weight = (draw * self.config.router_std).to(self.device, self.dtype)
        start = self.config.gate_bias if bias is None else bias
        self.experts[expert] = Row(weight, start, trains_bias=not self.config.orthogonal)

    def rows(self) -> Tensor:
        """The rows [E, I] as they act."""
        trained = self._stacked([row.weight.weight for row in self.experts.values()])
        if not self.config.orthogonal:
            return trained
        return self._stacked([row.settled for row in self.experts.values()]) + self._outside(trained)

    def bias(self) -> Tensor:
        return torch.cat([self.protected.new_zeros(0), *(row.bias for row in self.experts.values())])

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        """Rows [1, I] together [E, I]; E is 0 where all experts have gone into the memory."""
        return torch.cat([self.protected.new_zeros(0, self.inputs), *rows])

    def _outside(self, rows: Tensor) -> Tensor:
        return rows - (rows @ self.protected) @ self.protected.T if self.protected.shape[1] else rows

    @property
    def is_followed(self) -> bool:
        return any(row.weight.is_followed for row in self.experts.values())

    def show(self, x: Tensor, logits: Tensor) -> Tensor:
        """Let each row see what it multiplied, and its logits."""
        if not self.is_followed:
            return logits
        x = self._outside(x.detach().to(self.protected.dtype)) if self.protected.shape[1] else x
        columns = logits.split(1, 1)
        return torch.cat([row.weight(x, column) for row, column in zip(self.experts.values(), columns)], 1)

    @torch.no_grad()
    def remember(self, x: Tensor, sequences: Sequences | None) -> None:
        """Add what the gates just looked at to `seen`, while training."""
        if not (self.config.orthogonal and self.training):
            return
        flat = x.detach().reshape(-1, x.shape[-1]).to(self.seen.dtype)
        if sequences is not None:
            flat = _pooled(flat, sequences)
        self.seen += flat.T @ flat

    @torch.no_grad()
    def protect(self) -> int:
        """Keep the logits of all that was seen since the last time as they are, and train beside it from now on.

        Returns how many directions are protected. Those of the largest eigenvalues, up to the configured energy.
        """
        for row, now in zip(self.experts.values(), self.rows()):
            row.settled.copy_(now[None])
            row.weight.weight.zero_()
        before, seen = self.protected.double(), self.seen.double()
        if dist.is_initialized():
            dist.all_reduce(seen)  # each rank saw its own rows, and all must protect the same
        aside = seen - before @ (before.T @ seen)
        values, vectors = torch.linalg.eigh(aside - (aside @ before) @ before.T)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        total = seen.trace().clamp_min(torch.finfo(seen.dtype).tiny)
        # with what lies within the directions protected before
        share = (seen.trace() - values.sum() + values.cumsum(0) - values) / total
        # sums in float32 leave up to 2 eps of the largest where there is nothing (64 to 1024 inputs, 200 batches)
        significant = values > 32 * torch.finfo(self.seen.dtype).eps * seen.norm()
        take = significant & (share < self.config.orthogonal_energy)
        basis, _ = torch.linalg.qr(torch.cat([before, vectors[:, take]], 1))
        self.protected = basis.to(self.dtype)
        self.seen.zero_()
        return int(basis.shape[1])


def _pooled(x: Tensor, sequences: Sequences) -> Tensor:
    """Mean of x [T, I] over each sequence's prompt -> [D, I]."""
    total = x.new_zeros(len(sequences.offsets) - 1, x.shape[1])
    total.index_add_(0, sequences.document, x * sequences.prompt[:, None])
    return total / sequences.num_prompt[:, None]


class TaskGates(nn.Module):
    """Gates by the task's name: one-hot, or a table of logits [N, E] that trains."""

    is_followed = False

    def __init__(self, config: GatedConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.device, self.dtype = config, device, dtype
        self.table = nn.Parameter(torch.zeros(0, 0, device=device, dtype=dtype)) if config.gate != "one_hot" else None
        # of one-hot gates: a task whose expert went into the memory has none
        self.register_buffer("own", torch.zeros(0, 0, device=device))
        self.own: Tensor
        for number, expert in enumerate(config.experts):
            self.add_expert(expert, number)

    def add_expert(self, expert: str, task: int) -> None:
        """Give expert number E the task of number `task`: its own expert begins louder, the others quieter."""
        tasks, experts = self.own.shape
        own = torch.zeros(max(tasks, task + 1), experts + 1, device=self.own.device)
        own[:tasks, :experts] = self.own
        own[task, experts] = 1
        self.own = own
        if self.table is not None:
            table = torch.full_like(own, -2.0, dtype=self.dtype)
            table[own > 0] = 2.0
            table[:tasks, :experts] = self.table.detach()
            self.table = nn.Parameter(table + 0.0, requires_grad=self.table.requires_grad)

    def remove_expert(self, index: int) -> None:
        keep = [column for column in range(self.own.shape[1]) if column != index]
        self.own = self.own[:, keep]
        if self.table is not None:
            self.table = nn.Parameter(self.table.detach()[:, keep], requires_grad=self.table.requires_grad)

    def forward(self, task: Tensor, like: Tensor) -> Tensor:
        wide = torch.promote_types(like.dtype, torch.float32)
        if self.table is None:
            return self.own[task].to(wide)
        return gates(self.table[task].to(wide), self.config.gate, min(self.config.top_k, self.table.shape[1]))
