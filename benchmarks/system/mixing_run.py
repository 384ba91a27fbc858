"""One training of the benchmark of mixing: a job in, its losses along the way out; JSON both, so a pool can run it.

    train({"setting": "world:tiny", "seed": 0, "arm": {"mix": {...}}, "numbers": {"tokens": 20000}})

An arm is a mix that stays, drawn without books, so at no cost; or a policy, a resolver, or both, which need the books.
Either way fastsft's own trainer and its stream of draws train it, up to the same number of supervised tokens.
"""

# A abilities

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.system import mixing_real, mixing_worlds
from benchmarks.system.mixing_arms import steering_of
from benchmarks.system.mixing_statistics import rounded
from benchmarks.system.mixing_worlds import Data
from fastsft.attribution import Attribution
from fastsft.data import DataError, Row
from fastsft.evaluate.retrain import query_losses, quiet
from fastsft.record import Record
from fastsft.tasks import Mix
from fastsft.train import attach
from fastsft.train.config import RunConfig, SourceConfig, TrainConfig
from fastsft.train.loop import make_trainer
from fastsft.train.sampler import Draws, MixStream
from fastsft.train.steering import steer_static

WORK = "benchmarks.system.mixing_run:train"
WORLD = "world:"
# when a run is evaluated, as shares of its tokens; closer at its end, where the last three are its final loss
MARKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class Case:
    """What all arms of a setting and seed share. The model is copied before it is trained."""

    data: Data
    model: Any
    tokenizer: Any
    train: TrainConfig
    # supervised tokens of a whole run
    tokens: int
    refresh_every: int
    pad_id: int

    @property
    def sizes(self) -> dict[str, int]:
        """Supervised tokens of each source."""
        return {name: sum(row.num_supervised for row in rows) for name, rows in self.data.sources.items()}


def case_of(setting: str, seed: int) -> Case:
    """Build a setting's case, or find it made: a process trains many arms on it. The real one is the same for all."""
    return _case(setting, 0 if setting == "real" else seed)


# all worlds with five seeds: some 4 MiB each
@functools.lru_cache(maxsize=40)
def _case(setting: str, seed: int) -> Case:
    if setting == "real":
        data, model, tokenizer = mixing_real.load()
        chosen = mixing_real.SETTING
        return Case(data, model, tokenizer, chosen.train, chosen.tokens, chosen.refresh_every, tokenizer.pad_token_id)
    if not setting.startswith(WORLD):
        raise DataError(f"`setting` must be real or {WORLD}NAME: got {setting!r}.")
    of_all = mixing_worlds.SETTING
    data = mixing_worlds.make_data(setting.removeprefix(WORLD), seed)
    model = mixing_worlds.base_model(of_all.base_steps)
    return Case(data, model, None, of_all.train, of_all.tokens, of_all.refresh_every, mixing_worlds.PAD)


def sizes_of(setting: str) -> dict[str, int]:
    """Supervised tokens of each source of a setting; a world's seeds have equal ones."""
    if setting.startswith(WORLD):
        return mixing_worlds.sizes_of(setting.removeprefix(WORLD))
    return case_of(setting, 0).sizes


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train one arm with one seed -> losses of every ability at each evaluation, and what they cost.

    job: `setting`, `seed` (of the draws, the adapter and, in a world, of its data), `arm` (see `mixing_arms`) and
    `numbers`: `tokens` (the budget; the setting's own where it is absent) and `share` of it (1 where it is absent).
    Evaluations take no part in `seconds`.
    """
    case = case_of(job["setting"], int(job["seed"]))
    numbers = job.get("numbers", {})
    tokens = round(numbers.get("share", 1.0) * numbers.get("tokens", case.tokens))
    with tempfile.TemporaryDirectory() as folder:
        return _Training(case, job["arm"], int(job["seed"]), tokens, Path(folder)).run()


class _Training:
    """A trainer with its arm put in, and its evaluations."""

    def __init__(self, case: Case, arm: Mapping[str, Any], seed: int, tokens: int, out: Path) -> None:
        self.case, self.tokens = case, tokens
        rows = [row for of in case.data.sources.values() for row in of]
        self.trainer: Any = _quiet(
            make_trainer(self._config(rows, seed), rows, copy.deepcopy(case.model), case.tokenizer, out)
        )
        draws = Draws(max_tokens=tokens, seed=seed, **arm.get("draws", {}))
        self.record: Record | None = None
        if "mix" in arm:
            self.stream: MixStream = steer_static(self.trainer, Mix(arm["mix"]), draws)
        else:
            known = {name: ability for name, ability in case.data.ability_of.items() if ability is not None}
            run = attach(
                self.trainer,
                case.data.validation,
                out=out / "run",
                settings=Attribution(refresh_every=case.refresh_every, samples=False, seed=seed),
                steering=steering_of(arm, draws, known, list(case.data.validation)),
            )
            assert run.steerer is not None
            assert run.steerer.controller is not None
            self.stream, self.record = run.steerer.controller.stream, run.record
        self.seen: dict[str, list[Any]] = {"tokens": [], "validation": [], "test": []}
        self.evaluating: tuple[float, ...] = (0.0, 0.0)

    def _config(self, rows: Sequence[Row], seed: int) -> RunConfig:
        """The setting's, with as many steps as the budget can need: tokens end the run."""
        least = min(sum(row.num_supervised for row in of) / len(of) for of in self.case.data.sources.values())
        steps = -(-self.tokens // round(self.case.train.batch_size * least)) + 2
        nowhere = {"-": SourceConfig(path="-")}  # rows are handed over, no file is read
        config = dataclasses.replace(self.case.train, steps=int(steps), seed=seed)
        return RunConfig(model="-", sources=nowhere, targets=nowhere, out="-", train=config)

    def run(self) -> dict[str, Any]:
        self._evaluate_along()
        start = _now()
        self.trainer.train()
        self._synchronize()
        wall, cpu = (end - begin - without for begin, end, without in zip(start, _now(), self.evaluating, strict=True))
        steps = int(self.trainer.state.global_step)
        spent = {name: tokens for name, (_, tokens) in self.stream.spent(steps).items()}
        if self.seen["tokens"][-1:] != [sum(spent.values())]:
            self._evaluate(sum(spent.values()))
        return {
            "initial": rounded(self.initial),
            **rounded(self.seen),
            "steps": steps,
            "spent": spent,
            "seconds": wall,
            "cpu_seconds": cpu,
            "path": [] if self.record is None else path_of(self.record),
            "device": self.device,
        }

    @property
    def device(self) -> str:
        return str(next(self.trainer.model.parameters()).device.type)

    def _evaluate_along(self) -> None:
        """Evaluate before the first step, and at every mark."""
        from transformers import TrainerCallback

        training = self

        class Evaluate(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
                start = _now()
                training.initial = training._losses("test")
                training.evaluating = tuple(end - begin for begin, end in zip(start, _now(), strict=True))

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
                spent = sum(tokens for _, tokens in training.stream.spent(state.global_step).values())
                passed = sum(spent >= mark * training.tokens for mark in MARKS)
                if passed > len(training.seen["tokens"]):
                    training._evaluate(spent)

        self.initial: dict[str, float] = {}
        self.trainer.add_callback(Evaluate())

    def _evaluate(self, spent: int) -> None:
        self._synchronize()
        start = _now()
        self.seen["tokens"].append(spent)
        for part in ("validation", "test"):
            self.seen[part].append(self._losses(part))
        self.evaluating = tuple(
            so_far + end - begin for so_far, begin, end in zip(self.evaluating, start, _now(), strict=True)
        )

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _losses(self, part: str) -> dict[str, float]:
        """Nats per response token of every ability."""
        found: Mapping[str, list[Row]] = getattr(self.case.data, part)
        rows = [row for of in found.values() for row in of]
        sizes = torch.tensor([row.num_supervised for row in rows], dtype=torch.float64)
        losses = query_losses(self.trainer.model, rows, self.case.pad_id) * sizes
        ends = [len(of) for of in found.values()]
        return {
            ability: float(loss.sum() / size.sum())
            for ability, loss, size in zip(found, losses.split(ends), sizes.split(ends), strict=True)
        }


def _now() -> tuple[float, float]:
    """Seconds of the clock, and of this process at work."""
    return time.perf_counter(), time.process_time()


def path_of(record: Record) -> list[dict[str, Any]]:
    """Every mix of a run: from which step it holds, and its weights."""
    return [{"step": event["from_step"], "weights": rounded(event["weights"])} for event in record.events("mix")]


def _quiet(trainer: Any) -> Any:
    """Take from a trainer all that it says and saves, and keep its rate as it is after the warm-up."""
    from transformers.trainer_utils import SchedulerType

    quiet(trainer)
    trainer.args.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
    return trainer
