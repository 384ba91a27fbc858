"""Where every trainable parameter lies in the flat vectors of the books.

Order: parameters booked exactly by source (P of them), then the rest (N in all).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsft.attribution.optimizer import Slot
from fastsft.capturing import Layer


class Layout:
    """The flat order of a model's trainable parameters, and what is done with each followed layer."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Sequence[Layer],
        *,
        narrow: int,
        exact: str | None,
    ) -> None:
        groups: dict[int, dict[str, Any]] = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        missing = [layer.name for layer in layers if id(layer.weight) not in groups]
        if missing:
            raise ValueError(
                f"{missing[0]} ({len(missing)} in all) is trainable, but not among the optimizer's parameters. "
                f"Freeze it or give it to the optimizer."
            )
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) in groups]
        devices = {p.device for _, p in trainable}
        if len(devices) > 1:
            raise ValueError(f"the books need all trainable weights on one device: got {sorted(map(str, devices))}.")
        if any(hasattr(p, "full_tensor") for _, p in trainable):
            raise ValueError("trainable weights are sharded (DTensor): the books run under DDP, not yet under FSDP.")
        # narrow layers (LoRA) and chosen wide ones are booked by source and contracted exactly, the others by factors
        self.is_exact = [
            min(layer.shape) <= narrow or (exact is not None and re.search(exact, layer.name) is not None)
            for layer in layers
        ]
        first = [layer.weight for layer, booked in zip(layers, self.is_exact, strict=True) if booked]
        chosen = {id(p) for p in first}
        rest = [p for _, p in trainable if id(p) not in chosen]
        self.slots: list[Slot] = []
        position = 0
        for parameter in [*first, *rest]:
            self.slots.append(Slot(parameter, position, position + parameter.numel(), groups[id(parameter)]))
            position += parameter.numel()
        self.exact_slots = self.slots[: len(first)]
        parts = {id(layer.weight): layer.part for layer in layers}
        # of each exact slot the part of the model it belongs to, None where the model has none
        self.exact_parts = [parts[id(slot.parameter)] for slot in self.exact_slots]
        self.num_exact = self.exact_slots[-1].end if first else 0
        self.num_all = position
        by_id = {id(slot.parameter): slot for slot in self.slots}
        self.layer_slots = [by_id[id(layer.weight)] for layer in layers]
        place = {id(slot.parameter): number for number, slot in enumerate(self.exact_slots)}
        # of each layer the number of its exact slot, None where its sources are not booked exactly
        self.exact_of = [place.get(id(layer.weight)) for layer in layers]
        self.device = next(iter(devices))
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for _, p in trainable) else torch.float32

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [slot.parameter for slot in self.slots]

    def zeros(self, *size: int) -> Tensor:
        return torch.zeros(*size, device=self.device, dtype=self.dtype)

    def blocks(self, rows: int) -> tuple[Tensor, list[Tensor]]:
        """Zeros for `rows` vectors over the exactly booked parameters: one buffer, and a [rows, n] view a slot."""
        flat = self.zeros(rows * self.num_exact)
        views = [flat[rows * s.start : rows * s.end].view(rows, s.end - s.start) for s in self.exact_slots]
        return flat, views

    def weights(self) -> Tensor:
        """Copy all trainable weights into one vector [N]."""
        return torch.cat([slot.parameter.detach().reshape(-1).to(self.dtype) for slot in self.slots])

    def span(self, layer: int) -> slice:
        slot = self.layer_slots[layer]
        return slice(slot.start, slot.end)
