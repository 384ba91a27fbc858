"""What gated_adapter asks of its arguments, each with a sentence."""

# T tokens, D sequences, I inputs, O outputs, E experts, M memory rank, N tasks, P rows of A

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from torch import Tensor

from fastsft.ops._gated_parts import Gate

if TYPE_CHECKING:
    from fastsft.ops._gated_chosen import Sequences


def check_adapter(x: Tensor, a: Tensor, b: Tensor, num_experts: int, rank: int, num_frozen: int) -> None:
    if num_experts < 1 or rank < 1:
        raise ValueError(f"`num_experts` and `rank` must be at least 1: got {num_experts} and {rank}.")
    if a.ndim != 2 or x.ndim < 2 or a.shape[1] != x.shape[-1]:
        raise ValueError(f"`x` [.., I] and `a` [P, I] must have the same I: got {list(x.shape)} and {list(a.shape)}.")
    if b.ndim != 2 or b.shape[1] < num_experts * rank:
        raise ValueError(
            f"`b` [O, E * rank + M] must have {num_experts} x {rank} columns of experts and then those of the memory: "
            f"got {list(b.shape)}."
        )
    if not 0 <= num_frozen <= num_experts:
        raise ValueError(f"`num_frozen` must be between 0 and the {num_experts} experts: got {num_frozen}.")


def check_rows(a: Tensor, num_experts: int, rank: int, memory: int, routed: bool) -> None:
    expected = num_experts * rank + memory + (num_experts if routed else 0)
    if a.shape[0] != expected:
        router = f" + {num_experts} of the router" if routed else ""
        raise ValueError(
            f"`a` must have {num_experts} x {rank} rows of experts + {memory} of the memory (the columns that `b` has "
            f"beyond its experts){router}, {expected} in all: got {a.shape[0]}."
        )


def check_gate(gate: str, per: str, top_k: int, num_experts: int) -> None:
    if gate not in get_args(Gate):
        raise ValueError(f"`gate` must be one of {', '.join(get_args(Gate))}: got {gate!r}.")
    if per not in ("token", "sequence", "task"):
        raise ValueError(f"`per` must be 'token', 'sequence' or 'task': got {per!r}.")
    if gate == "one_hot" and per != "task":
        raise ValueError(f"gate 'one_hot' is the task's own expert, so `per` must be 'task': got {per!r}.")
    if gate == "topk" and not 1 <= top_k <= num_experts:
        raise ValueError(f"`top_k` must be between 1 and the {num_experts} experts: got {top_k}.")


def check_gate_inputs(
    x: Tensor,
    per: str,
    gate: str,
    bias: Tensor | None,
    sequences: Sequences | None,
    task: Tensor | None,
    table: Tensor | None,
    num_experts: int,
) -> None:
    T = x.shape[:-1].numel()
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(f"`bias` must be [{num_experts}], a number an expert: got {list(bias.shape)}.")
    if bias is not None and gate == "one_hot":
        raise ValueError("gate 'one_hot' has no logits, so `bias` would do nothing: leave it out.")
    if per == "sequence" and sequences is None:
        raise ValueError(
            "gates per sequence need `sequences`, which say whose tokens are prompts: Sequences.of_rows(mask) or "
            "Sequences.packed(offsets, mask)."
        )
    if sequences is not None and len(sequences.document) != T:
        raise ValueError(f"`sequences` must cover the {T} tokens of `x`: they cover {len(sequences.document)}.")
    if per != "task":
        return
    if task is None or (gate != "one_hot" and table is None):
        raise ValueError(
            "gates per task need `task`, the number of each sequence's task [D] (or [1] for all tokens), and `table` "
            "[N, E] of logits unless the gate is 'one_hot'."
        )
    if task.ndim != 1:
        raise ValueError(f"`task` must be a vector of numbers, [D] or [1]: got the shape {list(task.shape)}.")
    if len(task) != 1 and (sequences is None or len(task) != len(sequences.offsets) - 1):
        raise ValueError(
            f"`task` must name one task, or one a sequence with `sequences` given: got {len(task)} tasks for "
            f"{0 if sequences is None else len(sequences.offsets) - 1} sequences."
        )
    if table is not None and (table.ndim != 2 or table.shape[1] != num_experts):
        raise ValueError(
            f"`table` must be [N, {num_experts}], a logit an expert of each task: got {list(table.shape)}."
        )
