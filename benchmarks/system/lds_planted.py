"""Are wrong answers found, and does the ledger know its sources? `python -m benchmarks.system.lds_planted --place DIR`.

Wrong answers: a tenth of one source's answers are exchanged among themselves, the LoRA run of `lds_case` is trained on
them, and methods score every sample for its own ability's queries: AUC of a wrong sample scoring below a right one.
With --source world the same of the demo's world, 12 % of three sources.

Sources (--sources): the run's ledger entries of source and ability, against what leaving the source out costs the
ability in retrainings with three seeds each: Spearman's correlation over all pairs of source and ability.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import signed, write_rows
from benchmarks.system.lds import Case, Contender
from benchmarks.system.lds_case import SOURCES, make_config, prepared_run
from fastsft.data import Sample, read_source
from fastsft.evaluate.finding import wrong_label_auc
from fastsft.evaluate.intervals import spearman
from fastsft.evaluate.measure import Plan, leave_source_out
from fastsft.evaluate.planted import wrong_labels
from fastsft.report import summarize
from fastsft.train import FinishedRun, run
from fastsft.train.config import SourceConfig
from fastsft.train.demo import demo

# Commands and the actions that they stand for: an answer is right or wrong whatever else was seen. The whole base knows
# them (0.4 nats a token); the one after 11 % of its pretraining can't tell wrong from right.
SCAN = {"clinc": SOURCES["clinc"], "scan": ("actions", "aux/scan")}
OF_SOURCE = {**dict.fromkeys(SOURCES, (SOURCES, "checkpoint-192")), "scan": (SCAN, ".")}
METHODS = {
    "ekfac": Contender("ekfac"),
    "in_run": Contender("in_run"),
    "tracin": Contender("tracin"),
    "grad_cos, last checkpoint": Contender("grad_cos", "last"),
    "loss": Contender("loss"),
    "bm25": Contender("bm25"),
    "random": Contender("random"),
}


def spoilt_run(place: Path, source: str) -> FinishedRun:
    """Train the LoRA run with a tenth of one source's answers exchanged, or open it where it was trained before."""
    out = place / "run"
    if not (out / "checkpoints").exists():
        place.mkdir(parents=True, exist_ok=True)
        config = make_config("lora", place, *OF_SOURCE[source])
        samples = read_source(source, config.sources[source].path, ability=OF_SOURCE[source][0][source][0], root=place)
        changed, wrong = wrong_labels(samples, source, share=0.1, seed=0)
        (place / f"{source}.jsonl").write_text("".join(json.dumps(_plain(sample)) + "\n" for sample in changed))
        (place / "wrong.json").write_text(json.dumps(wrong))
        targets = {
            ability: SourceConfig(path=f"{name}-queries.jsonl", ability=ability)
            for name, (ability, _) in OF_SOURCE[source][0].items()
        }
        run(dataclasses.replace(config, targets=targets), root=place)
    return FinishedRun.open(out)


def _plain(sample: Sample) -> dict[str, Any]:
    return {"id": sample.id, "ability": sample.ability, "prompt": sample.prompt, "response": sample.response}


def world_run(place: Path) -> FinishedRun:
    """The demo's run on a generated world, 12 % wrong answers in three of its sources."""
    out = place / "run"
    if not (out / "checkpoints").exists():
        demo(out)
    return FinishedRun.open(out)


def wrong_rows(place: Path, source: str) -> list[dict[str, Any]]:
    """One row a method: the AUC."""
    if source == "world":
        finished = world_run(place)
        wrong = set(json.loads((finished.out / "planted.json").read_text())["harmful"])
    else:
        finished = spoilt_run(place, source)
        wrong = set(json.loads((place / "wrong.json").read_text()))
    case = Case(finished, Plan.of(finished.out, 16, finished.root), place)
    targets = [query.ability for query in case.plan.queries]
    told: dict[str, Any] = {
        "sources": [row.source for row in case.rows],
        "abilities": [case.plan.study.prepared.data[row.source]["ability"] for row in case.rows],
    }
    found = []
    for name, contender in METHODS.items():
        matrix, _ = case.kept(name, lambda contender=contender: case.score(contender))
        asked = targets if matrix.shape[1] == len(targets) else list(case.plan.study.prepared.targets)
        auc = wrong_label_auc(matrix, [row.id in wrong for row in case.rows], targets=asked, **told)
        print(f"{source}: {name}: AUC {auc}", flush=True)
        about = {"op": "system.lds_planted", "case": f"wrong answers in {source}", "wrong": len(wrong)}
        found.append({**about, "method": name, "auc": auc})
    return found


def source_rows(setting: str, place: Path, processes: int) -> list[dict[str, Any]]:
    """One row: the ledger's entries against retrainings without each source."""
    finished = prepared_run(setting, place)
    truth = leave_source_out(finished.out, out=place / "sources", seeds=3, processes=processes, root=finished.root)
    ledger = summarize(finished.out)["ledger"]
    sources = list(truth.about["left_out"])
    abilities = [name.split("/")[0] for name in truth.abilities]
    share = _shares(abilities, truth.tokens)  # [Q, A]
    entries = torch.tensor([[ledger[name]["by_source"][source] for name in truth.abilities] for source in sources])
    booked = -(entries.double() @ share)  # [S, A]: what the source took off the loss
    cost = (truth.losses - truth.full[None]) @ share  # [S, seeds, A]: what leaving it out costs
    each = [float(spearman(booked.flatten()[:, None], cost[:, seed].flatten()[:, None])) for seed in range(3)]
    mean = float(spearman(booked.flatten()[:, None], cost.mean(1).flatten()[:, None]))
    pairs = f"{len(sources)} sources x {share.shape[1]} abilities"
    print(f"{setting}: ledger against leaving a source out, {pairs}: {mean:.2f}; by seed {each}")
    print("booked", booked.tolist(), "cost", cost.mean(1).tolist())
    return [
        {
            "op": "system.lds_planted",
            "case": f"{setting}: ledger's sources",
            "method": "ledger",
            "spearman": mean,
            "by_seed": each,
            "booked": booked.tolist(),
            "cost": cost.mean(1).tolist(),
            "sources": sources,
            "abilities": list(dict.fromkeys(abilities)),
        }
    ]


def _shares(abilities: Sequence[str], tokens: Tensor) -> Tensor:
    names = list(dict.fromkeys(abilities))
    of = (
        torch.tensor([[ability == name for name in names] for ability in abilities]).double() * tokens.double()[:, None]
    )
    return of / of.sum(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Planted wrong answers, and the ledger's sources.")
    parser.add_argument("--place", type=Path, required=True, help="folder that keeps runs and scores")
    parser.add_argument("--source", default="clinc", choices=[*OF_SOURCE, "world"])
    parser.add_argument("--sources", choices=["lora"], help="instead: the ledger of that setting's run in --place")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="keep the rows here, as JSON lines")
    args = parser.parse_args()
    rows = (
        source_rows(args.sources, args.place, args.processes) if args.sources else wrong_rows(args.place, args.source)
    )
    if args.json:
        write_rows(args.json, signed(rows))


if __name__ == "__main__":
    main()
