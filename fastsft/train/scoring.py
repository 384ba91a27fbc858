"""A method of scoring made ready on a finished run: what it can't do said before a model is loaded, then fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsft.attribution.methods import Method, Moments
from fastsft.attribution.methods.in_run import InRun
from fastsft.attribution.methods.registry import Entry, entry, make
from fastsft.data import Row
from fastsft.train.config import ConfigError
from fastsft.train.finished import FinishedRun
from fastsft.train.history import batches_of, initial, read_weights, schedule_of


def plainly(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Call what refuses bad settings by a ValueError before it computes anything; for a user it is a ConfigError."""
    try:
        return call(*given, **named)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def places_of(run: FinishedRun, known: Entry, method: str, checkpoint: int | str) -> list[Path]:
    """The folders of the checkpoints that the method will read."""
    last = run.checkpoint()  # said first where there is none
    if checkpoint != "all":
        one = run.checkpoint(checkpoint)
        if known.reads == "start" or (method == "in_run" and one != last):
            raise ConfigError(f"{method} looks at the whole run, so it can't be asked at {one.name}: take 'all'.")
        return [] if known.reads == "none" else [one]
    every = [run.checkpoint(step) for step in run.steps]
    return {"every": every, "last": [last], "start": [], "none": []}[known.reads]


def check_method(
    run: FinishedRun,
    method: str,
    settings: Mapping[str, Any],
    places: Sequence[Path],
    *,
    names: list[str],
    tokens: bool,
) -> None:
    """Refuse what would be refused later, after the model was loaded."""
    known = entry(method)
    if tokens and not known.tokens:
        raise ConfigError(f"{method} scores whole samples only: ask without tokens, or take ekfac or grad_dot.")
    plainly(make, method, decode=str, run_dir=run.out, moments=(), schedule=(), **settings)
    if "schedule" in known.needs:
        batches_of(run)
        initial(run)
    if "moments" in known.needs:
        for place in places:
            run.check_moments(place)
    if "run_dir" in known.needs:
        plainly(InRun(run.out).is_booked, names)


def fitted(
    run: FinishedRun, method: str, model: Any, rows: Sequence[Row], places: Sequence[Path], context: Mapping[str, Any]
) -> Method:
    """Make the method, and show it the run's checkpoints and samples."""
    known = entry(method)
    kept = {checkpoint.name: checkpoint for checkpoint in run.checkpoints()}
    checkpoints = [kept[place.name] for place in places]
    given: dict[str, Any] = {"run_dir": run.out, **context}
    moments: list[Moments] | None = None
    if places and ("moments" in known.needs or (method == "in_run" and run.config.train.optimizer == "adamw")):
        moments = [run.moments(model, place) for place in places]
        given["moments"] = moments
    if "schedule" in known.needs:
        given["schedule"] = schedule_of(run, model, rows)
        given["final"] = read_weights(run.checkpoint())
        checkpoints = [initial(run)]
    return plainly(make, method, **given).fit(model, checkpoints, rows, moments)


def decoder(tokenizer: Any) -> Callable[[Row], str]:
    """A row as text, special tokens left out."""
    return lambda row: tokenizer.decode(row.input_ids, skip_special_tokens=True)
