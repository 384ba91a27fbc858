"""`fastsft search`: which stored samples would lower, and which raise, the loss on a file of queries."""

# Q queries, K sketch size, S sources

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsft.attribution.optimizer import rule_of
from fastsft.data import Row, read_source, tokenize_all
from fastsft.ops._topk_rules import MAX_K
from fastsft.record import Record
from fastsft.sketch import LayerWhitening, SketchSpec, Whitening, sketch_samples
from fastsft.sketch.passes import Loss
from fastsft.store import Found, Store, StoreError, search
from fastsft.train.attribute import WHITENING
from fastsft.train.config import ConfigError
from fastsft.train.finished import FinishedRun

MEAN = "mean of all queries"
_STEP = {None: "a plain gradient", "adam": "an Adam", "ekfac": "an EK-FAC"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a search found. Scores: positive where training on the sample lowers the query's loss."""

    store: Store
    queries: list[str]
    found: Found
    unit: str
    notes: list[str]
    # prompt and response by sample id, where the run still has them
    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def hits(self, query: int) -> dict[str, list[dict[str, Any]]]:
        """Return the most helpful samples of a query, and the most harmful."""
        helpful = [hit for hit in self.found.largest(query) if hit.score > 0]
        harmful = [hit for hit in self.found.smallest(query) if hit.score < 0]
        return {"helpful": [self._told(hit) for hit in helpful], "harmful": [self._told(hit) for hit in harmful]}

    def _told(self, hit: Any) -> dict[str, Any]:
        prompt, response = self.texts.get(hit.id, (None, None))
        return {**hit._asdict(), "prompt": prompt, "response": response}

    def by_source(self, query: int) -> dict[str, dict[str, float | int | None]]:
        """Return number, sum and mean of the scores of each source's rows."""
        found = self.found
        assert found.sums is not None and found.counts is not None  # searched with by_source  # noqa: PT018
        names = self.store.sources
        counts, sums = found.counts.tolist(), found.sums[query].tolist()
        return {
            name: {"rows": rows, "sum": total, "mean": total / rows if rows else None}
            for name, rows, total in zip(names, counts, sums, strict=True)
        }

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, of types that JSON knows."""
        answers = [
            {"query": name, **self.hits(number), "by_source": self.by_source(number)}
            for number, name in enumerate(self.queries)
        ]
        return {
            "store": str(self.store.path),
            "rows": len(self.store),
            "unit": self.unit,
            "notes": self.notes,
            "answers": answers,
        }


def search_store(
    store: str | Path,
    queries: str | Path,
    *,
    top: int = 20,
    each: bool = False,
    run: str | Path | None = None,
    root: str | Path | None = None,
) -> Answer:
    """Sketch a file of queries as a store's samples were, and search the store.

    queries: rows {prompt, response} or {messages}, in any file that `fastsft.data.read_source` knows. The answer has
    the mean of all queries, and with `each` every query after it. The model is the store's: that of its run directory
    (`run`, where it was moved) at its checkpoint, whose digest must be the store's. A store that was written in
    training is asked at the run's last checkpoint.

    A score is g_q . P g_i: positive where training on sample i lowers the query's loss.
    """
    if not 1 <= top <= MAX_K:
        raise ConfigError(f"`top` must be from 1 to {MAX_K}, which is what one scan keeps: got {top}.")
    opened = Store.open(store)
    finished, checkpoint = _run_of(opened, run, None if root is None else Path(root))
    model, tokenizer, pad_id = finished.load(checkpoint)
    place = Path(queries)
    samples = read_source("queries", place.resolve() if place.exists() else place, root=finished.root)
    cut = tokenize_all(samples, tokenizer, max_length=finished.config.train.max_length, over_long="truncate")
    notes = [f"asked at {checkpoint.name} of {finished.out}."]
    if cut.dropped or cut.truncated:
        notes.append(
            f"over {finished.config.train.max_length} tokens: {len(cut.dropped)} queries dropped, "
            f"{len(cut.truncated)} cut."
        )
    taken = _sketches(opened, finished, checkpoint, model, cut.rows, pad_id)
    mean = taken.mean(0, keepdim=True)
    found = search(opened, torch.cat([mean, taken]) if each else mean, top)
    names = [MEAN, *(row.id for row in cut.rows)] if each else [MEAN]
    answer = Answer(store=opened, queries=names, found=found, unit=unit_of(opened), notes=notes)
    texts = texts_of(finished, _ids_of(answer), notes)
    return Answer(store=opened, queries=names, found=found, unit=answer.unit, notes=notes, texts=texts)


def unit_of(store: Store) -> str:
    """Say what a score of this store is, in words."""
    spec = store.spec
    loss = {"sum": "summed", "mean": "mean"}[spec.get("loss", "mean")]
    step = f"{_STEP[spec['sketch']['precondition']]} step on the sample"
    if spec["taken"] == "in training":
        step = f"the sample's share of {_STEP[spec['sketch']['precondition']]} step of the run"
    return f"nats that {step} takes off the query's {loss} loss, per unit of learning rate (first order)"


def _run_of(store: Store, run: str | Path | None, root: Path | None) -> tuple[FinishedRun, Path]:
    """Find the run and the checkpoint a store was made from, and check that its weights are the same ones."""
    about = store.about
    if "taken" not in store.spec:
        raise StoreError(
            f"{store.path} was not written by `fastsft attribute` or in training: sketch the queries as its rows were, "
            f"and call fastsft.store.search."
        )
    if run is None and "run" not in about:
        raise StoreError(
            f"{store.path} does not say which run it is of (fastsft.attribute_model wrote it): sketch the queries by "
            f"fastsft.sketch.sketch_samples with its spec and {WHITENING}, and call fastsft.store.search."
        )
    place = Path(run) if run is not None else Path(os.path.normpath(store.path / about["run"]))
    if not place.is_dir():
        raise StoreError(f"{place}, the run that {store.path} is of, is not there: say where it is now with `run`.")
    finished = FinishedRun.open(place, root=root)
    if "checkpoint" not in about:  # written in training
        return finished, finished.checkpoint("last")
    checkpoint = finished.checkpoint(about["checkpoint"].removeprefix("checkpoint-"))
    if finished.digest(checkpoint) != store.model["digest"]:
        raise StoreError(
            f"the weights in {checkpoint} are not those that {store.path} was made from (their digests differ): name "
            f"the right run with `run`, or write the store again."
        )
    return finished, checkpoint


def _sketches(store: Store, run: FinishedRun, checkpoint: Path, model: Any, rows: Sequence[Row], pad_id: int) -> Tensor:
    """Sketch the queries [Q, K] with the store's spec and whitening, in their order."""
    spec, loss = SketchSpec.from_dict(store.spec["sketch"]), store.spec.get("loss", "mean")
    whitening: Whitening | None = None
    if store.spec["taken"] == "in training":
        # also for SGD, whose scale is 1: the map leaves out the layers that the store's rows are without
        spec = replace(spec, precondition="adam")
        whitening = _scale_of(run.optimizer(model, checkpoint), model, store.about["layers"])
    elif spec.precondition is not None:
        whitening = Whitening.load(store.file(WHITENING))
    return sketches_of(model, rows, spec, whitening, loss, pad_id)


def sketches_of(
    model: Any, rows: Sequence[Row], spec: SketchSpec, whitening: Whitening | None, loss: Loss, pad_id: int
) -> Tensor:
    sketches: dict[str, Tensor] = {}
    for batch in sketch_samples(model, rows, spec, whitening=whitening, loss=loss, pad_id=pad_id):
        sketches |= dict(zip(batch.ids, batch.sketches, strict=True))
    return torch.stack([sketches[row.id] for row in rows])


def _scale_of(optimizer: torch.optim.Optimizer, model: Any, layers: Sequence[str]) -> Whitening:
    """The square root of the optimizer's elementwise scale, zero on layers that the store does not hold."""
    rule, groups = rule_of(optimizer), {p: group for group in optimizer.param_groups for p in group["params"]}
    maps = {}
    for name, parameter in model.named_parameters():
        scale = rule.scale(parameter, groups[parameter]) if name in layers else None
        if parameter.requires_grad and parameter.dim() == 2:
            maps[name] = LayerWhitening(torch.zeros_like(parameter) if scale is None else scale.sqrt())
    return Whitening("adam", maps)


def _ids_of(answer: Answer) -> set[str]:
    hits = [answer.hits(number) for number in range(len(answer.queries))]
    return {hit["id"] for sides in hits for side in sides.values() for hit in side}


def texts_of(run: FinishedRun, ids: set[str], notes: list[str]) -> dict[str, tuple[str, str]]:
    """Look up samples in the run's record, and those it never drew in its sources."""
    table = Record(run.out).samples().to_pylist()
    texts = {row["id"]: (row["prompt"], row["response"]) for row in table if row["id"] in ids}
    if ids <= set(texts):
        return texts
    for name, source in run.config.sources.items():
        try:
            found = read_source(
                name, source.path, ability=source.ability, limit=source.limit, where=source.where, root=run.root
            )
        except ValueError as error:
            notes.append(f"texts of samples that were never drawn are left out: {error}")
            break
        texts |= {sample.id: (sample.prompt, sample.response) for sample in found if sample.id in ids}
    return texts
