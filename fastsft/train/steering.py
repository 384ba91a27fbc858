"""Steer a trainer's run: which source is drawn next, and what each ability's gradient weighs.

    run = fastsft.attach(trainer, targets, out="runs/a", steering=Steering(policy=Align(), resolver=UPGrad()))

The policy and the resolver are objects handed in (`fastsft.mixing` has them, or write your own); here they are put into
a trainer: the stream of draws in place of its sampler, the weights on the gradients of its batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastsft.tasks import Mix, MixError, MixPolicy, MixTask, Resolver, Source
from fastsft.train.items import items_of
from fastsft.train.sampler import Draws, MixStream
from fastsft.train.samples import SampleTable, decoder, table_of_dataset

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

APPLY = ("lagged", "exact")


@dataclass(frozen=True, kw_only=True)
class Steering:
    """What steers a run.

    policy: decides the mix at every refresh of the books (None: the trainer's own order). draws: how a mix becomes
    draws. resolver: weighs abilities that pull against each other, by the Gram matrix of their gradients. apply:
    "lagged", its weights scale the documents' gradients until the next refresh, which costs nothing; or "exact", they
    are found anew in every step from the gradients of that step, for models whose trainable weights are all booked by
    source (LoRA). abilities {source: ability}: which ability a source was gathered for, where the data do not say.
    """

    policy: MixPolicy | None = None
    draws: Draws = field(default_factory=Draws)
    resolver: Resolver | None = None
    apply: str = "lagged"
    # of the Gram matrix: what the refreshes before still weigh
    smoothing: float = 0.8
    # no ability's gradient is scaled by more or less
    limits: tuple[float, float] = (1 / 3, 3.0)
    abilities: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.apply not in APPLY:
            raise MixError(f"`apply` must be one of {', '.join(APPLY)}: got {self.apply!r}.")
        if not 0 <= self.smoothing < 1:
            raise MixError(f"`smoothing` must be at least 0 and below 1: got {self.smoothing}.")
        if not 0 <= self.limits[0] <= 1 <= self.limits[1]:
            raise MixError(f"`limits` must hold 1 between them, the lower at least 0: got {self.limits}.")
        if self.policy is not None and not isinstance(self.policy, MixPolicy):
            raise MixError(
                f"`policy` must have the methods `begin(task)` and `decide(feedback)` (fastsft.tasks.MixPolicy): got "
                f"{type(self.policy).__name__}."
            )
        if self.resolver is not None and not callable(self.resolver):
            raise MixError(f"`resolver` must be callable on a Gram matrix [K, K]: got {type(self.resolver).__name__}.")


def steer_static(trainer: Trainer, mix: Mix, draws: Draws | None = None) -> MixStream:
    """Let a trainer draw by a mix that stays as it is; without books, so at no cost."""
    table = table_of_dataset(trainer.train_dataset, decoder(trainer))
    stream = stream_of(trainer, table, mix, draws or Draws())
    put_stream(trainer, stream)
    return stream


def stream_of(trainer: Any, table: SampleTable, mix: Mix | None, draws: Draws) -> MixStream:
    """Make the stream of a trainer's data, batch and steps; `mix` None: uniform, until a policy says otherwise."""
    _check(trainer)
    args = trainer.args
    items, tokens = items_of(trainer.train_dataset, table)
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    if args.max_steps <= 0:
        steps = -(-round(args.num_train_epochs * len(tokens)) // batch)
        raise MixError(
            f"a mix has no epochs to end with: set max_steps in the trainer's arguments ({steps} steps draw as many "
            f"rows as {args.num_train_epochs:g} epochs of {len(tokens)})."
        )
    return MixStream(items, tokens, mix or Mix.uniform(list(items)), batch=batch, steps=args.max_steps, draws=draws)


def _check(trainer: Any) -> None:
    """Refuse a trainer that samples by a rule of its own."""
    from transformers import Trainer

    # older transformers have only group_by_length
    old = "group_by_length" if getattr(trainer.args, "group_by_length", False) else "random"
    strategy = getattr(trainer.args, "train_sampling_strategy", old)
    if strategy != "random":
        raise MixError(
            f"two mixes are asked for at once: the trainer samples by {strategy!r}, and a mix is steered. Leave one "
            f"out."
        )
    own = type(trainer)._get_train_sampler
    if own is not Trainer._get_train_sampler or "_get_train_sampler" in vars(trainer):
        raise MixError(
            f"two mixes are asked for at once: {type(trainer).__name__} has a sampler of its own, and a mix is "
            f"steered. Leave one out."
        )


def put_stream(trainer: Any, stream: MixStream) -> None:
    """Let the trainer draw from `stream`, and stop where that ends."""
    from transformers import TrainerCallback

    trainer._get_train_sampler = lambda dataset=None: stream

    class StopAtEnd(TrainerCallback):
        """Stops a run whose sources or tokens are used up."""

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            if stream.ends_at(state.global_step * stream.batch):
                control.should_training_stop = True
                control.should_save = control.should_save or args.save_strategy != "no"

    trainer.add_callback(StopAtEnd())


def task_of(stream: MixStream, table: SampleTable, own: Mapping[str, str | None], abilities: Sequence[str]) -> MixTask:
    """Tell a policy what it can know before the first step."""
    sources = tuple(
        Source(name=name, ability=own.get(name), rows=table.sources.count(name), tokens=stream.epoch_tokens(name))
        for name in stream.names
    )
    return MixTask(
        sources=sources, abilities=tuple(abilities), steps=stream.steps, batch=stream.batch, seed=stream.draws.seed
    )


def own_abilities(
    sources: Sequence[str], abilities: Sequence[str], given: Mapping[str, str] | None, data: Mapping[str, Any]
) -> dict[str, str | None]:
    """Which ability each source was gathered for: as given, as the run's data say, or the one of the same name."""
    for name, ability in (given or {}).items():
        if name not in sources:
            raise MixError(f"`abilities` names {name!r}, which is none of the sources {', '.join(sources)}.")
        if ability not in abilities:
            raise MixError(
                f"source {name!r} is of ability {ability!r}, which has no target: the targets are "
                f"{', '.join(abilities)}."
            )
    found: dict[str, str | None] = {}
    for name in sources:
        said = (given or {}).get(name) or data.get(name, {}).get("ability")
        found[name] = said if said in abilities else name if name in abilities else None
    return found
