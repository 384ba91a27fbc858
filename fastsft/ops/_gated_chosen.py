"""Sequences of a batch, and products of gated_adapter with the experts that speak in them: where that is half at most.

Each sequence names its rows of a stacked weight (`Chosen.columns`), and its tokens meet no others. Sequences of one
length are one product of a batch. Packed ones of many lengths go one by one on a CPU; a GPU would wait for the host to
learn where each begins, so there it is kernels that find out (where they are asked for by name), or all experts.
"""

# T tokens, D sequences, I inputs, O outputs, E experts, M memory rank, P rows of A, n = k * rank + M rows of a sequence

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastsft.ops._op import Implementation, Op, is_asked_for, why_no_triton

# sequences shorter than this are too small for products of their own
SKIP_LENGTH = 32


class Sequences(NamedTuple):
    """Which tokens of a batch are one sequence, and which of them are its prompt. Sequences lie beside each other.

    offsets [D + 1]: sequence d is the tokens offsets[d] <= t < offsets[d + 1]; all T are covered. document [T]: the
    sequence of each token. prompt [T] bool: the tokens that gates look at. num_prompt [D]: how many, at least 1.
    length: that of every sequence where they are alike, else None.
    """

    offsets: Tensor
    document: Tensor
    prompt: Tensor
    num_prompt: Tensor
    length: int | None = None

    @classmethod
    def of_rows(cls, prompt: Tensor) -> Sequences:
        """Every row of a batch is a sequence: prompt [B, L] bool says which of its tokens are the prompt's."""
        rows, length = prompt.shape
        offsets = torch.arange(rows + 1, device=prompt.device) * length
        document = torch.arange(rows, device=prompt.device).repeat_interleave(length)
        return cls(offsets, document, prompt.flatten(), prompt.sum(1).clamp_min(1), length)

    @classmethod
    def packed(cls, offsets: Tensor, prompt: Tensor) -> Sequences:
        """Sequences of any lengths packed one after another: offsets [D + 1] from 0 to T, prompt [T] bool."""
        lengths = offsets.diff()
        document = torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths, output_size=len(prompt))
        count = torch.zeros_like(lengths).index_add_(0, document, prompt.to(lengths.dtype))
        return cls(offsets, document, prompt, count.clamp_min(1))


class Chosen(NamedTuple):
    """The experts that speak in each sequence, the others' gates being 0: products are formed with them alone.

    experts [D, k]; columns [D, k * rank + M], the rows of A (and columns of B) that sequence d uses. `sequences` is
    None where all tokens use the same.
    """

    experts: Tensor
    columns: Tensor
    sequences: Sequences | None


def may_skip(gate: str, top_k: int, num_experts: int, sequences: Sequences | None, T: int, skip: bool | None) -> bool:
    """Whether products with chosen experts alone are worth it: those of at most half, over sequences long enough."""
    if gate not in ("topk", "one_hot") or torch.compiler.is_compiling():
        return False
    if skip is not None:
        return skip
    if 2 * (1 if gate == "one_hot" else top_k) > num_experts:
        return False
    if sequences is None:
        return True
    count = len(sequences.offsets) - 1
    device = sequences.offsets.device.type
    # those of many lengths go one by one, which a GPU would wait for: it has kernels, for who asks
    ready = sequences.length is not None or device == "cpu" or (device == "cuda" and is_asked_for("triton"))
    return ready and count > 0 and T >= count * SKIP_LENGTH


def choose(
    g: Tensor, gate: str, top_k: int, rank: int, memory: int, sequences: Sequences | None, T: int, skip: bool | None
) -> Chosen | None:
    """Name the experts that speak in each sequence, or None where all products are to be formed: gates g [D, E]."""
    E = g.shape[1]
    if not may_skip(gate, top_k, E, None if len(g) == 1 else sequences, T, skip):
        return None
    experts = g.detach().topk(1 if gate == "one_hot" else top_k, dim=1).indices.sort(1).values  # [D, k]
    rows = experts[:, :, None] * rank + torch.arange(rank, device=g.device)
    always = torch.arange(E * rank, E * rank + memory, device=g.device).expand(len(g), memory)
    return Chosen(experts, torch.cat([rows.flatten(1), always], 1), None if len(g) == 1 else sequences)


def times_chosen(x: Tensor, weight: Tensor, chosen: Chosen) -> Tensor:
    """Multiply each sequence's tokens x [T, I] by its rows of weight [P, I] -> [T, n]."""
    sequences = chosen.sequences
    if sequences is None:
        return _times_reference(x, weight, chosen)
    if sequences.length is None:
        found: Tensor = _TIMES(x, weight, chosen, like=x)
        return found
    rows = x.unflatten(0, (len(chosen.columns), sequences.length))
    return torch.bmm(rows, _rows(weight, chosen.columns).mT).flatten(0, 1)


def add_chosen(into: Tensor, z: Tensor, weight: Tensor, chosen: Chosen, scale: float = 1.0) -> Tensor:
    """Add scale * z [T, n] times each sequence's rows of weight [P, O] to `into` [T, O], in place."""
    sequences = chosen.sequences
    if sequences is None:
        return _add_reference(into, z, weight, chosen, scale)
    if sequences.length is None:
        found: Tensor = _ADD(into, z, weight, chosen, scale, like=z)
        return found
    shape = (len(chosen.columns), sequences.length)
    rows = into.view(*shape, into.shape[1])
    rows.baddbmm_(z.unflatten(0, shape), _rows(weight, chosen.columns), alpha=scale)
    return into


def outer_chosen(z: Tensor, x: Tensor, num_rows: int, chosen: Chosen) -> Tensor:
    """Sum over each sequence's tokens of z_t x_t^T [n, I], added at its rows -> [P, I]. In a fixed order."""
    if x.device.type != "cpu" and chosen.sequences is not None and chosen.sequences.length is None:
        return _outer_dense(z, x, num_rows, chosen.columns, chosen.sequences.document)
    total = x.new_zeros(num_rows, x.shape[1])
    for begin, end, columns in _spans(chosen, len(x)):
        total.index_add_(0, columns, z[begin:end].T @ x[begin:end])
    return total


def _outer_dense(z: Tensor, x: Tensor, num_rows: int, columns: Tensor, document: Tensor) -> Tensor:
    """The same with z's numbers in their columns of all P and zeros between: one product, and nothing to wait for."""
    wide = z.new_zeros(len(z), num_rows).scatter_(1, columns[document], z)
    return wide.T @ x


def _spans(chosen: Chosen, T: int) -> list[tuple[int, int, Tensor]]:
    """Where each sequence begins and ends, and its columns."""
    if chosen.sequences is None:
        return [(0, T, chosen.columns[0])]
    spans = pairwise(chosen.sequences.offsets.tolist())
    return [(begin, end, columns) for (begin, end), columns in zip(spans, chosen.columns)]


def _rows(weight: Tensor, columns: Tensor) -> Tensor:
    """Take rows of weight [P, I]: [n] or [D, n] -> [n, I] or [D, n, I]."""
    if weight.is_contiguous():
        return weight[columns]
    # a transposed one is read along its own memory: 0.5 ms against 2.4 ms, 8 times 128 rows of 1024
    return weight.T.index_select(1, columns.flatten()).unflatten(1, columns.shape).movedim(0, -1)


def _times_reference(x: Tensor, weight: Tensor, chosen: Chosen) -> Tensor:
    out = x.new_empty(len(x), chosen.columns.shape[1])
    for begin, end, columns in _spans(chosen, len(x)):
        torch.mm(x[begin:end], _rows(weight, columns).T, out=out[begin:end])
    return out


def _add_reference(into: Tensor, z: Tensor, weight: Tensor, chosen: Chosen, scale: float) -> Tensor:
    for begin, end, columns in _spans(chosen, len(into)):
        into[begin:end].addmm_(z[begin:end], _rows(weight, columns), alpha=scale)
    return into


def _times_triton(x: Tensor, weight: Tensor, chosen: Chosen) -> Tensor:
    from fastsft.triton_kernels import gated_adapter as kernels

    assert chosen.sequences is not None
    return kernels.times_chosen(x, weight, chosen.columns, chosen.sequences.offsets)


def _add_triton(into: Tensor, z: Tensor, weight: Tensor, chosen: Chosen, scale: float) -> Tensor:
    from fastsft.triton_kernels import gated_adapter as kernels

    assert chosen.sequences is not None
    return kernels.add_chosen(into, z, weight, chosen.columns, chosen.sequences.offsets, scale)


def _op(name: str, reference: Callable[..., Tensor], kernel: Callable[..., Tensor]) -> Op:
    note = "where it is asked for by name, sequences of many lengths; else all experts' products"
    found = Implementation(
        backend="triton", device="cuda", run=kernel, why_absent=why_no_triton, by_name=True, note=note
    )
    return Op(name, reference, [found])


_TIMES = _op("gated_times_chosen", _times_reference, _times_triton)
_ADD = _op("gated_add_chosen", _add_reference, _add_triton)
