"""What a gated adapter is made of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GATES = ("sigmoid", "softmax", "topk", "one_hot")
GRANULARITIES = ("token", "sequence", "task")
SHARINGS = ("block", "linear")
# Linear layers of one module that read the same tensor in the models of transformers.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Layers that end an attention or an MLP there: some models register them first, none calls them first.
ENDS = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "wo", "w2", "dense_4h_to_h")


class GatedError(ValueError):
    """A gated adapter that can't be made, run, saved or loaded as asked, with the way out."""


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """One low-rank expert a task, a gate that decides how much each speaks, a memory that always does."""

    experts: Sequence[str]
    rank: int = 8
    # experts and memory are multiplied by alpha / rank; None: twice the rank
    alpha: float | None = None
    # sigmoid: experts speak independently, so a new one leaves the others' voices as they are. softmax, topk: their
    # gates sum to one, so each speaks about 1 / E (1 / k) as loudly. one_hot: the task's own expert alone
    gate: Literal["sigmoid", "softmax", "topk", "one_hot"] = "sigmoid"
    # sequence: gates look at the prompt's tokens alone, so that training and generation agree. task: at its name (a
    # table of logits, which weight decay would pull at: train it without)
    granularity: Literal["token", "sequence", "task"] = "sequence"
    top_k: int = 2
    # 0: no memory
    memory_rank: int = 0
    # the memory's learning rate over that of the experts, see `Gated.parameter_groups`
    memory_lr: float = 0.1
    # one router a block (a member of a ModuleList), reading the input of its first layers, or one a linear layer
    sharing: Literal["block", "linear"] = "block"
    # "all-linear" (but the output layer), or the ends of layers' names
    targets: str | Sequence[str] = "all-linear"
    # a new expert's gate before training, as a logit
    gate_bias: float = 0.0
    # router rows begin with this spread: equal logits would let top-k choose the first experts for ever
    router_std: float = 0.02
    # later tasks change the router in directions alone that earlier tasks' inputs did not have (GainLoRA,
    # arXiv:2505.15424), of which they keep those with this share of their energy; biases then stay as they begin
    orthogonal: bool = False
    orthogonal_energy: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(self.experts) if not isinstance(self.experts, str) else ())
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if len(set(self.experts)) != len(self.experts):
            raise GatedError(f"`experts` must be a list of distinct names: got {list(self.experts)}.")
        if not self.experts and self.memory_rank == 0:
            raise GatedError("name at least one of `experts`, as a list, or give a `memory_rank`: got neither.")
        for name in self.experts:
            check_name(name)
        for field, allowed in (("gate", GATES), ("granularity", GRANULARITIES), ("sharing", SHARINGS)):
            if getattr(self, field) not in allowed:
                raise GatedError(f"`{field}` must be one of {', '.join(allowed)}: got {getattr(self, field)!r}.")
        if self.gate == "one_hot" and self.granularity != "task":
            raise GatedError(
                f"gate 'one_hot' is the task's own expert, so `granularity` must be 'task': got {self.granularity!r}."
            )
        for field in ("rank", "memory_rank", "top_k"):
            if not isinstance(getattr(self, field), int):
                raise GatedError(f"`{field}` must be a whole number: got {getattr(self, field)!r}.")
        if self.alpha is not None and not self.alpha > 0:
            raise GatedError(f"`alpha` must be positive: got {self.alpha}. Leave it out for twice the rank.")
        if self.rank < 1 or self.memory_rank < 0:
            raise GatedError(
                f"`rank` must be at least 1 and `memory_rank` at least 0: got {self.rank} and {self.memory_rank}."
            )
        if self.gate == "topk" and self.top_k < 1:
            raise GatedError(f"`top_k` must be at least 1: got {self.top_k}.")
        if self.memory_lr <= 0:
            raise GatedError(f"`memory_lr` must be positive: got {self.memory_lr}. For no memory set memory_rank=0.")
        if self.orthogonal and self.granularity == "task":
            raise GatedError("`orthogonal` protects router rows, and gates per task have none: leave it out.")
        if not 0 < self.orthogonal_energy <= 1:
            raise GatedError(f"`orthogonal_energy` must be over 0 and at most 1: got {self.orthogonal_energy}.")

    @property
    def scale(self) -> float:
        """What experts and memory are multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def as_dict(self) -> dict[str, object]:
        """The settings as JSON takes them."""
        return {**dataclasses.asdict(self), "experts": list(self.experts)}


def check_name(name: str) -> None:
    """Refuse what can't be a module's name."""
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) is None:
        raise GatedError(
            f"an expert's name must be letters, digits, - and _, and begin with a letter: got {name!r}. It becomes "
            f"part of parameters' names."
        )
