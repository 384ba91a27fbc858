"""`fastsft attribute`: the sketches of every sample at a checkpoint of a finished run, in a store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fastsft.data import Row
from fastsft.sketch import AdamWhitener, SketchSpec, Whitening, fit_whitening, sketch_samples
from fastsft.sketch.passes import Loss
from fastsft.store import Store, StoreError, StoreWriter, is_store, rank_folder
from fastsft.store.manifest import Settings
from fastsft.train.config import ConfigError
from fastsft.train.finished import FinishedRun
from fastsft.train.loop import prepare

WHITENING = "whitening.safetensors"
UNIT = "gradient of the sample's loss, times the square root of the preconditioner"


def attribute(
    run_dir: str | Path,
    *,
    checkpoint: int | str = "last",
    out: str | Path | None = None,
    format: str = "int8",
    size: int = 4096,
    precondition: str | None = "ekfac",
    loss: Loss = "sum",
    packing: bool = False,
    max_tokens: int = 4096,
    resume: bool = False,
    seed: int = 0,
    damping: float = 0.1,
    root: str | Path | None = None,
) -> Store:
    """Sketch every sample of a run at one of its checkpoints into a store, and open it.

    checkpoint: a step, or "last". out: RUN/store/checkpoint-STEP unless told. precondition: "ekfac", fitted on the
    run's samples; "adam", the checkpoint's own second moments; or None, which ranked samples worse than a search for
    common words did (one small LoRA run: LDS 0.37 against 0.46, EK-FAC 0.58). resume: go on after the last whole shard.
    root: where the run file's relative paths start, if not where they did.

    Under torchrun each process writes its share of the samples to rank000, rank001, ... of `out`, and gets its own
    part back; `Store.open(out)` opens all.
    """
    run = FinishedRun.open(run_dir, root=None if root is None else Path(root))
    spec = _check_settings(run, size, seed, precondition, max_tokens, damping)
    place = run.checkpoint(checkpoint)
    folder = run.out / "store" / place.name if out is None else Path(out)
    rank, world = _ranks()
    _check_folder(folder, rank, world, resume)  # before anything is loaded
    model, tokenizer, pad_id = run.load(place)
    rows = prepare(run.config, tokenizer, run.root).rows
    whitening = None
    if precondition == "adam":
        whitening = AdamWhitener.from_optimizer(model, run.optimizer(model, place))
    settings = run.config.train
    return attribute_model(
        model,
        rows,
        out=folder,
        spec=spec,
        name=run.config.model,
        digest=run.digest(place),
        whitening=whitening,
        loss=loss,
        packing=packing,
        max_tokens=max_tokens,
        pad_id=pad_id,
        format=format,
        resume=resume,
        damping=damping,
        about={
            "run": _path_from(folder, run.out),
            "checkpoint": place.name,
            "method": settings.method,
            "learning_rate": settings.learning_rate,
        },
        rank=rank,
        world=world,
    )


def attribute_model(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    out: str | Path,
    spec: SketchSpec,
    name: str = "",
    digest: str | None = None,
    whitening: Whitening | None = None,
    loss: Loss = "sum",
    packing: bool = False,
    max_tokens: int = 4096,
    pad_id: int = 0,
    format: str = "int8",
    resume: bool = False,
    damping: float = 0.1,
    about: Mapping[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
    shard_rows: int = 1024,
) -> Store:
    """Sketch every row's gradient at the weights that `model` has now into a store, and open it.

    The trainable linear layers are followed: freeze the others first. name, digest: what the store says of the model.
    whitening: what the spec's precondition names; EK-FAC is fitted on `rows` where it is not given. It is saved with
    the store. rank of world: this process's share is rows[rank::world], in out/rank000, ...; the first must have
    begun (it fits the whitening). shard_rows: what a kill may cost.
    """
    out = Path(out)
    _check_folder(out, rank, world, resume)
    folder = out if world == 1 else rank_folder(out, rank)
    batching: dict[str, Any] = {"loss": loss, "max_tokens": max_tokens, "packing": packing, "pad_id": pad_id}
    if whitening is not None or spec.precondition == "ekfac":
        whitening = _shared(
            whitening,
            lambda: fit_whitening(model, rows, spec, damping=damping, **batching),
            folder=folder,
            first=rank_folder(out, 0) if rank else None,
            resume=resume,
            damping=damping,
        )
    settings: Settings = {
        "spec": {
            "taken": "at a checkpoint",
            "sketch": spec.as_dict(),
            "loss": loss,
            "whitening": None if whitening is None else whitening.digest,
        },
        "size": spec.size,
        "format": format,
        "sources": sorted({row.source for row in rows}),
        "model": {"name": name, "digest": digest},
        "about": {"unit": UNIT, "packing": packing, "ranks": world, **(about or {})},
        "shard_rows": shard_rows,
    }
    writer = (StoreWriter.resume if resume and is_store(folder) else StoreWriter.create)(folder, **settings)
    with writer, tqdm(total=len(rows[rank::world]), initial=len(writer), desc="sketches", disable=rank > 0) as bar:
        if whitening is not None:
            writer.register(WHITENING)
        mine = sketch_samples(model, rows[rank::world], spec, whitening=whitening, skip=writer.ids, **batching)
        for batch in mine:
            writer.append(batch.sketches, ids=batch.ids, sources=batch.sources, tokens=batch.tokens)
            bar.update(len(batch.ids))
    return Store.open(folder)


def _check_settings(
    run: FinishedRun, size: int, seed: int, precondition: str | None, max_tokens: int, damping: float
) -> SketchSpec:
    """Refuse what the parts would refuse later, after the model was loaded."""
    if max_tokens < 1 or damping <= 0:
        raise ConfigError(f"`max_tokens` and `damping` must be above 0: got {max_tokens} and {damping}.")
    if precondition == "adam" and run.config.train.optimizer != "adamw":
        raise ConfigError(
            f"{run.out} was trained with {run.config.train.optimizer}, which keeps no second moments: take "
            f"precondition 'ekfac', which needs no optimizer."
        )
    try:
        return SketchSpec(size=size, seed=seed, precondition=precondition)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _ranks() -> tuple[int, int]:
    """This process and how many there are; under torchrun they are made to know each other."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # the others wait while the first fits the whitening
        dist.init_process_group("gloo", timeout=timedelta(hours=24))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _check_folder(out: Path, rank: int, world: int, resume: bool) -> None:
    """Refuse a folder that holds a store already, or the parts of another number of processes."""
    folder = out if world == 1 else rank_folder(out, rank)
    if is_store(folder) and not resume:
        raise StoreError(
            f"{folder} holds a store already. Go on with it (resume), choose another `out`, or delete the folder."
        )
    other = rank_folder(out, 0 if world == 1 else world)
    wrong = other if is_store(other) else out if world > 1 and is_store(out) else None
    if wrong is not None:
        raise StoreError(
            f"{wrong} was written by another number of processes than {world}: start as many as then, choose another "
            f"`out`, or delete {out}."
        )


def _shared(
    given: Whitening | None,
    fit: Callable[[], Whitening],
    *,
    folder: Path,
    first: Path | None,
    resume: bool,
    damping: float,
) -> Whitening:
    """Save the whitening once, fitted where it is not given: the others copy the file of the `first` process (None: it
    is this one). Neither fitting again nor saving again need give the same bytes, and only equal ones can be compared.
    """
    path = folder / WHITENING
    if first is None and not (resume and path.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        # whole or not at all: another process may be waiting to read it
        temporary = path.with_name(f"{WHITENING}.{os.getpid()}.tmp")
        (given or fit()).save(temporary)
        os.replace(temporary, path)
    if dist.is_initialized():
        dist.barrier()
    if first is not None:
        if not (first / WHITENING).exists():
            raise StoreError(f"{first / WHITENING} is missing: let the first process begin before the others.")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(first / WHITENING, path)
    found = Whitening.load(path)
    said = found.about.get("damping", damping)
    if said != damping or (given is not None and given.digest != found.digest):
        why = (
            f"with damping={said}: got {damping}" if said != damping else "to other weights or another optimizer state"
        )
        raise StoreError(
            f"{path} was fitted {why}. Resume with what the store was begun with, or choose another `out`."
        )
    return found


def _path_from(store: Path, run: Path) -> str:
    """Say where the run is: from the store where that lies in the run, so that both can be moved together."""
    store, run = store.resolve(), run.resolve()
    return os.path.relpath(run, store) if store.is_relative_to(run) else str(run)
