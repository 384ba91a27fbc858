"""The adapter of one linear layer: its experts and memory, stacked for the operator and shown to who follows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsft.adapters.config import GatedConfig, GatedError
from fastsft.adapters.factor import Factor, Pair
from fastsft.ops._gated_parts import Epilogue, epilogue
from fastsft.ops.gated_adapter import Chosen, Gate, Sequences, expand, is_unwatched_linear

if TYPE_CHECKING:
    from fastsft.adapters.block import Block, Group

MEMORY = "memory"


class Named(nn.Module):
    """Modules by name, in order; unlike nn.ModuleDict it takes names such as "train" or "keys"."""

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def values(self) -> list[Any]:
        return list(self._modules.values())


class Adapter(nn.Module):
    """Experts and memory of one linear layer with I inputs and O outputs; a child of that layer, called by its hooks.

    held: memory ranks that the present task leaves alone (`Gated.select_memory`), None where all may move.
    """

    def __init__(self, name: str, base: nn.Module, config: GatedConfig) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.inputs, self.outputs = widths(name, base)
        self.device, self.dtype = place_of(base)
        self.__dict__["base"] = base  # not a child: the adapter is the base's
        self.experts = Named()
        for expert in config.experts:
            self.add_expert(expert)
        self.memory = self.new_pair(config.memory_rank, MEMORY) if config.memory_rank else None
        self.held: Pair | None = None
        self.block: Block
        self.group: Group

    def add_expert(self, expert: str) -> None:
        self.experts[expert] = self.new_pair(self.config.rank, expert)

    def new_pair(self, rank: int, part: str) -> Pair:
        key = f"{self.config.seed} {self.name} {part}"
        return Pair.new(rank, self.inputs, self.outputs, part, key=key, device=self.device, dtype=self.dtype)

    @property
    def is_owned(self) -> bool:
        """Whether the layer's output, and its input's gradient, may be overwritten: nobody else reads them."""
        return is_unwatched_linear(self.__dict__["base"], own_hooks=1)

    @property
    def pairs(self) -> list[Pair]:
        """In the order in which they are stacked."""
        return [*self.experts.values(), *(pair for pair in (self.held, self.memory) if pair is not None)]

    @property
    def num_frozen(self) -> int:
        """How many experts at the beginning of the stack are frozen: their gradient is not formed."""
        for count, pair in enumerate(self.experts.values()):
            if pair.A.weight.requires_grad or pair.B.weight.requires_grad:
                return count
        return len(self.experts)

    @property
    def memory_rank(self) -> int:
        return sum(len(pair.A.weight) for pair in (self.held, self.memory) if pair is not None)

    def stacked(self, side: str) -> Tensor:
        """All A [R + M, I] (side "A"), or all B [O, R + M]."""
        factors = [getattr(pair, side).weight for pair in self.pairs]
        return torch.cat(factors, 0 if side == "A" else 1)

    def followed(self, side: str) -> list[Factor]:
        factors = [getattr(pair, side) for pair in self.pairs]
        return factors if any(factor.is_followed for factor in factors) else []

    def show_inputs(self, x: Tensor, z: Tensor) -> Tensor:
        """Let each A see x and its own part of z; the parts together again."""
        factors = self.followed("A")
        if not factors:
            return z
        parts = z.split([len(factor.weight) for factor in factors], 1)
        return torch.cat([factor(x, part) for factor, part in zip(factors, parts)], 1)

    def add(
        self, y: Tensor, z: Tensor, g: Tensor, sequences: Sequences | None, gate: Gate | None, chosen: Chosen | None
    ) -> Tensor:
        """Add experts and memory to the layer's output y [.., O]; let each B see what it multiplied, and y."""
        config = self.config
        # fewer experts than that may be left
        top_k = min(config.top_k, len(self.experts))
        result = expand(
            y,
            z,
            g,
            self.stacked("B"),
            rank=config.rank,
            sequences=sequences,
            gate=gate,
            top_k=top_k,
            chosen=chosen,
            scale=config.scale,
            num_frozen=self.num_frozen,
            owned=self.is_owned,
        )
        factors = self.followed("B")
        if not factors:
            return result
        with torch.no_grad():
            document = None if sequences is None or len(g) == 1 else sequences.document
            job = Epilogue(z.detach(), g.detach(), document, gate, top_k)
            h = config.scale * epilogue(job, len(self.experts) * config.rank)[0]
        for factor, part in zip(factors, h.split([factor.weight.shape[1] for factor in factors], 1)):
            result = factor(part, result)
        return result


def widths(name: str, base: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer of any kind."""
    inputs, outputs = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if inputs is None and is_conv1d(base):
        inputs, outputs = base.weight.shape  # type: ignore[misc]
    if inputs is None or outputs is None:
        raise GatedError(
            f"{name} ({type(base).__name__}) does not say its `in_features` and `out_features`: leave it out of "
            f"`targets`."
        )
    return int(inputs), int(outputs)


def place_of(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The base's device, and the type of adapters beside it: float64 beside float64, else float32."""
    tensors = [*base.parameters(recurse=False), *base.buffers(recurse=False)]
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tensors[0].device if tensors else torch.device("cpu"), torch.float64 if wide else torch.float32


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' own linear layer, of GPT-2 and its kin, whose weight is [I, O]."""
    return type(module).__name__ == "Conv1D"


def is_plain(module: nn.Module) -> bool:
    """Whether its weight is a matrix of numbers that can be added to."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_linear(module: nn.Module) -> bool:
    if is_plain(module):
        return True
    # quantised ones: no nn.Linear, but its two widths and a forward of one tensor
    return hasattr(module, "in_features") and hasattr(module, "out_features")
