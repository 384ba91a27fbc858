"""Index builds against length-sorted training steps, and what whitening adds in time and memory."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.aims import Measured, aim, race, spread
from benchmarks.harness import rounds
from benchmarks.memory import extra_peak
from benchmarks.system.index_build import build, builder, rows_of
from benchmarks.system.index_case import BATCH_TOKENS, IndexCase, batches, load_case, load_model, pad, training_step
from benchmarks.system.index_data import write_case
from fastsft.sketch import AdamWhitener, SketchSpec, Whitening, fit_whitening

ROWS = 128
BUILT = "index build, {}, SJLT 4096 into a bf16 store"
WHITENED = (("full", "adam"), ("lora", "adam"), ("lora", "ekfac"))


@functools.cache
def case_folder() -> tuple[tempfile.TemporaryDirectory[str], str]:
    """The case on disk, for as long as the process lives, and the name of its material."""
    place = tempfile.TemporaryDirectory()
    return place, write_case(Path(place.name), ROWS)


def case_of(method: str) -> tuple[IndexCase, dict[str, object]]:
    place, name = case_folder()
    case = load_case(Path(place.name), method)
    return case, {"shape": case.shape, "model": name}


def fit(case: IndexCase, model: Any, precondition: str) -> Whitening:
    """Fit what the rows below whiten with: second moments after four AdamW steps, or EK-FAC on all the rows."""
    if precondition == "ekfac":
        spec = SketchSpec(precondition="ekfac")
        return fit_whitening(model, rows_of(case), spec, max_tokens=BATCH_TOKENS, pad_id=case.pad_id)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    for batch in batches(case.rows, "random")[:4]:
        model(**pad([case.rows[number] for number in batch], case.pad_id), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return AdamWhitener.from_optimizer(model, optimizer)


def index(method: str) -> Measured:
    case, facts = case_of(method)
    with tempfile.TemporaryDirectory() as place:
        ours = builder(case, SketchSpec(size=4096), Path(place))
        return race(ours, training_step(case, "sorted"), repeats=4, facts=facts)


def whitened(method: str, precondition: str) -> Measured:
    """Fitting is not in the ratio; `fit_ratio` says what it took, in builds without whitening."""
    case, facts = case_of(method)
    whitening = fit(case, load_model(case), precondition)
    with tempfile.TemporaryDirectory() as place:
        ours = builder(case, SketchSpec(precondition=precondition), Path(place) / "ours", whitening)
        plain = builder(case, SketchSpec(), Path(place) / "plain")
        if precondition == "ekfac":
            model = load_model(case)
            times = rounds({"fit": lambda: fit(case, model, "ekfac"), "plain": plain}, repeats=2, warmup=0)
            facts |= {"fit_ratio": round(min(times["fit"]) / min(times["plain"]), 3)}
        return race(ours, plain, repeats=4, facts=facts)


def prepare(folder: str, method: str, precondition: str, place: str) -> Callable[[], object]:
    """What `memory.extra_peak` runs in a child; the fit itself (EK-FAC) is part of the work that is watched."""
    case = load_case(Path(folder), method)
    model, rows = load_model(case), rows_of(case)
    ready = fit(case, model, "adam") if precondition == "adam" else None

    def run() -> None:
        whitening = fit(case, model, "ekfac") if precondition == "ekfac" else ready
        build(model, rows, case.pad_id, SketchSpec(precondition=precondition or None), Path(place), whitening)

    return run


def memory(method: str, precondition: str) -> Measured:
    """MiB of extra peak resident memory beyond the build without whitening, each in a process of its own."""
    case, facts = case_of(method)
    found = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as place:
            peaks = [
                extra_peak(
                    "benchmarks.aims.index:prepare",
                    folder=str(case.folder),
                    method=method,
                    precondition=each,
                    place=f"{place}/{each or 'plain'}",
                )
                for each in (precondition, "")
            ]
        found.append((peaks[0] - peaks[1]) / 2**20)
    return spread(found, {**facts, "build_extra_peak_mib": round(peaks[1] / 2**20, 1)})


aim("index_full", what=BUILT.format("full weights"), against="a length-sorted training step", at_most=0.75)(
    functools.partial(index, "full")
)
aim("index_lora", what=BUILT.format("LoRA r=8"), against="a length-sorted training step", at_most=0.95)(
    functools.partial(index, "lora")
)
for method, precondition in WHITENED:
    aim(
        f"index_{method}_{precondition}",
        what=f"index build whitened by {precondition}, {method}",
        against="the build without",
        at_most=1.15,
    )(functools.partial(whitened, method, precondition))
    aim(
        f"index_{method}_{precondition}_memory",
        what=f"extra peak memory of whitening by {precondition}, {method}",
        against="the build without, subtracted",
        at_most=100.0,
        unit="MiB",
    )(functools.partial(memory, method, precondition))
