"""The books: every ability's measured change, booked to the sources that caused it.

Over an interval from step f to step t, for ability a with target gradient g_a:

    measured = sum over sources of 1/2 (g_a(f) + g_a(t)) . dw(s) + decay + unfollowed + carried + residual

dw(s) is the source's share of the optimizer's displacement, exact for AdamW, Adam and SGD (see `optimizer`). The
trapezoid closes the path integral dL_a = integral of g_a . dw to second order in the interval; what it misses is the
residual, shown and never folded in.

Letters: S sources, A abilities, P parameters booked by source, N all trainable parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsft.attribution.layout import Layout
from fastsft.attribution.optimizer import Rule
from fastsft.attribution.ranks import rank
from fastsft.attribution.targets import TargetState


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One ability's books over an interval, in nats per response token; negative lowers the loss.

    by_part: {part: {source: nats}}, how much of each source's entry went through which part (expert, memory, router) of
    a gated adapter; empty for other models.
    """

    measured: float
    error: float
    by_source: dict[str, float]
    decay: float
    unfollowed: float
    carried: float
    residual: float
    gross: float
    start_only: dict[str, float]
    samples: dict[str, float]
    by_part: dict[str, dict[str, float]]

    def as_dict(self) -> dict[str, Any]:
        found = dict(self.__dict__)
        if not self.by_part:
            del found["by_part"]
        return found


class Ledger:
    """Keep one first-moment and one displacement buffer a source; balance them against the targets."""

    def __init__(self, layout: Layout, rule: Rule, sources: list[str]) -> None:
        self.layout, self.rule, self.sources = layout, rule, sources
        rows = len(sources) + 2  # then decay, then carried
        self.part, self.parts = layout.blocks(rows)
        self.moment, self.moments = layout.blocks(rows)
        self.displacement, self.displacements = layout.blocks(rows)
        self.start: TargetState | None = None
        self._weights = layout.weights()

    def carry(self) -> None:
        """Book the momentum the optimizer already holds, less what is booked to sources, as `carried`.

        Under torch.distributed the rows are this rank's part, and rank 0 alone takes what was there before.
        """
        if rank() > 0:
            return
        held = self.layout.zeros(self.layout.num_exact)
        self.rule.carried(self.layout.exact_slots, held)
        for slot, moment in zip(self.layout.exact_slots, self.moments, strict=True):
            moment[-1] += held[slot.start : slot.end] - moment.sum(0)

    def book_step(self, scale: float | Tensor) -> None:
        """Book the step just taken. `parts` hold each source's captured gradient; `scale` is what the trainer
        multiplied it by (loss scaling, clipping, averaging over ranks)."""
        self.part.mul_(scale)
        self.rule.advance(self.layout.exact_slots, self.parts, self.moments, self.displacements)
        self.part.zero_()

    def weigh_step(self, factors: Tensor) -> None:
        """Scale each source's gradient [S] in the step about to be taken, as the optimizer will see it."""
        for part in self.parts:
            part[: len(factors)] *= factors[:, None]

    def forget_step(self) -> None:
        """Drop gradients of a step that the trainer skipped."""
        self.part.zero_()

    def begin(self, state: TargetState) -> None:
        """Start an interval at these weights."""
        self.start = state
        self._weights = self.layout.weights()
        self.displacement.zero_()

    def balance(self, end: TargetState, wide: Tensor, samples: Tensor) -> tuple[dict[str, Entry], float]:
        """Close the interval at `end`: an entry per ability, and the books' displacement error.

        wide [S, A]: what samples book on layers that are followed by factors; it moves from `unfollowed` to sources.
        samples [S, A]: sums of sample influence, stated beside the entries.
        The displacement error is |dw - sum of its parts| / |dw| over the P parameters: rounding, or a wrong optimizer.
        """
        if self.start is None:
            raise RuntimeError("`begin` an interval before balancing it.")
        P, S = self.layout.num_exact, len(self.sources)
        if dist.is_initialized():
            dist.all_reduce(self.displacement)
        moved = self.layout.weights() - self._weights
        mean = (self.start.gradient + end.gradient) / 2
        by_part = self._dot_parts(mean)
        booked, early = self._total(by_part, mean), self._dot(self.start.gradient)[:S] + wide
        rest = (mean[:, P:] @ moved[P:]).double().cpu() - wide.sum(0)
        parts = torch.cat([displacement.sum(0) for displacement in self.displacements]) if P else moved[:0]
        gap = (moved[:P] - parts).norm() / moved[:P].norm().clamp_min(1e-30)
        entries: dict[str, Entry] = {}
        for index, ability in enumerate(end.losses):
            by_source = (booked[:S, index] + wide[:, index]).tolist()
            measured = end.losses[ability] - self.start.losses[ability]
            decay, carried, unfollowed = float(booked[-2, index]), float(booked[-1, index]), float(rest[index])
            entries[ability] = Entry(
                measured=measured,
                error=end.change_error(ability, self.start),
                by_source=dict(zip(self.sources, by_source, strict=True)),
                decay=decay,
                unfollowed=unfollowed,
                carried=carried,
                residual=measured - sum(by_source) - decay - unfollowed - carried,
                gross=sum(abs(entry) for entry in by_source),
                start_only=dict(zip(self.sources, early[:, index].tolist(), strict=True)),
                samples=dict(zip(self.sources, samples[:, index].tolist(), strict=True)),
                by_part={
                    part: dict(zip(self.sources, dots[:S, index].tolist(), strict=True))
                    for part, dots in by_part.items()
                    if part is not None
                },
            )
        return entries, float(gap) if P else 0.0

    def _dot(self, gradient: Tensor) -> Tensor:
        """Dot every row's displacement with each target gradient: [A, N] -> [S+2, A]."""
        return self._total(self._dot_parts(gradient), gradient)

    def _total(self, parts: dict[str | None, Tensor], gradient: Tensor) -> Tensor:
        return sum(parts.values(), torch.zeros(len(self.sources) + 2, len(gradient), dtype=torch.float64))

    def _dot_parts(self, gradient: Tensor) -> dict[str | None, Tensor]:
        """The same by part of the model: {part: [S+2, A]}."""
        found: dict[str | None, Tensor] = {}
        exact = zip(self.layout.exact_slots, self.layout.exact_parts, self.displacements, strict=True)
        for slot, part, displacement in exact:
            dots = displacement @ gradient[:, slot.start : slot.end].T
            found[part] = found[part] + dots if part in found else dots
        return {part: dots.double().cpu() for part, dots in found.items()}
