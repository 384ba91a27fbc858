"""What the books write down: a line a step, a table of samples an interval. Numbers stay on the device till a flush."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastsft.attribution.in_run import Columns
from fastsft.attribution.ranks import rank
from fastsft.record import Record


class Journal:
    """Collect a run's events; under torch.distributed the first rank writes them, and each rank its own samples."""

    def __init__(self, record: Record, sources: Sequence[str], abilities: Sequence[str], device: torch.device) -> None:
        self.record, self.sources, self.abilities, self.device = record, list(sources), list(abilities), device
        self._steps: list[dict[str, Any]] = []
        self._counts = torch.zeros(2, len(sources), dtype=torch.float64)  # documents and tokens drawn, by source
        self._losses: list[Tensor] = []
        # what else is known of a step by whoever steers the run: {name: what the event says}
        self.also: Callable[[int], dict[str, Any]] | None = None

    def draw(self, sources: Tensor, sizes: Sequence[int]) -> None:
        """Count the documents of a micro-batch: their sources [D], as indices, and their lengths."""
        self._counts[0].index_add_(0, sources, torch.ones(len(sources), dtype=torch.float64))
        self._counts[1].index_add_(0, sources, torch.tensor(sizes, dtype=torch.float64))

    def add_loss(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def forget(self) -> None:
        """Drop what was counted since the last step."""
        self._losses = []
        self._counts.zero_()

    def add_step(self, step: int, lr: float, scale: Tensor, identity_error: Tensor) -> None:
        loss = torch.stack(self._losses).sum() if self._losses else torch.tensor(float("nan"))
        self._steps.append(
            {
                "event": "step",
                "step": step,
                "loss": loss,
                "lr": lr,
                "scale": scale,
                "identity_error": identity_error,
                "counts": self._counts.clone(),
                **({} if self.also is None else self.also(step)),
            }
        )
        self.forget()

    def flush(self) -> list[dict[str, Any]]:
        """Bring the steps' numbers to the host, summed over ranks, and give them as events."""
        events = []
        for event in self._steps:
            counts = event.pop("counts").to(self.device)
            loss = event["loss"].to(self.device, torch.float32)
            if dist.is_initialized():
                dist.all_reduce(counts)
                dist.all_reduce(loss)
                loss = loss / dist.get_world_size()
            event.update(
                loss=float(loss),
                scale=float(event["scale"]),
                identity_error=float(event["identity_error"]),
                documents=dict(zip(self.sources, counts[0].int().tolist(), strict=True)),
                tokens=dict(zip(self.sources, counts[1].int().tolist(), strict=True)),
            )
            events.append(event)
        self._steps = []
        return events

    def write(self, events: list[dict[str, Any]]) -> None:
        if rank() == 0:
            self.record.append_all(events)

    def write_influence(self, columns: list[Columns]) -> None:
        """Write the settled samples: a row per draw and ability."""
        if not columns:
            return
        many = len(self.abilities)
        steps: list[int] = []
        ids: list[str] = []
        sources: list[str] = []
        tokens: list[list[float]] = []
        for column in columns:
            for row, sample in enumerate(column.batch.samples):
                steps += [column.step] * many
                ids += [sample] * many
                sources += [self.sources[int(column.batch.sources[row])]] * many
                if column.tokens is not None:
                    first = int(column.batch.documents.offsets[row])
                    tokens += column.tokens[first : first + column.batch.lengths[row]].T.tolist()
        table: dict[str, Any] = {
            "step": np.array(steps, dtype=np.int32),
            "sample_id": ids,
            "source": sources,
            "ability": self.abilities * (len(ids) // many),
            "phi": np.concatenate([column.phi.float().numpy().reshape(-1) for column in columns]),
        }
        if tokens:
            table["tokens"] = tokens
        self.record.write_influence(min(steps), max(steps), table, rank=rank())
