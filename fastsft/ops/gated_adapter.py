"""gated_adapter: y = x W^T + s sum_e g_e (x A_e^T) B_e^T + s (x A_m^T) B_m^T, its experts, memory and router stacked.

    z = x A^T        A = [A_1; ..; A_E; A_memory; W_router]   one product, one read of x: logits fall out of it
    g = gate(z_router + bias)                                 per token, per sequence or per task
    h = [g * z_experts ; z_memory]
    y = base(x) + s h B^T                                     B = [B_1 | .. | B_E | B_memory]

Saved for the backward pass: x (which the base saves too), z and g. `gated_adapter` is all of it for one layer. Layers
that read the same input, or one router, take the stages: `shrink`, `pool`, `gates`, `expand`.
"""

# T tokens, D sequences, I inputs, O outputs, E experts, R = E * rank, M memory rank, N tasks, P rows of A

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastsft.ops import _gated_rules as rules
from fastsft.ops._gated_chosen import (
    Chosen,
    Sequences,
    add_chosen,
    choose,
    may_skip,
    outer_chosen,
    times_chosen,
)
from fastsft.ops._gated_parts import Epilogue, Gate, epilogue, epilogue_backward, gate_gradient, gate_values, products
from fastsft.ops._influence_tokens import segment_sum
from fastsft.ops._op import is_asked_for


def gated_adapter(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    num_experts: int,
    rank: int,
    base: Callable[[Tensor], Tensor] | None = None,
    gate: Gate = "sigmoid",
    per: Literal["token", "sequence", "task"] = "token",
    top_k: int = 2,
    bias: Tensor | None = None,
    sequences: Sequences | None = None,
    task: Tensor | None = None,
    table: Tensor | None = None,
    scale: float = 1.0,
    num_frozen: int = 0,
    skip: bool | None = None,
) -> Tensor:
    """Add gated low-rank experts and an always-on memory to what a base layer makes of x.

    x [.., I] -> [.., O]; a [P, I] with the rows of E experts (`rank` each), of the memory, and of the router where
    gates are per token or sequence; b [O, E * rank + M]. base: any layer (quantised ones too); an nn.Linear's output is
    added to in place, another's is copied first. None: the adapter alone. The leading positions of x are its T tokens.
    Differentiable in x, a, b, bias, table, and through the base.

    gate: "sigmoid", experts independent; "softmax"; "topk", the softmax over the `top_k` largest logits; "one_hot",
    the task's own expert. per: "token"; "sequence", logits averaged over the prompt tokens of `sequences`, so that
    training on whole answers and generating them give the same gates; "task", row `task` ([D], or [1] for all tokens)
    of `table` [N, E]. bias [E] is added to logits.
    num_frozen: leading experts whose gradient is not formed (zeros). skip: form the products with chosen experts alone,
    sequence by sequence, where gates of others are 0; None chooses.

    Products are in x's type (autocast's, where it is on), gates in float32. Formulation: gates as in LoRAMoE
    (arXiv:2312.09979) and GainLoRA (arXiv:2505.15424), stacked here. Costs 2 P (I + O) FLOPs a token forward.
    """
    rules.check_adapter(x, a, b, num_experts, rank, num_frozen)
    rules.check_gate(gate, per, top_k, num_experts)
    memory, routed = b.shape[1] - num_experts * rank, per != "task"
    rules.check_rows(a, num_experts, rank, memory, routed)
    rules.check_gate_inputs(x, per, gate, bias, sequences, task, table, num_experts)
    width, T = b.shape[1], x.shape[:-1].numel()
    frozen, owned = ((0, num_frozen * rank),), is_unwatched_linear(base)
    chosen, inner_gate = None, None
    split: tuple[int, ...] = (width,)
    if not routed:
        assert task is not None
        table = table if table is None or bias is None else table + bias
        g = task_gates(gate, top_k, task, table, num_experts, x)
        chosen = choose(g, gate, top_k, rank, memory, sequences, T, skip)
    elif per == "sequence" and may_skip(gate, top_k, num_experts, sequences, T, skip):
        assert sequences is not None
        x, logits = shrink(x, a[width:], (num_experts,), owned=owned)
        g = gates(pool(logits, sequences, bias), gate, top_k)
        chosen = choose(g, gate, top_k, rank, memory, sequences, T, skip)
        a = a[:width]
    else:
        split = (width, num_experts)
    x, z, *routes = shrink(x, a, split, frozen=frozen, chosen=chosen, owned=owned)
    if routes and per == "sequence":
        assert sequences is not None
        g = gates(pool(routes[0], sequences, bias), gate, top_k)
    elif routes:
        g, inner_gate, sequences = _wide(routes[0]) if bias is None else _wide(routes[0]) + bias, gate, None
    return expand(
        x.new_zeros(*x.shape[:-1], b.shape[0]) if base is None else base(x),
        z,
        g,
        b,
        rank=rank,
        sequences=sequences,
        gate=inner_gate,
        top_k=top_k,
        chosen=chosen,
        scale=scale,
        num_frozen=num_frozen,
        owned=owned or base is None,
    )


# the stages


def shrink(
    x: Tensor,
    a: Tensor,
    splits: tuple[int, ...],
    *,
    frozen: tuple[tuple[int, int], ...] = (),
    chosen: Chosen | None = None,
    owned: bool = False,
) -> tuple[Tensor, ...]:
    """Multiply x [.., I] by the stacked rows a [P, I] -> (x again, z_1 [T, splits[0]], z_2 [T, splits[1]], ...).

    Give the returned x to the base layers: its gradient is then added to in the product dz A. frozen: ranges of rows
    whose gradient stays zero. chosen: every split has the rows of all experts and of the memory, and z those of the
    chosen ones. owned: all that reads the returned x is a linear layer, so its gradient may be overwritten.
    """
    found: tuple[Tensor, ...] = _Shrink.apply(x, a, splits, frozen, chosen, owned)
    return found


def pool(logits: Tensor, sequences: Sequences, bias: Tensor | None = None) -> Tensor:
    """Average logits [T, E] over each sequence's prompt, and add bias [E] -> [D, E], float32 at least."""
    pooled: Tensor = _Pool.apply(logits, sequences)
    return pooled if bias is None else pooled + bias


def gates(logits: Tensor, gate: Gate, top_k: int = 2) -> Tensor:
    """Turn logits [.., E] into gates; only the gates are saved for the backward pass."""
    found: Tensor = _Gate.apply(logits, gate, top_k)
    return found


def task_gates(gate: Gate, top_k: int, task: Tensor, table: Tensor | None, num_experts: int, like: Tensor) -> Tensor:
    """Gates [D, E] of tasks [D]: one-hot, or of their rows of `table` [N, E]."""
    if gate == "one_hot":
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.nn.functional.one_hot(task, num_experts).to(wide)
    assert table is not None
    return gates(_wide(table)[task], gate, top_k)


def expand(
    y: Tensor,
    z: Tensor,
    g: Tensor,
    b: Tensor,
    *,
    rank: int,
    sequences: Sequences | None = None,
    gate: Gate | None = None,
    top_k: int = 2,
    chosen: Chosen | None = None,
    scale: float = 1.0,
    num_frozen: int = 0,
    owned: bool = False,
) -> Tensor:
    """Add s [g * z_experts; z_memory] B^T to y [.., O]; in y's own memory where nobody else needs it (`owned`).

    g: gates [D, E] of sequences, [1, E] of all tokens, [T, E] of tokens where `sequences` is None; with `gate` the
    logits [T, E] of tokens, which become gates in the same pass. chosen: as in `shrink`.
    """
    if chosen is not None:
        g = g.gather(1, chosen.experts)
    document = None if sequences is None or len(g) == 1 else sequences
    found: Tensor = _Expand.apply(y, z, g, b, rank, document, gate, top_k, chosen, scale, num_frozen, owned)
    return found


def is_unwatched_linear(base: object, own_hooks: int = 0) -> bool:
    """Whether nothing but a linear layer's product reads what it is given, and nobody keeps what it makes.

    Hooks may do both. own_hooks: how many forward hooks of each kind are the caller's.
    """
    if type(base) is not nn.Linear or "forward" in vars(base):
        return False
    forward = max(len(base._forward_hooks), len(base._forward_pre_hooks))
    return forward <= own_hooks and not (base._backward_hooks or base._backward_pre_hooks)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rounded(x: Tensor) -> Tensor:
    """Round as autocast does before a linear layer, which then finds x rounded already."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        splits: tuple[int, ...],
        frozen: tuple[tuple[int, int], ...],
        chosen: Chosen | None,
        owned: bool,
    ) -> tuple[Tensor, ...]:
        rounded = _rounded(x)
        flat, a = rounded.reshape(-1, x.shape[-1]), a.to(rounded.dtype)
        ctx.splits, ctx.frozen, ctx.chosen, ctx.owned = splits, frozen, chosen, owned
        with torch.autocast(x.device.type, enabled=False):
            if chosen is None:
                pieces = (flat @ a.T).split(splits, 1)
            else:
                pieces = tuple(times_chosen(flat, part, chosen) for part in a.split(splits))
        out = x.view_as(x) if rounded is x else rounded
        ctx.save_for_backward(out, a)
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(out)  # or base layers would form a gradient that nobody asked for
        return out, *pieces

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, *dzs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        flat, chosen = x.reshape(-1, x.shape[-1]), ctx.chosen
        widths = ctx.splits if chosen is None else [chosen.columns.shape[1]] * len(ctx.splits)
        if all(dz is None for dz in dzs):
            return dx, None, None, None, None, None
        full = [flat.new_zeros(len(flat), width) if dz is None else dz for dz, width in zip(dzs, widths)]
        da = None
        if chosen is None:
            dz = full[0] if len(full) == 1 else torch.cat(full, 1)
            if ctx.needs_input_grad[0]:
                dx = _add_product(dx, dz, a, x, owned=ctx.owned)
            if ctx.needs_input_grad[1]:
                da = _rows_gradient(dz, flat, ctx.frozen)
            return dx, da, None, None, None, None
        parts = a.split(ctx.splits)
        if ctx.needs_input_grad[0]:
            if dx is None:
                out = torch.zeros_like(flat)
            else:
                out = dx.reshape(flat.shape) if ctx.owned else dx.reshape(flat.shape).clone()
            for dz, part in zip(full, parts):
                add_chosen(out, dz, part, chosen)
            dx = out.view(x.shape)
        if ctx.needs_input_grad[1]:
            da = torch.cat([outer_chosen(dz, flat, len(part), chosen) for dz, part in zip(full, parts)])
            for begin, end in ctx.frozen:
                da[begin:end] = 0
        return dx, da, None, None, None, None


def _add_product(dx: Tensor | None, dz: Tensor, a: Tensor, x: Tensor, *, owned: bool) -> Tensor:
    """dx + dz A, in dx's own memory where `owned`."""
    if dx is None:
        return (dz @ a).view(x.shape)
    flat = dx.reshape(-1, dx.shape[-1])
    if owned and not torch.compiler.is_compiling():
        return flat.addmm_(dz, a).view(x.shape)
    return torch.addmm(flat, dz, a).view(x.shape)


def _rows_gradient(dz: Tensor, x: Tensor, frozen: tuple[tuple[int, int], ...]) -> Tensor:
    """dz^T x [P, I], but zeros in the frozen ranges of rows."""
    edges = [0, *(edge for span in sorted(frozen) for edge in span), dz.shape[1]]
    spans = [(begin, end) for begin, end in zip(edges[::2], edges[1::2]) if begin < end]
    if spans == [(0, dz.shape[1])]:
        return dz.T @ x
    da = x.new_zeros(dz.shape[1], x.shape[1])
    for begin, end in spans:
        torch.mm(dz[:, begin:end].T, x, out=da[begin:end])
    return da


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences, ctx.dtype = sequences, logits.dtype
        return _sum_by_sequence(_wide(logits) * sequences.prompt[:, None], sequences) / sequences.num_prompt[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpooled: Tensor) -> tuple[Tensor, None]:
        sequences = ctx.sequences
        each = (dpooled / sequences.num_prompt[:, None])[sequences.document]
        return (each * sequences.prompt[:, None]).to(ctx.dtype), None


def _sum_by_sequence(values: Tensor, sequences: Sequences) -> Tensor:
    if sequences.length is not None:
        return values.unflatten(0, (len(sequences.num_prompt), sequences.length)).sum(1)
    if is_asked_for("triton"):
        # segment_sum's kernel is CUDA's: who asks for Triton's gets torch's sum, as of the other plain products
        return torch.segment_reduce(values, "sum", offsets=sequences.offsets, axis=0, unsafe=True, initial=0)
    return segment_sum(values, sequences.offsets)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, gate: str, top_k: int) -> Tensor:
        g = gate_values(logits, gate, top_k)
        ctx.gate = gate
        ctx.save_for_backward(g)
        return g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor, None, None]:
        (g,) = ctx.saved_tensors
        return gate_gradient(dg, g, ctx.gate), None, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        g: Tensor,
        b: Tensor,
        rank: int,
        sequences: Sequences | None,
        gate: str | None,
        top_k: int,
        chosen: Chosen | None,
        scale: float,
        num_frozen: int,
        owned: bool,
    ) -> Tensor:
        document = None if sequences is None else sequences.document
        width = g.shape[1] * rank
        weight = b.to(z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            h, values = epilogue(Epilogue(z, g, document, gate, top_k), width)
            ctx.save_for_backward(z, values, b)
            ctx.sequences, ctx.gate, ctx.top_k, ctx.chosen, ctx.width = sequences, gate, top_k, chosen, width
            ctx.scale, ctx.frozen, ctx.num_gates = scale, num_frozen * rank, len(g)
            # what others may hold (an output that a base layer saved, or its input) is not written to
            return _add_expanded(y if owned else y.clone(), h, weight, chosen, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, values, b = ctx.saved_tensors
        flat, chosen, sequences = dy.reshape(-1, dy.shape[-1]).to(z.dtype), ctx.chosen, ctx.sequences
        document = None if sequences is None else sequences.document
        job = Epilogue(z, values, document, ctx.gate, ctx.top_k)
        weight = b.to(z.dtype) * ctx.scale  # small beside dy: the scale is spent here
        need_b = ctx.needs_input_grad[3]
        h = None
        if need_b:
            h, _ = epilogue(job._replace(gate=None), ctx.width)
        db = None
        if chosen is None:
            if h is None:
                dh = flat @ weight
            else:
                dh, part = products(flat, weight, h[:, ctx.frozen :])
                db = part if ctx.frozen == 0 else torch.cat([part.new_zeros(len(part), ctx.frozen), part], 1)
        else:
            dh = times_chosen(flat, weight.T, chosen)
            if h is not None:
                db = outer_chosen(h, flat, b.shape[1], chosen).T
                db[:, : ctx.frozen] = 0
        dz, dg = epilogue_backward(job, dh, ctx.width)
        if ctx.gate is None:
            if sequences is not None:
                dg = _sum_by_sequence(dg, sequences)
            elif ctx.num_gates == 1:
                dg = dg.sum(0, keepdim=True)
        db = None if db is None else db * ctx.scale
        return dy if ctx.needs_input_grad[0] else None, dz, dg, db, *[None] * 8


def _add_expanded(y: Tensor, h: Tensor, weight: Tensor, chosen: Chosen | None, scale: float) -> Tensor:
    """Add in y's memory and return another tensor on it, not y marked as changed.

    Autograd refuses to change in place what a base layer with backward hooks returns, and pays for views (nn.Linear
    with a bias returns one) by copying their gradient.
    """
    if torch.compiler.is_compiling():
        return y + (scale * (h @ weight.T)).view(y.shape).to(y.dtype)
    flat = y.reshape(-1, y.shape[-1])
    into = flat if flat.dtype == h.dtype else h.new_zeros(flat.shape)
    if chosen is None:
        into.addmm_(h, weight.T, alpha=scale)
    else:
        add_chosen(into, h, weight.T, chosen, scale)
    if into is not flat:
        flat += into
    return flat.view(y.shape).detach()
