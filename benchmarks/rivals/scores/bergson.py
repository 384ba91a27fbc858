"""bergson 2.5.1: EK-FAC, TrackStar and gradient cosine at the last checkpoint, by its own pipelines, from files.

It refuses batches of more tokens than the model has positions, and takes the adapter from a peft folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.rivals._base import linear_names
from benchmarks.rivals.scores._base import Adapter, Case, Scored, load_model
from benchmarks.system.index_case import BATCH_TOKENS, Line

# its TrackStar's own number a side of a module's projection
SIDE = 16


def index_config(case: Case, place: Path, name: str, **settings: Any) -> Any:
    """Write model and rows where bergson reads them -> its IndexConfig with the summed response loss, one process."""
    from bergson import DataConfig, IndexConfig
    from bergson.config.config import DistributedConfig

    if not (place / "model").exists():
        model = load_model(case)
        config = model.peft_config["default"] if case.lora else None
        if config is not None:
            config.base_model_name_or_path = str(case.base)
        model.save_pretrained(place / "model")
        _save_rows(case.rows, place / "rows")
        _save_rows(case.queries, place / "queries")
    return IndexConfig(
        run_path=str(place / name),
        model=str(place / "model"),
        tokenizer=str(case.base),
        data=DataConfig(dataset=str(place / "rows")),
        distributed=DistributedConfig(nproc_per_node=1),
        token_batch_size=min(BATCH_TOKENS, _positions(case)),
        loss_reduction="sum",
        **settings,
    )


def _save_rows(rows: Sequence[Line], place: Path) -> None:
    from datasets import Dataset

    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    Dataset.from_dict({**columns, "length": [len(row.input_ids) for row in rows]}).save_to_disk(str(place))


def _positions(case: Case) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(case.base).max_position_embeddings)


def _queries(place: Path) -> Any:
    from bergson import QuerySetConfig

    return QuerySetConfig(dataset=str(place / "queries"))


def _scored(case: Case, config: Any, scores: Path, **settings: Any) -> Scored:
    from bergson.data import load_scores

    found = torch.from_numpy(numpy.array(load_scores(scores)[:])).float()
    batches = f"at most {config.token_batch_size} tokens"
    layers = len(linear_names(load_model(case), case.method))
    return Scored(found, {**settings, "batches": batches, "layers_expected": layers, "divided_by_N": False})


def _ekfac(*, empirical: bool) -> Adapter:
    def score(case: Case, place: Path) -> Scored:
        from bergson import PreprocessConfig, ScoreConfig
        from bergson.config.config import HessianConfig, HessianPipelineConfig
        from bergson.hessians.pipeline import hessian_pipeline

        config = index_config(case, place, "ekfac")
        hessian = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=empirical)
        pipeline = HessianPipelineConfig(query=_queries(place))
        hessian_pipeline(config, hessian, ScoreConfig(), PreprocessConfig(), pipeline)
        fisher = "empirical" if empirical else "true, one label sampled a token"
        damping = f"{pipeline.inversion_cfg.damping_factor} * mean eigenvalue of the module"
        return _scored(case, config, place / "ekfac" / "scores", fisher=fisher, damping=damping)

    return score


def trackstar(case: Case, place: Path) -> Scored:
    """Both sides projected, whitened by the mixed autocorrelation's inverse root, and normalised."""
    from bergson import PreprocessConfig
    from bergson.cli.trackstar import trackstar as run
    from bergson.config.config import TrackstarConfig

    config = index_config(case, place, "trackstar", projection_dim=SIDE)
    settings = TrackstarConfig(query=_queries(place), preprocess_cfg=PreprocessConfig(unit_normalize=True))
    run(config, settings)
    told = {"projection": f"{SIDE} x {SIDE} a module", "unit_normalize": True, "mixed_with_queries": True}
    return _scored(case, config, place / "trackstar" / "scores", **told)


def grad_cos(case: Case, place: Path) -> Scored:
    """Cosine of whole gradients, nothing projected."""
    from copy import deepcopy

    from bergson import PreprocessConfig, ScoreConfig
    from bergson.build import build_query
    from bergson.score.score import score_dataset

    config = index_config(case, place, "scores")
    query = deepcopy(config)
    query.run_path = str(place / "query")
    build_query(query, _queries(place), PreprocessConfig())
    score_dataset(config, ScoreConfig(query_path=query.run_path), PreprocessConfig(unit_normalize=True))
    return _scored(case, config, place / "scores", projection="none", unit_normalize=True)


METHODS: dict[str, Adapter] = {
    "ekfac": _ekfac(empirical=False),
    "ekfac_empirical": _ekfac(empirical=True),
    "trackstar": trackstar,
    "grad_cos": grad_cos,
}
