"""What a finished run's settings and books say of its past: learning rates, weights at its checkpoints, its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsft.attribution.methods import Checkpoint, Schedule
from fastsft.data import Row
from fastsft.record import Record, versions
from fastsft.train.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from fastsft.train.finished import FinishedRun


def learning_rates(train: TrainConfig) -> list[float]:
    """The learning rate of every step, the first step's first, by transformers' own schedule."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    schedule = get_scheduler(train.schedule, optimizer, train.warmup_steps, train.steps)
    found = []
    for _ in range(train.steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def checkpoints_of(run: FinishedRun) -> list[Checkpoint]:
    """The checkpoints that a run kept, in order; each stands for the steps since the one before it."""
    rates = learning_rates(run.config.train)
    found, before = [], 0
    for step in run.steps:
        about = {"step": step, "learning_rate": rates[step - 1]}
        weights = _reader(run.checkpoint(step))
        found.append(Checkpoint(f"checkpoint-{step}", weights, share=sum(rates[before:step]), about=about))
        before = step
    return found


def _reader(folder: Path) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: read_weights(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint's weights under the names that the loaded model's parameters have."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    adapter = folder / "adapter_model.safetensors"
    files = [adapter] if adapter.exists() else sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no safetensors file, which is what a run saves: convert its weights first.")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file} can't be read ({' '.join(str(error).split())}): take other checkpoints, by `checkpoint`."
            ) from None
    return {_with_adapter(name): weight for name, weight in found.items()} if adapter.exists() else found


def _with_adapter(name: str) -> str:
    """A peft file leaves out the adapter's name, which parameters of the model have: `lora_A.weight` is
    `lora_A.default.weight` there."""
    head, _, tail = name.rpartition(".")
    return f"{head}.default.{tail}" if head.rpartition(".")[2].startswith("lora_") else name


def initial(run: FinishedRun) -> Checkpoint:
    """The trainable weights before step 1: the base model's, or the adapter made again from the run's seed."""
    # a model that never trained is made once, when its weights are first asked for
    made: dict[str, Tensor] = {}
    if run.config.train.method == "lora":
        check_versions(run, "the adapter before step 1 is made again from its seed")

    def weights() -> Mapping[str, Tensor]:
        if not made:
            made.update(_untrained(run))
        return made

    return Checkpoint("checkpoint-0", weights, share=0.0, about={"step": 0, "learning_rate": 0.0})


def _untrained(run: FinishedRun) -> dict[str, Tensor]:
    from fastsft.train.loop import load_model, with_adapter

    model, _ = load_model(run.config.model, run.root)
    if run.config.train.method == "lora":
        with torch.random.fork_rng():
            model = with_adapter(model, run.config.train)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def check_versions(run: FinishedRun, why: str) -> None:
    """Refuse another torch or peft than the run had, with which the same seed may give other numbers."""
    now = versions()
    for name in ("torch", "peft"):
        if run.versions.get(name) != now.get(name):
            raise ConfigError(
                f"{run.out} was trained with {name} {run.versions.get(name)} and {why}, which {name} {now.get(name)} "
                f"may do otherwise: install what the run had, or take a method that starts from its checkpoints."
            )


def schedule_of(run: FinishedRun, model: Any, rows: Sequence[Row]) -> Schedule:
    """Read which of `rows` each step of a run had from its books, and how it stepped from its settings.

    model: the run's, loaded; which of its parameters decay is the trainer's to say.
    """
    from fastsft.train.loop import make_trainer

    train, place = run.config.train, {row.id: at for at, row in enumerate(rows)}
    groups = make_trainer(run.config, [], model, None, run.out).create_optimizer().param_groups
    decay = {id(p): float(group["weight_decay"]) for group in groups for p in group["params"]}
    adam = {key: groups[0][key] for key in ("betas", "eps") if train.optimizer == "adamw"}
    return Schedule(
        batches=[[place[id] for id in batch] for batch in batches_of(run)],
        learning_rate=learning_rates(train),
        optimizer=train.optimizer,  # type: ignore[arg-type]
        momentum=float(groups[0].get("momentum", 0.0)),
        weight_decay={name: decay[id(p)] for name, p in model.named_parameters() if id(p) in decay},
        max_grad_norm=train.max_grad_norm or None,  # 0 is the trainer's word for none
        **adam,
    )


def batches_of(run: FinishedRun) -> list[list[str]]:
    """The ids of each step's samples, micro-batches together; refused where the books lack some."""
    record = Record.open(run.out)
    if run.config.train.precision != "fp32":
        raise ConfigError(
            f"{run.out} was trained in {run.config.train.precision}, and its steps can be taken again in fp32 only: "
            f"take another method."
        )
    if not run.config.attribution.samples:
        raise ConfigError(
            f"{run.out} booked sources alone (samples: false), so it does not say which samples each step had: take "
            f"another method."
        )
    table = record.influence().to_pydict()
    one = record.start["abilities"][0]
    batches: list[list[str]] = [[] for _ in range(run.config.train.steps)]
    for step, id, ability in zip(table["step"], table["sample_id"], table["ability"], strict=True):
        if ability == one:
            batches[step - 1].append(id)
    missing = [step for step, batch in enumerate(batches, start=1) if not batch]
    if missing:
        raise ConfigError(
            f"the books of {run.out} have no samples of step {missing[0]}, of {len(batches)} steps: let the run finish "
            f"(`fastsft run --resume`), or take another method."
        )
    return batches
