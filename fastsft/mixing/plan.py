"""A starting mix that is predicted from pilots: short trainings on designed mixes, surrogates fitted, their minimum.

    plan = plan_mix("run.yaml", pilots=16, budget="30m")   # under `if __name__ == "__main__":`, it spawns processes
    print(plan)                                            # then `mix: {policy: align, start: runs/a-mix/mix.yaml}`

Pilots are judged by the run file's `targets`, and the mix is chosen by them: measure what the final run reached on
other rows. What is forecast are losses at the end of a pilot, not of the run: repeated epochs, which harm late, are
hardly seen by pilots.
"""

# K sources, n pilots

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastsft.evaluate.budget import seconds_of
from fastsft.evaluate.table import plain
from fastsft.launch import launch
from fastsft.mixing.core import check_number, vector
from fastsft.mixing.design import design
from fastsft.mixing.forecast import PRIORS, Choice, Forecast, Range, check_pilots, choose, weights_of
from fastsft.mixing.law import LEVEL, MEMBERS
from fastsft.mixing.pilots import WORK, Ground
from fastsft.record import versions, write_text
from fastsft.tasks import MixError
from fastsft.train.config import RunConfig, load_config

MIX, PLAN = "mix.yaml", "plan.json"


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """One pilot: its mix, the targets' losses before and after it, nats per response token, and its seconds."""

    id: str
    weights: Mapping[str, float]
    before: Mapping[str, float]
    after: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The mix to start with and what it rests on. `about`: sizes, settings, versions."""

    out: str
    choice: Choice
    pilots: list[Pilot]
    about: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> Mapping[str, float]:
        return self.choice.chosen.weights

    @property
    def predicted(self) -> Mapping[str, float]:
        return self.choice.chosen.losses

    @property
    def interval(self) -> Mapping[str, Range]:
        return self.choice.chosen.intervals

    def lines(self) -> list[str]:
        """Tell it as two tables and a sentence."""
        choice, about = self.choice, self.about
        three = {"chosen": choice.chosen, "uniform": choice.uniform, "proportional": choice.proportional}
        wide = max(map(len, ["source", "ability", "mean", *self.weights, *self.predicted]))
        found = [
            f"{self.out}: {len(self.pilots)} pilots of {about['steps']} steps ({about['share']:.0%} of the run)",
            f"{'source':{wide}}  " + "  ".join(f"{name:>12}" for name in [*three, "at most"]),
        ]
        for source, most in about["most"].items():
            row = [*(each.weights[source] for each in three.values()), most]
            found.append(f"{source:{wide}}  " + "  ".join(f"{share:12.3f}" for share in row))
        found.append(
            f"{'ability':{wide}}  "
            + "  ".join(f"{name:23}" for name in three)
            + "  error left out: "
            + ", ".join(MEMBERS)
        )
        for ability in self.predicted:
            told = "  ".join(f"{_text(each.losses[ability], each.intervals[ability]):23}" for each in three.values())
            errors = ", ".join(f"{error:.4f}" for error in choice.errors[ability].values())
            found.append(f"{ability:{wide}}  {told}  {errors}")
        told = "  ".join(f"{_text(each.mean, each.mean_interval):23}" for each in three.values())
        found.append(f"{'mean':{wide}}  {told}")
        low, high = choice.gain_interval
        return [
            *found,
            f"losses: nats a response token at the end of a pilot, with the {LEVEL:.0%} interval of one more pilot; "
            f"{max(0.0, choice.explained):.0%} of the pilots' variance is foretold without them",
            f"gain over uniform: {choice.gain:+.4f} [{low:+.4f}, {high:+.4f}], standard error {choice.gain_error:.4f}",
            *self.notes,
            choice.verdict,
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, of types that JSON knows."""
        return {**plain(self), "verdict": self.choice.verdict}

    def write(self) -> Path:
        """Write OUT/plan.json, all of it, and OUT/mix.yaml, which a run file's `mix.start` can name."""
        out, choice = Path(self.out), self.choice
        write_text(out / PLAN, json.dumps(self.as_dict(), ensure_ascii=False, indent=1) + "\n")
        told = {
            "weights": dict(self.weights),
            "predicted": _rounded(choice.chosen),
            "uniform": _rounded(choice.uniform),
            "proportional": _rounded(choice.proportional),
            "gain_over_uniform": {
                "nats": _digits(choice.gain),
                "standard_error": _digits(choice.gain_error),
                "interval": [_digits(end) for end in choice.gain_interval],
            },
            "verdict": choice.verdict,
        }
        return write_text(out / MIX, yaml.safe_dump(plain(told), sort_keys=False, width=1000))


def plan_mix(
    config: RunConfig | str | Path,
    *,
    root: str | Path | None = None,
    out: str | Path | None = None,
    pilots: int = 16,
    share: float = 0.25,
    processes: int = 2,
    threads: int = 1,
    budget: str | float | None = None,
    seed: int = 0,
    priorities: Mapping[str, float] | None = None,
    prior: str = "uniform",
    strength: float = 0.1,
    say: Callable[[str], None] = print,
) -> Plan:
    """Train pilots of a run file's run, fit what its targets' losses make of the mix, and write the best one down.

    pilots: how many, K + 2 at least for K sources, better twice that. share: of the run's steps. budget: wall time,
    "90s", "30m" or "2h", after which no pilot is begun; what finished is used. priorities {ability: weight}: of the
    mean loss that is minimised; one not named weighs 1. prior, strength: the mix that the result is held to, the more
    the noisier the pilots are (see `best_mix`). seed: of the design; pilots train with the run file's own.
    Of the run file's `mix`, `unit`, `max_epochs` and `floor` hold; its policy and resolver play no part.
    out (the run's own with "-mix" unless told) takes mix.yaml, plan.json, and finished.jsonl, from which a later call
    takes up pilots; it may ask for more. Spawns processes: in a script, call it under `if __name__ == "__main__":`.
    """
    config, home = _read(config), None if root is None else Path(root)
    K = len(config.sources)
    _check(config, pilots, share, seed, prior)
    check_number("strength", strength, low=0)
    weights_of(list(config.targets), priorities)
    deadline = None if budget is None else time.time() + seconds_of(budget)
    ground = Ground.of(config, home)
    least, most = check_number("floor", config.mix.settings.get("floor", 0.0), low=0), ground.most()
    mixes = design(ground.sizes, pilots, seed=seed, least=least, most=most)
    place = _place(config, home) if out is None else Path(out)
    jobs = ground.jobs(mixes, share)
    results = launch(WORK, jobs, place, processes=processes, threads=threads, deadline=deadline, say=say)
    done, notes = _pilots(jobs, results)
    if len(done) < K + 2:
        raise MixError(
            f"{len(done)} of {pilots} pilots are usable, and {K} sources need {K + 2} at least. "
            + " ".join([*notes, f"Call again with more time: finished ones are kept in {place}."])
        )
    choice = choose(
        np.array([vector(ground.sources, pilot.weights) for pilot in done]),
        {ability: [pilot.after[ability] for pilot in done] for ability in config.targets},
        sizes=dict(zip(ground.sources, ground.sizes, strict=True)),
        priorities=priorities,
        prior=prior,
        strength=strength,
        least=least,
        most=most,
        seed=seed,
    )
    about = {
        "steps": next(iter(jobs.values()))["steps"],
        "share": share,
        "asked": pilots,
        "most": dict(zip(ground.sources, most, strict=True)),
        "least": least,
        "unit": config.mix.unit,
        "prior": prior,
        "strength": strength,
        "level": LEVEL,
        "seed": seed,
        "run_seed": config.train.seed,
        "digest": ground.digest,
        "versions": versions(),
    }
    plan = Plan(out=str(place), choice=choice, pilots=done, about=about, notes=notes)
    plan.write()
    return plan


def _read(config: RunConfig | str | Path) -> RunConfig:
    return config if isinstance(config, RunConfig) else load_config(config)


def _check(config: RunConfig, pilots: int, share: float, seed: int, prior: str) -> None:
    K = len(config.sources)
    if K < 2:
        raise MixError(f"the run file has one source, {next(iter(config.sources))!r}: there is nothing to mix.")
    check_pilots(pilots, K)
    if not 0 < share <= 1:
        raise MixError(f"`share` of the run's steps must be above 0 and at most 1: got {share}.")
    if seed < 0:
        raise MixError(f"`seed` must be 0 or more: got {seed}.")
    if prior not in PRIORS:
        raise MixError(f"`prior` must be one of {', '.join(PRIORS)}: got {prior!r}.")


def _place(config: RunConfig, root: Path | None) -> Path:
    """Beside the run's folder: a run that is deleted and repeated keeps its pilots."""
    out = Path(config.out) if root is None else root / config.out  # an absolute one stands for itself
    return out.with_name(f"{out.name}-mix")


def _pilots(jobs: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> tuple[list[Pilot], list[str]]:
    """The pilots that can be fitted, and what must be said of the others."""
    done = [
        Pilot(id=id, weights=jobs[id]["mix"], before=told["before"], after=told["after"], seconds=told["seconds"])
        for id, told in results.items()
    ]
    finite = [pilot for pilot in done if all(map(math.isfinite, pilot.after.values()))]
    notes = []
    if len(done) < len(jobs):
        notes.append(f"{len(jobs) - len(done)} of {len(jobs)} pilots did not fit before the deadline.")
    if len(finite) < len(done):
        lost = ", ".join(pilot.id for pilot in done if pilot not in finite)
        notes.append(f"Left out, for their losses are not finite: {lost}. Is train.learning_rate too high?")
    return finite, notes


def _text(value: float, ends: Range) -> str:
    return f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"


def _digits(value: float) -> float:
    return round(value, 6)


def _rounded(forecast: Forecast) -> dict[str, Any]:
    return {
        "losses": {ability: _digits(loss) for ability, loss in forecast.losses.items()},
        "intervals": {ability: [_digits(end) for end in ends] for ability, ends in forecast.intervals.items()},
        "mean": _digits(forecast.mean),
    }
