"""Is a mixing policy any good? `python -m benchmarks.system.mixing --setting worlds --seeds 5 --out FILE`.

Races policies and conflict resolvers (mixing_arms.py) against static mixes: uniform, proportional, the best of a
lattice (the oracle), and one predicted from short pilots. All arms of a seed see the same data, model and number of
supervised tokens, at a constant rate after the warm-up. Settings: real, worlds (all of them), world:NAME. Everything
is kept in --work and taken up there again; with --budget no training begins that would end later.
`--table FILE...` prints what rows say.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import signed, write_rows
from benchmarks.system import mixing_search as search
from benchmarks.system.mixing_arms import ARMS, ORACLE, PREDICTED, STEERED, arm_of, check_names
from benchmarks.system.mixing_run import WORK, WORLD, sizes_of
from benchmarks.system.mixing_statistics import Result, arm_row, rounded
from benchmarks.system.mixing_worlds import WORLDS, plan_of
from benchmarks.table import mixing_details, mixing_summary
from fastsft.evaluate.budget import seconds_of
from fastsft.launch import FINISHED, launch

# of the budget: when the lattice ends, each round of the search after it, and all
_ENDS = (0.3, 0.4, 0.5, 1.0)
# rows are written anew at most so often, seconds
_EVERY = 20.0

Jobs = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Race:
    """What is raced.

    grid: parts of the oracle's lattice. selection: on how many seeds each of its mixes is tried (None: two, and one in
    the real case, which is slow). pilots: how many a seed (None: two a source). numbers: of a job, see `train` in
    mixing_run.py.
    """

    settings: tuple[str, ...]
    seeds: int = 5
    arms: tuple[str, ...] = ARMS
    grid: int = 3
    selection: int | None = None
    pilots: int | None = None
    numbers: Mapping[str, float]

    @property
    def predicts(self) -> bool:
        return any(name == PREDICTED or STEERED.get(name, {}).get("start") == PREDICTED for name in self.arms)

    def job(self, setting: str, seed: int, arm: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
        return {"setting": setting, "seed": seed, "arm": dict(arm), "numbers": {**self.numbers, "share": share}}


class Study:
    """A race under way: its jobs, stage by stage, and what their results say."""

    def __init__(self, race: Race, results: dict[str, Result]) -> None:
        self.race, self.results = race, results
        self.sizes = {setting: sizes_of(setting) for setting in race.settings}
        # those that were tried for the oracle, by name
        self.mixes: dict[str, dict[str, search.Weights]] = {setting: {} for setting in race.settings}
        self._predicted: dict[tuple[str, int], search.Weights | None] = {}

    # the jobs

    def first(self) -> Jobs:
        """What needs nothing else: uniform and its kin, then pilots, then the lattice, settings in turn."""
        race = self.race
        jobs = self._arms(["uniform"])
        if race.predicts:
            for seed in range(race.seeds):
                for setting in race.settings:
                    for at, mix in enumerate(self._pilot_mixes(setting, seed)):
                        job = race.job(setting, seed, {"mix": mix}, search.PILOT_SHARE)
                        jobs[f"{setting}/pilot {at}/{seed}"] = job
        if ORACLE in race.arms:
            lattices = {}
            for setting, sizes in self.sizes.items():
                lattices[setting] = search.lattice(list(sizes), race.grid)
            for at in range(max(map(len, lattices.values()))):
                for setting, mixes in lattices.items():
                    jobs |= self._tries(setting, mixes[at : at + 1])
        return jobs

    def refining(self, step: float) -> Jobs:
        """The mix that a surrogate of all that were tried takes for the best, and the neighbours of the best tried."""
        jobs: Jobs = {}
        for setting, sizes in self.sizes.items():
            best = self.best(setting)
            if ORACLE in self.race.arms and best is not None:
                tried = [(mix, self._tried(setting, name)) for name, mix in self.mixes[setting].items()]
                told = [
                    (mix, search.validation(runs)) for mix, runs in tried if len(runs) == len(self._selection(setting))
                ]
                guess = search.predict(sizes, told, strength=0.0)
                jobs |= self._tries(setting, [*([] if guess is None else [guess]), *search.neighbours(best, step)])
        return jobs

    def last(self) -> Jobs:
        """Every arm on every seed, most important first."""
        return self._arms(self.race.arms)

    def _tries(self, setting: str, mixes: Sequence[search.Weights]) -> Jobs:
        jobs = {}
        for mix in mixes:
            name = search.name_of(mix)
            self.mixes[setting][name] = mix
            for seed in self._selection(setting):
                jobs[f"{setting}/mix {name}/{seed}"] = self.race.job(setting, seed, {"mix": mix})
        return jobs

    def _selection(self, setting: str) -> range:
        number = self.race.selection or (1 if setting == "real" else 2)
        return range(search.FIRST_SELECTION, search.FIRST_SELECTION + number)

    def _arms(self, names: Sequence[str]) -> Jobs:
        jobs = {}
        for name in names:
            for seed in range(self.race.seeds):
                for setting, sizes in self.sizes.items():
                    if name == ORACLE:
                        best = self.best(setting)
                        arm = None if best is None else {"mix": best}
                    else:
                        arm = arm_of(name, sizes, self.predicted(setting, seed) if self._waits(name) else None)
                    if arm is not None:
                        jobs[f"{setting}/{self._id(setting, name)}/{seed}"] = self.race.job(setting, seed, arm)
        return jobs

    def _id(self, setting: str, name: str) -> str:
        """What an arm's runs are kept under: the oracle's under its mix, for a longer search may find another."""
        best = self.best(setting) if name == ORACLE else None
        return name if best is None else f"mix {search.name_of(best)}"

    def _waits(self, name: str) -> bool:
        return name in (ORACLE, PREDICTED) or STEERED.get(name, {}).get("start") == PREDICTED

    def _pilot_mixes(self, setting: str, seed: int) -> list[search.Weights]:
        sizes = self.sizes[setting]
        return search.pilot_mixes(sizes, self.race.pilots or 2 * len(sizes), seed)

    # what results say

    def runs(self, setting: str, name: str, seeds: Sequence[int]) -> dict[int, Result]:
        """The finished runs of an arm, or of a mix that was tried, by seed."""
        ids = {seed: f"{setting}/{name}/{seed}" for seed in seeds}
        return {seed: self.results[id] for seed, id in ids.items() if id in self.results}

    def best(self, setting: str) -> search.Weights | None:
        """The best mix that was tried so far."""
        found = search.best_of({name: self._tried(setting, name) for name in self.mixes[setting]})
        return None if found is None else self.mixes[setting][found]

    def _tried(self, setting: str, name: str) -> dict[int, Result]:
        return self.runs(setting, f"mix {name}", self._selection(setting))

    def pilots(self, setting: str, seed: int) -> list[tuple[search.Weights, Result]]:
        mixes = enumerate(self._pilot_mixes(setting, seed))
        told = [(mix, self.results.get(f"{setting}/pilot {at}/{seed}")) for at, mix in mixes]
        return [(mix, run) for mix, run in told if run is not None]

    def predicted(self, setting: str, seed: int) -> search.Weights | None:
        """The mix that a seed's pilots foretell, when all are finished."""
        if (setting, seed) not in self._predicted:
            pilots = self.pilots(setting, seed)
            if len(pilots) < len(self._pilot_mixes(setting, seed)):
                return None
            told = [(mix, run["validation"][-1]) for mix, run in pilots]
            self._predicted[setting, seed] = search.predict(self.sizes[setting], told)
        return self._predicted[setting, seed]

    def rows(self) -> list[dict[str, Any]]:
        """Benchmark rows of what is finished: one an arm."""
        found: list[dict[str, Any]] = []
        seeds = range(self.race.seeds)
        for setting in self.race.settings:
            of = {name: self.runs(setting, self._id(setting, name), seeds) for name in ARMS}
            for name, runs in of.items():
                if set(runs) & set(of["uniform"]):
                    told = arm_row(runs, of["uniform"], of[ORACLE])
                    more = self._more(setting, name, sorted(runs))
                    found.append({"op": "system.mixing", "case": setting, "provider": name, **rounded(told), **more})
        return found

    def _more(self, setting: str, name: str, seeds: Sequence[int]) -> dict[str, Any]:
        """What an arm that was searched for took, of one seed, and what it found."""
        if name == ORACLE:
            tried = [self._tried(setting, mix).values() for mix in self.mixes[setting]]
            return {"mix": self.best(setting), "search": search.cost_of([run for runs in tried for run in runs])}
        if name == PREDICTED:
            mixes = [rounded(self.predicted(setting, seed)) for seed in seeds]
            return {"mixes": mixes, "search": search.cost_of([run for _, run in self.pilots(setting, seeds[0])])}
        return {}


def race(asked: Race, work: Path, out: Path | None, *, processes: int, budget: float | None) -> list[dict[str, Any]]:
    """Run the stages of a race, and write rows while they run."""
    start, study, written = time.time(), Study(asked, finished(work)), [0.0]

    def write(*, now: bool = False) -> None:
        if out is not None and (now or time.time() - written[0] > _EVERY):
            study.results.update(finished(work))
            rows = study.rows()
            device = rows[0]["device"] if rows else "cpu"
            write_rows(out, signed(rows, device))
            written[0] = time.time()

    def say(line: str) -> None:
        print(line, flush=True)
        write()

    stages: list[Callable[[], Jobs]] = [study.first]
    stages += [functools.partial(study.refining, step) for step in search.STEPS]
    for stage, share in zip([*stages, study.last], _ENDS, strict=True):
        jobs = stage()
        deadline = None if budget is None else start + share * budget
        if jobs:
            study.results.update(launch(WORK, jobs, work, processes=processes, deadline=deadline, say=say))
    write(now=True)
    return study.rows()


def finished(work: Path) -> dict[str, Result]:
    """Read what a folder of `launch` holds so far."""
    path = work / FINISHED
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return {line["id"]: line["result"] for line in map(json.loads, lines)}


def settings_of(names: Sequence[str]) -> tuple[str, ...]:
    """Read --setting."""
    found: list[str] = []
    for name in names:
        if name.startswith(WORLD):
            plan_of(name.removeprefix(WORLD))  # an unknown one is refused
        elif name not in ("real", "worlds"):
            raise SystemExit(f"--setting must be real, worlds or {WORLD}NAME: got {name!r}.")
        found += [f"{WORLD}{world}" for world in WORLDS] if name == "worlds" else [name]
    return tuple(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--setting", nargs="+", default=["worlds"], help="real, worlds, world:NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", help="comma-separated; all unless told, and uniform always")
    parser.add_argument("--grid", type=int, default=3, help="parts of the oracle's lattice")
    parser.add_argument("--selection", type=int, help="seeds that the oracle is chosen on")
    parser.add_argument("--pilots", type=int, help="of the predicted mix, a seed; two a source unless told")
    parser.add_argument("--tokens", type=int, help="supervised tokens of a run, the setting's own unless told")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--budget", help="no training begins that would end after: 90s, 10m")
    parser.add_argument("--work", type=Path, default=Path("runs/mixing"), help="folder that keeps every training")
    parser.add_argument("--out", type=Path, help="keep the rows here, as JSON lines")
    parser.add_argument("--table", nargs="+", type=Path, help="print the tables of these rows instead")
    args = parser.parse_args()
    if args.table:
        rows = [json.loads(line) for path in args.table for line in path.read_text().splitlines()]
        print(mixing_summary(rows), mixing_details(rows), sep="\n")
        return
    arms = check_names(["uniform", *args.arms.split(",")] if args.arms else ARMS)
    asked = Race(
        settings=settings_of(args.setting),
        seeds=args.seeds,
        arms=tuple(dict.fromkeys(arms)),
        grid=args.grid,
        selection=args.selection,
        pilots=args.pilots,
        numbers={} if args.tokens is None else {"tokens": args.tokens},
    )
    budget = None if args.budget is None else seconds_of(args.budget)
    rows = race(asked, args.work, args.out, processes=args.processes, budget=budget)
    print(mixing_summary(rows), mixing_details(rows), sep="\n")


if __name__ == "__main__":
    main()
