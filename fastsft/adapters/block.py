"""Linear layers that share a router and, where they read the same tensor, one read of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastsft.adapters.config import GatedConfig, GatedError
from fastsft.adapters.context import Context
from fastsft.adapters.layer import Adapter
from fastsft.adapters.router import Router, TaskGates
from fastsft.ops.gated_adapter import Chosen, Gate, Sequences, choose, gates, may_skip, pool, shrink

if TYPE_CHECKING:
    from fastsft.adapters.gated import Gated


# forward passes whose backward pass may still come, and run a checkpointed block again
MOST_PASSES = 32


class Group:
    """Adapters whose layers read the same tensor, and the router if it reads that one too."""

    def __init__(self, adapters: list[Adapter]) -> None:
        self.adapters = adapters
        self.routed = False
        self.forget()

    def forget(self) -> None:
        self.x: Tensor | None = None
        self.out: Tensor | None = None
        self.waiting: dict[str, Tensor] = {}
        self.chosen: Chosen | None = None


class Block:
    """The adapted layers of one block, in the order in which it calls them, and what one forward pass of it knows."""

    def __init__(self, name: str, number: int, groups: list[Group], gating: Router | TaskGates, owner: Gated) -> None:
        self.name, self.number, self.groups, self.gating, self.owner = name, number, groups, gating, owner
        groups[0].routed = isinstance(gating, Router)
        self._contexts: dict[int, Context] = {}
        self.gates: Tensor | None = None
        self.context = owner.context
        # of what the block calls, the first: it gets the block's own input
        self._first: nn.Module | None = None
        self._is_fresh = False

    @property
    def config(self) -> GatedConfig:
        return self.owner.config

    def begin(self, hidden: Tensor | None) -> None:
        """A forward pass of the block begins."""
        if in_backward():
            self.begin_again(hidden)
            return
        self.context, self._is_fresh = self.owner.context, True
        if hidden is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._contexts.pop(hidden.data_ptr(), None)
            self._contexts[hidden.data_ptr()] = self.context
            if len(self._contexts) > MOST_PASSES:
                del self._contexts[next(iter(self._contexts))]
        self.end()

    def begin_again(self, hidden: Tensor | None) -> None:
        """Gradient checkpointing runs the block again in the backward pass, on the memory of the same `hidden` and, it
        may be, after another pass of the model: its context is that of the first time."""
        found = None if hidden is None else self._contexts.get(hidden.data_ptr())
        if found is not None and found is not self.context:
            self.context = found
            self.end()

    def before_child(self, child: nn.Module, hidden: Tensor | None) -> None:
        """Transformers' checkpointing runs a block again without the block's own hooks: its first child tells of it."""
        if in_backward():
            if child is self._first:
                self.begin_again(hidden)
        elif self._is_fresh:
            self._first, self._is_fresh = child, False

    def end(self) -> None:
        """It has ended: hold on to no activation."""
        self.gates = None
        for group in self.groups:
            group.forget()

    def read(self, adapter: Adapter, x: Tensor) -> Tensor:
        """Multiply x by the A of all layers that will read it, this one first; x again, for the layer itself."""
        group = adapter.group
        if group.x is not x or adapter.name not in group.waiting:
            self._read(group, x)
        assert group.out is not None
        return group.out

    def _read(self, group: Group, x: Tensor) -> None:
        group.forget()
        self._check_tokens(x, group.adapters[0])
        observed = any(a.followed("A") or a.followed("B") for a in group.adapters) or self.gating.is_followed
        group.x, x = x, x
        owned = all(adapter.is_owned for adapter in group.adapters)
        router = self.gating if group.routed and isinstance(self.gating, Router) and not self._goes_on else None
        early = router is not None and not observed and self._may_skip(x)
        if early:
            assert router is not None
            x, logits = shrink(x, router.rows(), (len(router),), owned=owned)
            self._find_gates(x, logits)
            router = None
        if router is None and self.gates is None:
            self._find_gates(x, None)
        if self.gates is not None and not observed:
            group.chosen = self._choose(x)
        stacks = [adapter.stacked("A") for adapter in group.adapters]
        splits = [len(stack) for stack in stacks]
        frozen, start = [], 0
        for adapter, size in zip(group.adapters, splits):
            frozen.append((start, start + adapter.num_frozen * self.config.rank))
            start += size
        if router is not None:
            stacks.append(router.rows())
            splits.append(len(router))
        found = shrink(x, torch.cat(stacks), tuple(splits), frozen=tuple(frozen), chosen=group.chosen, owned=owned)
        group.out, zs = found[0], found[1:]
        for adapter, z in zip(group.adapters, zs):
            group.waiting[adapter.name] = adapter.show_inputs(group.out, z)
        if router is not None:
            self._find_gates(group.out, router.show(group.out, zs[-1]))

    def add(self, adapter: Adapter, y: Tensor) -> Tensor:
        """Add the adapter's part to its layer's output y."""
        group = adapter.group
        z = group.waiting.pop(adapter.name)
        assert self.gates is not None
        inner: Gate | None = self.config.gate if self._inner else None
        result = adapter.add(y, z, self.gates, self._sequences, inner, group.chosen)
        if not group.waiting:
            group.forget()
        return result

    # gates

    @property
    def _goes_on(self) -> bool:
        return self.context.goes_on and self.number in self.context.gates

    @property
    def _inner(self) -> bool:
        """Whether logits become gates in the pass that scales z, there being but one layer that reads them."""
        return self.config.granularity == "token" and self.config.sharing == "linear"

    @property
    def _sequences(self) -> Sequences | None:
        return None if self.config.granularity == "token" else self.context.sequences

    def _find_gates(self, x: Tensor, logits: Tensor | None) -> None:
        config = self.config
        if logits is None:
            self.gates = self._gates_without_router(x)
            return
        assert isinstance(self.gating, Router)
        if config.granularity == "token":
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.gating.bias()
            self.gates = wide if self._inner else gates(wide, config.gate, self._top_k)
        else:
            assert self.context.sequences is not None
            pooled = pool(logits, self.context.sequences, self.gating.bias())
            self.gates = gates(pooled, config.gate, self._top_k)
            self.context.gates[self.number] = self.gates.detach()
        self.gating.remember(x, self._sequences)

    def _gates_without_router(self, x: Tensor) -> Tensor:
        if self._goes_on:
            assert self.context.sequences is not None
            found, count = self.context.gates[self.number], len(self.context.sequences.offsets) - 1
            if len(found) != count:
                raise GatedError(
                    f"a cache goes on with {count} sequences, and its prompt had {len(found)}: gates per sequence "
                    f"can't follow rows that were taken out or added."
                )
            return found
        if isinstance(self.gating, TaskGates):
            if self.context.task is None:
                raise GatedError("gates per task need to know it: call `gated.set_task(name)` first.")
            return self.gating(self.context.task, x)
        raise GatedError(
            f"the router of {self.name} reads the input of {self.groups[0].adapters[0].name}, and another layer was "
            f"called before it: use sharing='linear'."
        )

    @property
    def _top_k(self) -> int:
        return min(self.config.top_k, len(self.owner.experts))

    def _may_skip(self, x: Tensor) -> bool:
        config = self.config
        if config.granularity != "sequence" or self._goes_on:
            return False
        T = x.shape[:-1].numel()
        return may_skip(config.gate, self._top_k, len(self.owner.experts), self.context.sequences, T, None)

    def _choose(self, x: Tensor) -> Chosen | None:
        assert self.gates is not None
        if self.config.granularity == "token" or not self.owner.experts:
            return None
        memory = self.groups[0].adapters[0].memory_rank
        T = x.shape[:-1].numel()
        return choose(
            self.gates, self.config.gate, self._top_k, self.config.rank, memory, self.context.sequences, T, None
        )

    def _check_tokens(self, x: Tensor, adapter: Adapter) -> None:
        sequences = self._sequences
        if sequences is not None and len(sequences.document) != x.shape[:-1].numel():
            raise GatedError(
                f"{adapter.name} was called with {x.shape[:-1].numel()} tokens, and the batch has "
                f"{len(sequences.document)}: leave layers that see other tokens (experts of a mixture, a vision tower) "
                f"out of `targets`."
            )


def in_backward() -> bool:
    """Whether a backward pass is under way, in which checkpointed blocks are run again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
