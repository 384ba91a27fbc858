"""kronfluence 1.0.1: pairwise EK-FAC influence at the last checkpoint.

Its defaults sample labels (true Fisher) and damp by 1e-8; here damping is its heuristic, 0.1 of a module's mean
eigenvalue. All queries' gradients are kept, so that the training rows are run once for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals._base import linear_names
from benchmarks.rivals.scores._base import Adapter, Case, Lines, Scored, counted_mask, load_model, timed
from benchmarks.system.index_case import pad, sample_losses

# of 8, 16 and 32 the least CPU time
BATCH = 8


def _adapter(*, empirical: bool, counted: bool = False) -> Adapter:
    return lambda case, place: score(case, place, empirical=empirical, counted=counted)


METHODS: dict[str, Adapter] = {
    "ekfac": _adapter(empirical=False),
    "ekfac_empirical": _adapter(empirical=True),
    # what the equality test compares: the covariance of inputs over the tokens that have a gradient
    "ekfac_counted": _adapter(empirical=True, counted=True),
}


def score(case: Case, place: Path, *, empirical: bool, counted: bool) -> Scored:
    """Fit factors on all rows, then score them. Positive: its measurement is the query's loss, its score
    <grad of loss, H^-1 grad of sample>, not divided by N."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    torch.manual_seed(0)
    model = load_model(case)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    task = _task(linear_names(model, case.method), counted)
    model = prepare_model(model, task)
    analyzer = Analyzer("scores", model, task, cpu=True, output_dir=str(place), disable_tqdm=True)
    loading = DataLoaderKwargs(collate_fn=lambda rows: pad(rows, case.pad_id))
    rows, queries = Lines(case.rows), Lines(case.queries)
    fit = timed(
        lambda: analyzer.fit_all_factors(
            "factors",
            rows,
            per_device_batch_size=BATCH,
            dataloader_kwargs=loading,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=empirical, **_factor_dtypes(dtype)),
        )
    )
    accumulate = -(-len(queries) // BATCH)
    pairwise = timed(
        lambda: analyzer.compute_pairwise_scores(
            "pairwise",
            "factors",
            queries,
            rows,
            per_device_query_batch_size=BATCH,
            per_device_train_batch_size=BATCH,
            dataloader_kwargs=loading,
            score_args=ScoreArguments(
                damping_factor=None, query_gradient_accumulation_steps=accumulate, **_score_dtypes(dtype)
            ),
        )
    )
    found = analyzer.load_pairwise_scores("pairwise")
    scores = rows.back(queries.back(found["all_modules"], 0), 1).T
    fisher = "empirical" if empirical else "true, one label sampled a token"
    settings = {"fisher": fisher, "damping": "0.1 * mean eigenvalue of the module", "batch": BATCH}
    mask = "tokens before a row's last supervised one" if counted else "all tokens but padding"
    settings |= {"input_covariance_over": mask, "divided_by_N": False}
    return Scored(scores, settings, {"fit": fit, "score": pairwise})


def _task(names: list[str], counted: bool) -> Any:
    from kronfluence.task import Task

    class ResponseLoss(Task):
        def compute_train_loss(self, batch: dict[str, Tensor], model: Any, sample: bool = False) -> Tensor:
            return sampled_loss(model, batch) if sample else sample_losses(model, batch).sum()

        def compute_measurement(self, batch: dict[str, Tensor], model: Any) -> Tensor:
            return sample_losses(model, batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
            return counted_mask(batch["labels"]) if counted else batch["attention_mask"]

    return ResponseLoss()


def sampled_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss with each supervised token's label drawn from the model's own distribution."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits = logits[:, :-1][batch["labels"][:, 1:] != -100]
    with torch.no_grad():
        drawn = torch.multinomial(logits.softmax(-1), 1).flatten()
    return nn.functional.cross_entropy(logits, drawn, reduction="sum")


def _factor_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    names = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    return {f"{name}_dtype": dtype for name in names}


def _score_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {f"{name}_dtype": dtype for name in ("per_sample_gradient", "precondition", "score")}
