"""What steering costs beside the books: `python -m benchmarks.system.steering --out FILE`.

The case of `benchmarks.system.in_run` (a small Llama, LoRA r=16, batch 8, T=256, three abilities, AdamW). Every variant
trains its own copy of one model, in turn, on one thread; what is timed is a whole interval of the books, draws, steps,
refresh and decision, so that nothing a policy does is left out; and, as that is less than a busy machine's noise, the
processor time of draws, decisions and resolver alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import interleave, signed, write_rows
from benchmarks.system.in_run import SOURCES, Race, make_model
from fastsft.attribution import Attribution
from fastsft.attribution.ledger import Entry
from fastsft.attribution.targets import TargetState
from fastsft.mixing import Align, Static, UPGrad
from fastsft.tasks import MixPolicy, MixTask, Resolver, Source
from fastsft.train.controller import Controller
from fastsft.train.logits import LogitsTap
from fastsft.train.reweigh import Reweigher
from fastsft.train.sampler import Draws, MixStream

ABILITIES = ["maths", "code", "general"]
ROWS = 2000  # of each source


class Steered(Race):
    """A race whose batches come from a stream, under a policy, with or without a resolver."""

    def __init__(
        self, model: Any, args: argparse.Namespace, policy: MixPolicy, resolver: Resolver | None = None
    ) -> None:
        super().__init__(model, args, Attribution(refresh_every=args.interval))
        assert self.books is not None
        items = {name: range(ROWS * at, ROWS * at + ROWS) for at, name in enumerate(SOURCES)}
        sources = tuple(
            Source(name=name, ability=ability, rows=ROWS, tokens=ROWS * args.length)
            for name, ability in zip(SOURCES, ABILITIES, strict=True)
        )
        task = MixTask(sources=sources, abilities=tuple(ABILITIES), steps=10**6, batch=args.batch, seed=0)
        mix = policy.begin(task)
        self.stream = MixStream(items, [args.length] * (3 * ROWS), mix, batch=args.batch, steps=10**6, draws=Draws())
        self.draws = iter(self.stream)
        self.controller = Controller(policy, self.stream, task, self.books.record)
        self.controller.echo = self.books.rule.echo()
        self.tap: LogitsTap | None = None
        self.reweigher: Reweigher | None = None
        if resolver is not None:
            self.tap = LogitsTap(self.model, len(SOURCES), losses=False)
            self.reweigher = Reweigher(
                resolver,
                apply="lagged",
                abilities=ABILITIES,
                own=ABILITIES,
                smoothing=0.8,
                limits=(1 / 3, 3.0),
                record=self.books.record,
                tap=self.tap,
            )
        self.books.on_refresh = self._refreshed
        self.own = 0.0  # seconds of the processor in draws, decisions and the resolver

    def _refreshed(self, step: int, first: int, state: TargetState, entries: dict[str, Entry]) -> None:
        began = time.process_time()
        if self.reweigher is not None:
            self.reweigher.refreshed(step, state)
        if not self.controller.initial:
            self.controller.start(state.losses, step)
        if entries:
            self.controller.refreshed(step, first, state, entries)
        self.own += time.process_time() - began

    def step(self) -> None:
        began = time.process_time()
        drawn = [next(self.draws) // ROWS for _ in range(self.args.batch)]
        self.own += time.process_time() - began
        assert self.books is not None
        with self.books.batch(
            rows=tuple(self.ids.shape), samples=self.names, sources=[SOURCES[source] for source in drawn]
        ):
            if self.tap is None:
                self.loss().backward()
            else:
                with self.tap.batch(drawn, [[self.args.length]] * self.args.batch, self.ids, packed=False):
                    self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def interval(self) -> None:
        """Take steps to the end of one interval, refresh and decision included."""
        assert self.books is not None
        before = self.books._last_refresh
        while self.books._last_refresh == before:
            self.step()
            self.books.after_step()


def race(args: argparse.Namespace) -> list[dict[str, object]]:
    model = make_model(args.hidden, args.layers, args.vocabulary, lora=True)
    chosen: dict[str, tuple[MixPolicy, Resolver | None]] = {
        "mix: static": (Static(), None),
        "mix: align": (Align(), None),
        "mix: align, resolver: upgrad, lagged": (Align(), UPGrad()),
    }
    races = {name: Steered(model, args, *given) for name, given in chosen.items()}
    for each in races.values():
        each.warm()
        each.interval()
    variants: dict[str, Callable[[], object]] = {name: each.interval for name, each in races.items()}
    before = {name: each.own for name, each in races.items()}
    rows = interleave(variants, repeats=args.repeats, warmup=0, device="cpu")
    base = float(str(rows[0]["median_ms"]))
    shape = {key: getattr(args, key) for key in ("hidden", "layers", "vocabulary", "batch", "length", "target_rows")}
    for row in rows:
        for key in ("median", "p20", "p80"):
            row["ratio" if key == "median" else f"ratio_{key}"] = round(float(str(row[f"{key}_ms"])) / base, 4)
        row["steps"] = args.interval
        name = str(row["provider"])
        row["own_ms"] = round(1e3 * (races[name].own - before[name]) / args.repeats, 2)
        row["own_share"] = round(float(str(row["own_ms"])) / float(str(row["median_ms"])), 4)
    case = {"op": "system.steering", "mode": "lora", "dtype": "float32", "case": shape}
    return [{**case, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time intervals under a policy against those of a static mix.")
    parser.add_argument("--out", type=Path, help="keep the rows here, as JSON lines")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--target-rows", type=int, default=16, help="target rows an ability")
    parser.add_argument("--interval", type=int, default=10, help="steps of an interval")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.device, args.bf16 = "cpu", False
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as args.place:
        rows = signed(race(args), "cpu")
    for row in rows:
        print(
            f"{row['provider']:38} {row['median_ms']:9.1f} ms an interval of {row['steps']} steps, "
            f"ratio {row['ratio']:.4f} [{row['ratio_p20']:.4f}, {row['ratio_p80']:.4f}], "
            f"draws and decisions {row['own_ms']:.1f} ms, {100 * row['own_share']:.2f} %"
        )
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
