"""traker 0.3.2: TRAK features on the CPU projector, for 2 rows at K=128: 4 rows at 512 were not done in 250 s."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals._base import Contestant, folder_bytes
from benchmarks.system.index_case import IndexCase, load_model, pad, sample_losses

ROWS, SIZE = 2, 128


def contestants(case: IndexCase, place: Path) -> dict[str, Contestant]:
    from trak import TRAKer
    from trak.gradient_computers import IterativeGradientComputer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    model = load_model(case)
    # its iterative computer takes the gradient of every parameter the model lists: what is frozen must not be listed
    if case.method == "lora":
        raise ValueError("traker's iterative computer wants gradients of frozen parameters too: full weights only")

    class ResponseLoss(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model: Any, weights: None, buffers: None, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
            return sample_losses(model, {"input_ids": ids, "labels": labels, "attention_mask": mask})

        def get_out_to_loss_grad(self, model: Any, *arguments: Any) -> Tensor:
            return torch.ones(1, 1)

    rows = sorted(case.rows, key=lambda row: -len(row.input_ids))[:ROWS]
    inputs = [pad([row], case.pad_id) for row in rows]
    grad_dim = sum(parameter.numel() for parameter in model.parameters())
    numbers = itertools.count()
    last: list[Path] = []

    def featurize(batches: Iterable[dict[str, Tensor]]) -> None:
        last.append(place / f"trak-{next(numbers)}")
        projector = BasicProjector(grad_dim, SIZE, 0, ProjectionType.rademacher, "cpu", block_size=64)
        traker = TRAKer(
            model=model,
            task=ResponseLoss(),
            train_set_size=ROWS,
            save_dir=str(last[-1]),
            device="cpu",
            gradient_computer=IterativeGradientComputer,
            projector=projector,
            proj_dim=SIZE,
            use_half_precision=False,
            logging_level=30,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in batches:
            parts = [batch["input_ids"], batch["labels"], batch["attention_mask"]]
            traker.featurize(batch=parts, num_samples=1)
        traker.finalize_features()

    def stored() -> float:
        return folder_bytes(last[-1]) / ROWS

    describe = f"TRAK, K={SIZE}, CPU projector, {ROWS} rows"
    return {"traker": Contestant(describe, lambda: featurize(inputs), stored, num_samples=ROWS)}
