"""Pilots: short trainings of a run file's run, each under a mix that stays as it is, judged by the run's targets.

No books are kept. Pilots differ by their mixes alone: model, adapter, seed, and the order within each source are the
run's own in all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsft.data import Row, pack
from fastsft.evaluate.retrain import Study, query_losses, quiet
from fastsft.mixing.core import Array, named
from fastsft.tasks import Mix, MixError
from fastsft.train.config import MixConfig, RunConfig, parse_config
from fastsft.train.finished import FinishedRun
from fastsft.train.loop import load_model, make_trainer, model_places, prepare
from fastsft.train.sampler import Draws
from fastsft.train.steering import steer_static

WORK = "fastsft.mixing.pilots:train_pilot"


def train_pilot(job: dict[str, Any]) -> dict[str, Any]:
    """Train under one mix -> the targets' losses before and after, nats per response token, by ability.

    job: `config` (the run file as a mapping), `root` (or null), `mix` {source: share}, `steps`, `warmup_steps`, `unit`
    of the shares. tokens {source}: supervised tokens that were drawn. On CUDA where there is one. Writes nothing.
    """
    study = _study(json.dumps(job["config"], sort_keys=True), job["root"])
    start = time.perf_counter()  # without what is loaded once a process
    config = _short(study.config, job)
    with tempfile.TemporaryDirectory() as folder:
        model: Any = copy.deepcopy(study.base)
        trainer = quiet(make_trainer(config, study.prepared.rows, model, study.tokenizer, Path(folder)))
        # no limit on epochs: a pilot is there to show what its mix does, as it is
        stream = steer_static(trainer, Mix(job["mix"]), Draws(unit=job["unit"], seed=config.train.seed))
        before = _target_losses(trainer.model, study)
        trainer.train()
        after = _target_losses(trainer.model, study)
    tokens = {name: spent[1] for name, spent in stream.spent(config.train.steps).items()}
    seconds = time.perf_counter() - start
    return {"before": before, "after": after, "steps": config.train.steps, "tokens": tokens, "seconds": seconds}


def _short(config: RunConfig, job: Mapping[str, Any]) -> RunConfig:
    """The run's settings for as many steps as a pilot has; its schedule ends where the pilot does."""
    train = dataclasses.replace(config.train, steps=job["steps"], warmup_steps=job["warmup_steps"], workers=0)
    # any policy: where rows are packed, each source is packed by itself
    return dataclasses.replace(config, train=train, mix=MixConfig(policy="static", unit=job["unit"]))


def _target_losses(model: Any, study: Study) -> dict[str, float]:
    found = {}
    for ability, rows in study.prepared.targets.items():
        losses = query_losses(model, rows, study.pad_id)
        tokens = torch.tensor([row.num_supervised for row in rows], dtype=torch.float64)
        found[ability] = float((losses * tokens).sum() / tokens.sum())  # as the books have it: by token
    return found


@functools.lru_cache(maxsize=1)
def _study(written: str, root: str | None) -> Study:
    """Read a run file's data and base model, once a process."""
    config, place = parse_config(json.loads(written)), None if root is None else Path(root)
    model, tokenizer = load_model(config.model, place)
    return Study(config, prepare(config, tokenizer, place), model, tokenizer, place)


@dataclass(frozen=True, eq=False)
class Ground:
    """What a plan knows of a run before its pilots: what its sources hold, and how it draws from them.

    items {source: rows, or packed lines}; tokens {source: supervised tokens}. digest names all that pilots depend on
    but their mix: settings, rows, targets, the base model's weights (its name alone where it is of the hub).
    """

    config: RunConfig
    root: Path | None
    items: dict[str, int]
    tokens: dict[str, int]
    digest: str

    @classmethod
    def of(cls, config: RunConfig, root: Path | None) -> Ground:
        """Read a run file's data; a source of which no row is left is refused."""
        root = None if root is None else root.resolve()
        tokenizer = load_model(config.model, root)[1]
        prepared = prepare(config, tokenizer, root)
        own: dict[str, list[Row]] = {name: [] for name in config.sources}
        for row in prepared.rows:
            own[row.source].append(row)
        empty = [name for name, rows in own.items() if not rows]
        if empty:
            raise MixError(
                f"source {empty[0]!r} has no row to draw (over train.max_length, {config.train.max_length} tokens?): "
                f"raise train.max_length, set train.over_long to truncate, or leave the source out."
            )
        train = config.train
        digest = hashlib.sha256(json.dumps([_told(config), _weights(config, root)], sort_keys=True).encode())
        for rows in (prepared.rows, *prepared.targets.values()):
            for row in rows:
                digest.update(json.dumps([row.id, row.source, row.input_ids, row.labels]).encode())
        return cls(
            config,
            root,
            {
                name: len(pack(rows, train.max_length, seed=train.seed)) if train.packing else len(rows)
                for name, rows in own.items()
            },
            {name: sum(row.num_supervised for row in rows) for name, rows in own.items()},
            digest.hexdigest(),
        )

    @property
    def sources(self) -> list[str]:
        return list(self.items)

    @property
    def sizes(self) -> list[float]:
        """The sources' sizes [K] in what the run's shares are counted in."""
        counted = self.tokens if self.config.mix.unit == "tokens" else self.items
        return [float(size) for size in counted.values()]

    def most(self) -> list[float]:
        """The largest share of each source [K] that the whole run can give it within `mix.max_epochs`.

        epochs * size / what the run draws, with items of the mean size: a mix of longer ones reaches the limit a
        little sooner, and the run's stream holds it.
        """
        epochs, train = self.config.mix.max_epochs, self.config.train
        if epochs is None:
            return [1.0] * len(self.items)
        drawn = train.steps * train.batch_size * train.accumulation
        in_all = drawn * sum(self.sizes) / sum(self.items.values())
        most = [min(1.0, epochs * size / in_all) for size in self.sizes]
        if sum(most) < 1:
            raise MixError(
                f"mix.max_epochs {epochs:g} of all {sum(self.items.values())} items of the sources are fewer than the "
                f"{drawn} that the run draws, so there is no mix to choose: raise mix.max_epochs, or take fewer steps."
            )
        return most

    def jobs(self, mixes: Array, share: float) -> dict[str, dict[str, Any]]:
        """One job for each of mixes [n, K], of `share` of the run's steps."""
        train = self.config.train
        return {
            f"pilot-{number:03d}": {
                "config": _told(self.config),
                "root": None if self.root is None else str(self.root),
                "mix": named(self.sources, mix),
                "steps": max(1, round(share * train.steps)),
                "warmup_steps": round(share * train.warmup_steps),
                "unit": self.config.mix.unit,
                "digest": self.digest,
            }
            for number, mix in enumerate(mixes)
        }


def _told(config: RunConfig) -> dict[str, Any]:
    """The part of a run file that pilots follow: no books, no policy, no resolver, no folder."""
    told = config.as_dict()
    return {key: told[key] for key in ("model", "sources", "targets", "train")} | {"out": "-"}


def _weights(config: RunConfig, root: Path | None) -> str | None:
    base = next((place for place in model_places(config.model, root) if place.is_dir()), None)
    return None if base is None else FinishedRun(out=base, config=config, root=root).digest(base)
