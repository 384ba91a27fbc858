"""Is attribution any good? `python -m benchmarks.system.lds --setting lora --place DIR --json FILE`.

Trains the setting's run, scores its samples by every method, and sets the scores against what retraining on random
halves of the samples really did: the linear datamodelling score (LDS), with 95 % intervals, beside BM25, embeddings and
chance. The retrainings' losses are kept in benchmarks/results/lds_truth_SETTING.npz; --measure makes them anew with
`fastsft.evaluate`. --rivals DIR takes scores that `benchmarks.rivals.score`
wrote for the case that --write-case writes. Everything slow is kept in --place, and taken up there again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import ROOT, signed, write_rows
from benchmarks.system.lds_case import SETTINGS, prepared_run
from fastsft.attribution.methods.registry import entry
from fastsft.data import Row
from fastsft.evaluate.lds import lds_table
from fastsft.evaluate.measure import Plan, measure_truth
from fastsft.evaluate.table import lds_lines, verdict
from fastsft.evaluate.truth import Truth
from fastsft.ops import decode_rows
from fastsft.sketch import SketchSpec, Whitening
from fastsft.sketch.passes import Batching
from fastsft.store import Store
from fastsft.train import FinishedRun
from fastsft.train.attribute import WHITENING, attribute
from fastsft.train.query import sketches_of
from fastsft.train.scoring import decoder, fitted, places_of

RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = "ekfac"


@dataclass(frozen=True)
class Contender:
    """A method of the registry at some of the run's checkpoints: "all", "last", or a number of the first ones."""

    method: str
    checkpoints: str | int = "all"
    settings: Mapping[str, Any] = field(default_factory=dict)


CONTENDERS: dict[str, Contender] = {
    "ekfac": Contender("ekfac"),
    "bm25": Contender("bm25"),
    "random": Contender("random"),
    "embedding": Contender("embedding"),
    "length": Contender("length"),
    "loss": Contender("loss"),
    "in_run": Contender("in_run"),
    "grad_cos": Contender("grad_cos", "last"),
    "ekfac, last checkpoint": Contender("ekfac", "last"),
    "grad_dot": Contender("grad_dot", "last"),
    "less": Contender("less"),
    "tracin": Contender("tracin"),
    "adam_dot": Contender("adam_dot"),
    "ekfac, damping 0.01": Contender("ekfac", settings={"damping": 0.01}),
    "ekfac, last, true Fisher": Contender("ekfac", "last", {"fisher": "true"}),
    "datainf": Contender("datainf", "last"),
    "logra": Contender("logra", "last"),
    "trak": Contender("trak"),
}
# these ask every query at every step or sample: of the short run alone
SLOW: dict[str, Contender] = {
    "unrolled": Contender("unrolled", settings={"smooth": 1e-8}),
    "ekfac_cg, last, 2 iterations": Contender("ekfac_cg", "last", {"iterations": 2, "max_documents": 48}),
}
# a store of whitened sketches at the last checkpoint: format and size
STORES = {
    "ekfac, store 1 bit x 4096": ("1bit", 4096),
    "ekfac, store 1 bit x 32768": ("1bit", 32768),
    "ekfac, store int8 x 4096": ("int8", 4096),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A setting's run, its rows and its queries, scores kept in `place`."""

    run: FinishedRun
    plan: Plan
    place: Path
    # take every so manieth query only: what a slow method can be asked
    every: int = 1

    @functools.cached_property
    def rows(self) -> list[Row]:
        return self.plan.study.prepared.rows

    @functools.cached_property
    def queries(self) -> dict[str, list[Row]]:
        """Each query by itself."""
        return {query.name: [query.row] for query in self.plan.queries[:: self.every]}

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any, int]:
        return self.run.load(self.run.checkpoint("last"))

    def kept(self, name: str, make: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """Take scores [N, Q] from the place, or make them -> with the seconds that making them took."""
        path = self.place / "scores" / f"{name.replace(', ', '-').replace(' ', '_')}.npz"
        if self.every > 1 and path.exists():
            with np.load(path) as file:
                return torch.from_numpy(file["scores"])[:, :: self.every], float("nan")
        path = path if self.every == 1 else path.with_suffix(f".every{self.every}.npz")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            scores = make()
            np.savez_compressed(path, scores=scores.float().numpy(), seconds=time.perf_counter() - start)
        with np.load(path) as file:
            return torch.from_numpy(file["scores"]), float(file["seconds"])

    def score(self, contender: Contender) -> Tensor:
        """Score by a method of the registry -> [N, Q]."""
        model, tokenizer, pad_id = self.loaded
        known = entry(contender.method)
        places = places_of(self.run, known, contender.method, "all")
        if contender.checkpoints == "last":
            places = places[-1:]
        elif isinstance(contender.checkpoints, int):
            places = places[: contender.checkpoints]
        context = {"batching": Batching(pad_id=pad_id), "decode": decoder(tokenizer), **contender.settings}
        # the books know the run's targets: in one setting these are the queries, in the other the abilities
        asked = self.plan.study.prepared.targets if "run_dir" in known.needs else self.queries
        return fitted(self.run, contender.method, model, self.rows, places, context).score(asked).matrix()

    def from_store(self, format: str, size: int) -> Tensor:
        """Dot the queries' whitened sketches with a store's rows, at the last checkpoint -> [N, Q]."""
        model, _, pad_id = self.loaded
        out = self.place / f"store-{format}-{size}"
        if not out.exists():
            attribute(self.run.out, out=out, format=format, size=size, root=self.run.root)
        store = Store.open(out)
        spec = SketchSpec(size=size, precondition="ekfac")
        rows = [row for of in self.queries.values() for row in of]
        asked = sketches_of(model, rows, spec, Whitening.load(store.file(WHITENING)), "sum", pad_id)
        place = {id: at for at, id in enumerate(store.ids())}
        sketches = decode_rows(store.rows())[[place[row.id] for row in self.rows]]
        return sketches.float() @ asked.T.float()


def truth_of(setting: str, case: Case, *, measure: bool, processes: int) -> Truth:
    """Take the kept losses of the setting's retrainings, or measure them."""
    path = RESULTS / f"lds_truth_{setting}.npz"
    if measure or not path.exists():
        out = case.place / "truth"
        return every_query(measure_truth(case.run.out, out=out, processes=processes, root=case.run.root), case.every)
    truth = every_query(Truth.load(path), case.every)
    if list(truth.ids) != [row.id for row in case.rows] or list(truth.queries) != list(case.queries):
        raise SystemExit(f"{path} is of other rows or queries than {case.run.out}: measure anew with --measure.")
    return truth


def every_query(truth: Truth, every: int) -> Truth:
    """Keep every so manieth query of a truth."""
    return dataclasses.replace(
        truth,
        queries=truth.queries[::every],
        abilities=truth.abilities[::every],
        tokens=truth.tokens[::every],
        losses=truth.losses[:, :, ::every],
        base=truth.base[::every],
        full=truth.full[:, ::every],
    )


def all_scores(case: Case, names: Sequence[str], *, slow: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Score by every contender and store named, or by all; the slow ones only where they are asked for."""
    scores, seconds = {}, {}
    wanted: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(case.score, contender) for name, contender in {**CONTENDERS, **SLOW}.items()
    } | {name: functools.partial(case.from_store, *store) for name, store in STORES.items()}
    for name in names or [name for name in wanted if slow or name not in SLOW]:
        scores[name], seconds[name] = case.kept(name, wanted[name])
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    return scores, seconds


def rivals_scores(folder: Path) -> dict[str, Tensor]:
    """Read what the rivals answered, by "rival method"."""
    found = {path.stem.replace("-", " ", 1): np.load(path) for path in sorted(folder.glob("*.npy"))}
    return {name: torch.from_numpy(scores) for name, scores in found.items()}


def rows_of(
    setting: str, truth: Truth, scores: Mapping[str, Tensor], rivals: Sequence[str], seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Benchmark rows: one a method, and one of the truth itself; the default's also against the best rival."""
    sizes = {"samples": len(truth.ids), "queries": len(truth.queries)}
    shape = {"op": "system.lds", "setting": setting, **sizes, "subsets": len(truth.losses), "seeds": len(truth.full)}
    drop = float(truth.base.mean() - truth.full.mean())
    found: list[dict[str, Any]] = [{**shape, "method": "ceiling", "lds": truth.ceiling(), "loss_drop": drop}]
    table = lds_table(scores, truth)
    for row in table:
        told = {"per": row.per, "lds": row.lds, "minus_bm25": row.difference, "of_ceiling": row.of_ceiling}
        provider, _, method = row.method.partition(" ")
        name = {"provider": provider, "method": method} if row.method in rivals else {"method": row.method}
        found.append({**shape, **name, **told, "seconds": _finite(seconds.get(row.method))})
    best = next((row.method for row in table if row.method in rivals), None)
    if best is not None:
        pair = {DEFAULT: scores[DEFAULT], best: scores[best]}
        against = {row.method: row.difference for row in lds_table(pair, truth, baseline=best)}[DEFAULT]
        next(row for row in found if row["method"] == DEFAULT)["minus_best_rival"] = against
        print(f"{DEFAULT} minus the best rival, {best}: {against}")
    return found


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--setting", choices=[*SETTINGS, "world"], default="lora")
    parser.add_argument("--place", type=Path, required=True, help="folder that keeps the run and the scores")
    parser.add_argument("--methods", nargs="+", default=[], help="contenders; all unless told")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth query only")
    parser.add_argument("--measure", action="store_true", help="retrain instead of taking the committed losses")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rivals", type=Path, help="folder of rivals' scores")
    parser.add_argument("--write-case", type=Path, help="write the case for rivals here, and stop")
    parser.add_argument("--json", type=Path, help="keep the rows here, as JSON lines")
    args = parser.parse_args()
    run = prepared_run(args.setting, args.place)
    case = Case(run, Plan.of(run.out, 16, run.root), args.place, args.every)
    if args.write_case:
        from benchmarks.rivals.scores._base import write_case

        model, _, pad_id = case.loaded
        queries = [row for rows in case.queries.values() for row in rows]
        write_case(
            args.write_case, model, run.checkpoints(), case.rows, queries, base=args.place / "base", pad_id=pad_id
        )
        return
    truth = truth_of(args.setting, case, measure=args.measure, processes=args.processes)
    scores, seconds = all_scores(case, args.methods, slow=args.setting == "short")
    rivals = rivals_scores(args.rivals) if args.rivals else {}
    label = args.setting if args.every == 1 else f"{args.setting}, every query in {args.every}"
    rows = rows_of(label, truth, {**scores, **rivals}, list(rivals), seconds)
    print(f"ceiling {truth.ceiling()}")
    print(f"queries' loss {float(truth.base.mean()):.3f} -> {float(truth.full.mean()):.3f} nats a token")
    table = lds_table({**scores, **rivals}, truth)
    print("\n".join([*lds_lines(table, []), verdict(table)]))
    if args.json:
        write_rows(args.json, signed(rows))


if __name__ == "__main__":
    main()
