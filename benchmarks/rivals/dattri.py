"""dattri 0.3.0: LoGra without curvature (`hessian="Identity"`), gradients kept in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.rivals._base import SIDES, Contestant, linear_names
from benchmarks.system.index_case import IndexCase, load_model, pad, sample_losses

BATCH = 8


def contestants(case: IndexCase, place: Path) -> dict[str, Contestant]:
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    model = load_model(case)
    side = SIDES[case.method]

    def loss(model: Any, batch: dict[str, Tensor], device: str) -> Tensor:
        # it multiplies by the number of samples, so it must be given their mean
        return sample_losses(model, batch).mean()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    # it counts on batches of one size; longest first
    rows: Any = sorted(case.rows, key=lambda row: -len(row.input_ids))
    loader: Any = DataLoader(rows, batch_size=BATCH, collate_fn=lambda rows: pad(rows, case.pad_id))

    def run() -> None:
        torch.manual_seed(0)
        attributor = LoGraAttributor(
            task, linear_names(model, case.method), hessian="Identity", proj_dim=side * side, offload="none"
        )
        attributor.cache(loader)

    numbers = side * side * len(linear_names(model, case.method))
    return {
        "dattri": Contestant(
            f"LoGra, {side} x {side} a module, batches of {BATCH}, in memory", run, lambda: 4.0 * numbers
        )
    }
