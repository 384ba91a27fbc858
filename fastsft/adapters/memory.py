"""The memory: experts fold into it, and a task may train those of its ranks that speak about that task."""

# T tokens, I inputs, O outputs, M memory rank, r an expert's rank, k ranks that train

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsft.adapters.config import GatedError
from fastsft.adapters.factor import Pair, freeze
from fastsft.adapters.layer import MEMORY, Adapter
from fastsft.attribution.targets import evaluation

if TYPE_CHECKING:
    from fastsft.adapters.gated import Gated


# folding an expert in


@dataclass(frozen=True)
class Consolidation:
    """What became of an expert that was folded into the memory, by layer.

    energy: the sum of the squared singular values of memory + weight * expert. discarded: the share of it that the
    memory's rank couldn't hold. kept: how many of the memory's ranks the rest takes.
    """

    expert: str
    energy: dict[str, float]
    discarded: dict[str, float]
    kept: dict[str, int]

    @property
    def total(self) -> float:
        """The discarded share of the energy of all layers together."""
        lost = sum(share * self.energy[layer] for layer, share in self.discarded.items())
        return lost / (sum(self.energy.values()) or 1.0)


class _Folded(NamedTuple):
    a: Tensor  # [M, I]
    b: Tensor  # [O, M]
    energy: float
    discarded: float
    kept: int


@torch.no_grad()
def consolidate(gated: Gated, name: str, *, weight: float = 1.0, remove: bool = True) -> Consolidation:
    """Fold an expert into the memory, and take it out: memory + weight * expert, cut to the memory's rank M.

    weight: the gate at which the expert spoke on its task; from now on it speaks so on every input. remove: take the
    expert out, or it would speak twice. The cut is the best of rank M (truncated SVD, in float64), and exact where the
    sum has no more ranks; what it loses is in the result.
    Singular values are split evenly over A and B. Ranks that the sum leaves unused keep their A, with B at zero, and
    so can learn. Costs O((I + O) (M + r)^2) a layer.

    The memory's parameters stay the same objects, but an optimizer's moments of them are of the old ranks, and the
    expert's parameters are gone: make it anew. Raises GatedError, with nothing changed, where there is no such expert
    or memory, ranks are held, or a weight isn't finite.
    """
    gated._check_expert(name)
    _check_memory(gated)
    if not (math.isfinite(weight) and weight > 0):
        raise GatedError(f"`weight` must be the gate at which {name!r} spoke, over 0: got {weight}.")
    if any(adapter.held is not None for adapter in gated.adapters.values()):
        raise GatedError("some memory ranks are held: call `gated.release_memory()` before you consolidate.")
    folded = {layer: _fold(adapter, name, weight) for layer, adapter in gated.adapters.items()}
    for layer, adapter in gated.adapters.items():
        assert adapter.memory is not None
        for factor, value in ((adapter.memory.A, folded[layer].a), (adapter.memory.B, folded[layer].b)):
            factor.weight.copy_(value)
            factor.weight.grad = None
    if remove:
        gated.remove_expert(name)
    return Consolidation(
        name,
        {layer: each.energy for layer, each in folded.items()},
        {layer: each.discarded for layer, each in folded.items()},
        {layer: each.kept for layer, each in folded.items()},
    )


def _fold(adapter: Adapter, name: str, weight: float) -> _Folded:
    """B A = Q_B (R_B R_A^T) Q_A^T for the stacked B [O, M + r] and A [M + r, I]: the SVD is that of the small core."""
    memory, expert = adapter.memory, adapter.experts[name]
    assert memory is not None
    b = torch.cat([memory.B.weight.double(), weight * expert.B.weight.double()], 1)
    a = torch.cat([memory.A.weight.double(), expert.A.weight.double()])
    if not (b.isfinite().all() and a.isfinite().all()):
        raise GatedError(f"{adapter.name}: the memory or expert {name!r} holds numbers that aren't finite.")
    left, core_b = torch.linalg.qr(b)
    right, core_a = torch.linalg.qr(a.T)
    u, values, vt = torch.linalg.svd(core_b @ core_a.T)
    rounding = max(adapter.outputs, adapter.inputs) * torch.finfo(values.dtype).eps * values[0]
    kept = min(len(memory.A.weight), int((values > rounding).sum()))
    root = values[:kept].sqrt()
    # a rank with both sides at zero would have no gradient, ever: those left over keep their A
    new_a = torch.cat([root[:, None] * (vt[:kept] @ right.T), memory.A.weight[kept:].double()])
    new_b = torch.zeros_like(memory.B.weight, dtype=torch.float64)
    new_b[:, :kept] = (left @ u[:, :kept]) * root
    energy, lost = values.square().sum(), values[kept:].square().sum()
    return _Folded(new_a, new_b, float(energy), float(lost / energy) if energy > 0 else 0.0, kept)


# which ranks matter to a task


@torch.no_grad()
def memory_importance(
    gated: Gated, batches: Iterable[Mapping[str, Any]], *, background: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Tensor]:
    """Say how much each memory rank contributes on a task: {layer: [M], float64, on the CPU}.

    Energy of what rank j adds to the layer's output: the mean over tokens of |scale * (A_j x) B_j|^2. Where B is zero
    for all of a layer's ranks (a memory that hasn't learnt) it is that of A_j x alone, and a warning says so.

    batches: what the model is called with, each a dict; tokens that a 2-D `attention_mask` leaves out don't count. The
    model runs in eval mode without gradients; gates per task need their task set. background: batches of everything
    else. The result is then rank j's share of the task's energy over its share of the background's, which prefers
    ranks that speak about this task to those that always do, as TF-IDF does in sparse memory finetuning
    (arXiv:2510.15103). Processes of a group must give the same batches, or they would choose different ranks.
    """
    _check_memory(gated)
    found = _mean_squares(gated, batches, "batches")
    common = None if background is None else _mean_squares(gated, background, "background")
    empty = []
    for layer, adapter in gated.adapters.items():
        size = _in_order(adapter, [pair.B.weight.double().square().sum(0) for pair in _memory_pairs(adapter)]).cpu()
        if not size.any():
            empty.append(layer)
            size = torch.ones_like(size)
        for energies in (found, common):
            if energies is not None:
                energies[layer] = energies[layer] * size * gated.config.scale**2
    if empty:
        warnings.warn(
            f"the memory adds nothing yet in {len(empty)} of {len(gated.adapters)} layers (B is zero), so there its "
            f"ranks are ranked by A x alone.",
            RuntimeWarning,
            stacklevel=2,
        )
    if common is None:
        return found
    return {layer: _share(found[layer]) / _share(common[layer]).clamp_min(1e-12) for layer in found}


def _share(energy: Tensor) -> Tensor:
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)


def _mean_squares(gated: Gated, batches: Iterable[Mapping[str, Any]], argument: str) -> dict[str, Tensor]:
    """Mean over tokens of (A_j x)^2, by layer, in the order of the whole memory."""
    if isinstance(batches, Mapping):
        raise GatedError(f"`{argument}` must be a list of batches, each a dict: got one dict. Put it into a list.")
    sums: dict[Any, Tensor] = {}
    counts: dict[Any, Tensor] = {}
    mask: Tensor | None = None

    def listen(factor: nn.Module, args: tuple[Tensor, Tensor], out: Tensor) -> None:
        squares = args[1].double().square()
        # layers that see other tokens than the batch's (experts of a mixture) count all they see
        fits = mask is not None and len(mask) == len(squares)
        counted = mask.to(squares) if mask is not None and fits else squares.new_ones(len(squares))
        sums[factor] = sums.get(factor, 0.0) + counted @ squares
        counts[factor] = counts.get(factor, 0.0) + counted.sum()

    device = next(gated.model.parameters()).device
    with _listening(gated, listen), evaluation(gated.model):
        for batch in batches:
            mask = batch.get("attention_mask")
            mask = mask.flatten().bool() if mask is not None and mask.ndim == 2 else None
            gated.model(
                **{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            )
    if not any(bool(count) for count in counts.values()):
        raise GatedError(f"`{argument}` must hold a token that counts: got no batch, or none attended to.")
    means = {}
    for layer, adapter in gated.adapters.items():
        factors = [pair.A for pair in _memory_pairs(adapter)]
        none = [factor.weight.new_zeros(len(factor.weight), dtype=torch.float64) for factor in factors]
        parts = [sums[f] / counts[f].clamp_min(1) if f in sums else zero for f, zero in zip(factors, none)]
        means[layer] = _in_order(adapter, parts).cpu()
    return means


@contextmanager
def _listening(gated: Gated, listen: Callable[..., None]) -> Iterator[None]:
    pairs = [pair for adapter in gated.adapters.values() for pair in _memory_pairs(adapter)]
    handles = [pair.A.register_forward_hook(listen) for pair in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# training some ranks alone


class Held(Pair):
    """Memory ranks that stay as they are, and their places in the whole memory: places [M - k], rising."""

    def __init__(self, a: Tensor, b: Tensor, places: Tensor) -> None:
        super().__init__(a, b, MEMORY)
        self.register_buffer("places", places)
        self.places: Tensor
        freeze(self)


@torch.no_grad()
def select_memory(gated: Gated, importance: Mapping[str, Tensor], share: float) -> None:
    """Let only the memory ranks of highest `importance` train: ceil(share * M) of each layer.

    importance: {layer: [M]}, as `memory_importance` gives it; of equals the first is taken. The other ranks are split
    off into frozen parameters of their own, so that no optimizer moves them, be it by momentum or weight decay.
    Outputs stay as they are, to rounding. Ranks held before are released first.

    The optimizer must be made anew: the memory's parameters are new ones. Raises GatedError, with nothing changed.
    """
    _check_memory(gated)
    if not 0 < share <= 1:
        raise GatedError(f"`share` must be over 0 and at most 1, the share of memory ranks that train: got {share}.")
    _check_importance(gated, importance)
    _check_unfollowed(gated)
    chosen = {}
    for layer, adapter in gated.adapters.items():
        # 0.07 * 100 is a little more than 7
        count = math.ceil(share * adapter.memory_rank - 1e-9)
        ranking = importance[layer].detach().cpu().double().argsort(descending=True, stable=True)
        chosen[layer] = ranking[:count].sort().values
    release_memory(gated)
    for layer, adapter in gated.adapters.items():
        hold(adapter, chosen[layer])


@torch.no_grad()
def release_memory(gated: Gated) -> None:
    """Let all memory ranks train again, each in its old place. The optimizer must be made anew."""
    if all(adapter.held is None for adapter in gated.adapters.values()):
        return
    _check_unfollowed(gated)
    for adapter in gated.adapters.values():
        if adapter.held is not None:
            pairs = _memory_pairs(adapter)
            a = _in_order(adapter, [pair.A.weight for pair in pairs])
            b = _in_order(adapter, [pair.B.weight.T for pair in pairs]).T
            adapter.memory, adapter.held = Pair(a, b.contiguous(), MEMORY), None


@torch.no_grad()
def hold(adapter: Adapter, chosen: Tensor) -> None:
    """Split a whole memory: the ranks `chosen` [k] (rising) stay in `adapter.memory`, all others become held."""
    memory = adapter.memory
    assert memory is not None
    assert adapter.held is None
    a, b = memory.A.weight, memory.B.weight
    if len(chosen) == len(a):
        return
    chosen = chosen.to(a.device)
    others = torch.ones(len(a), dtype=torch.bool, device=a.device).index_fill_(0, chosen, False).nonzero().flatten()
    adapter.held = Held(a[others], b[:, others], others)
    adapter.memory = Pair(a[chosen], b[:, chosen], MEMORY)


def _memory_pairs(adapter: Adapter) -> list[Pair]:
    return [pair for pair in (adapter.held, adapter.memory) if pair is not None]


def _in_order(adapter: Adapter, parts: list[Tensor]) -> Tensor:
    """Put what belongs to the held ranks and to the others [M, ..] into the order of the whole memory."""
    stacked = torch.cat(parts)
    if not isinstance(adapter.held, Held):
        return stacked
    trains = torch.ones(len(stacked), dtype=torch.bool, device=stacked.device)
    trains[adapter.held.places] = False
    return stacked[torch.cat([adapter.held.places, trains.nonzero().flatten()]).argsort()]


# what is asked of callers


def _check_memory(gated: Gated) -> None:
    if not gated.has_memory:
        raise GatedError("these adapters have no memory: attach them with GatedConfig(memory_rank=...).")


def _check_importance(gated: Gated, importance: Mapping[str, Tensor]) -> None:
    missing = [layer for layer in gated.adapters if layer not in importance]
    unknown = [layer for layer in importance if layer not in gated.adapters]
    if missing or unknown:
        wrong = f"{missing[0]} is missing" if missing else f"{unknown[0]} has no adapter"
        raise GatedError(
            f"`importance` must have each of the {len(gated.adapters)} adapted layers, as `memory_importance` gives "
            f"it: {wrong}."
        )
    for layer, adapter in gated.adapters.items():
        values = importance[layer]
        if values.shape != (adapter.memory_rank,):
            raise GatedError(
                f"`importance` must have a number for each of the {adapter.memory_rank} memory ranks of {layer}: got "
                f"the shape {list(values.shape)}."
            )
        if values.isnan().any():
            raise GatedError(f"`importance` of {layer} has NaN, so its ranks have no order: did the model overflow?")


def _check_unfollowed(gated: Gated) -> None:
    """New parameters would lose who listens to the old ones."""
    for adapter in gated.adapters.values():
        if any(pair.A.is_followed or pair.B.is_followed for pair in _memory_pairs(adapter)):
            raise GatedError(
                f"the memory of {adapter.name} is being followed by a capture, which wouldn't see its new parameters: "
                f"select or release memory ranks before it is attached."
            )
