"""kronfluence 1.0.1: EK-FAC factors with the empirical Fisher. No store: every query runs the training set again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.rivals._base import Contestant, linear_names
from benchmarks.system.index_case import IndexCase, Line, load_model, pad, sample_losses

BATCH = 8


class Lines(Dataset[Line]):
    """The case's rows, longest first."""

    def __init__(self, case: IndexCase) -> None:
        self.rows = sorted(case.rows, key=lambda row: -len(row.input_ids))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Line:
        return self.rows[number]


def contestants(case: IndexCase, place: Path) -> dict[str, Contestant]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    model = load_model(case).eval()
    names = linear_names(model, case.method)

    class ResponseLoss(Task):
        def compute_train_loss(self, batch: dict[str, Tensor], model: Any, sample: bool = False) -> Tensor:
            return sample_losses(model, batch).sum()

        def compute_measurement(self, batch: dict[str, Tensor], model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["attention_mask"]

    task = ResponseLoss()
    model = prepare_model(model, task)
    analyzer = Analyzer(
        "index", model, task, cpu=True, output_dir=str(place), disable_tqdm=True, disable_model_save=True
    )
    loading = DataLoaderKwargs(collate_fn=lambda rows: pad(rows, case.pad_id))
    numbers = itertools.count()

    def run() -> None:
        analyzer.fit_all_factors(
            f"factors-{next(numbers)}",
            Lines(case),
            per_device_batch_size=BATCH,
            dataloader_kwargs=loading,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )

    facts: dict[str, object] = {"note": "factors only: no index is kept, a query costs passes over the training set"}
    return {"kronfluence": Contestant("EK-FAC factors, empirical Fisher, batches of 8", run, facts=facts)}
