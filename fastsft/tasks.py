"""Nouns that rooms share: a mix of sources, what a policy is told of a run, what it answers.

`train` draws by a mix and asks a policy, `mixing` has the policies: both know these nouns, not each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

# a sum of weights may miss one by this much: what a person rounds to two digits for three sources is refused,
# what arithmetic rounds is not
SUM_TOLERANCE = 1e-6


class MixError(ValueError):
    """A mix, or a policy's setting, that can't hold, with the way out."""


@dataclass(frozen=True)
class Mix:
    """Shares of what is drawn from each source: none negative, their sum one."""

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise MixError("a mix must name at least one source: got none.")
        for source, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise MixError(f"the weight of source {source!r} must be a number: got {weight!r}.")
            if weight < 0:
                raise MixError(f"the weight of source {source!r} must not be negative: got {weight}. Use 0 for none.")
        total = math.fsum(self.weights.values())
        if abs(total - 1) > SUM_TOLERANCE:
            said = ", ".join(f"{source}: {weight / total:.6g}" for source, weight in self.weights.items() if total)
            raise MixError(
                f"the weights of a mix must sum to one: these sum to {total:.6g}."
                + (f" In the same proportions they are {{{said}}}." if total else " At least one must be positive.")
            )
        exact = {source: float(weight) / total for source, weight in self.weights.items()}
        object.__setattr__(self, "weights", exact)

    @classmethod
    def uniform(cls, sources: Sequence[str]) -> Mix:
        """The same share of every source."""
        return cls({source: 1 / len(sources) for source in sources})

    @classmethod
    def proportional(cls, sizes: Mapping[str, float], temperature: float = 1.0) -> Mix:
        """Shares as size^(1 / temperature): 1 is by size, large values are uniform."""
        if not (temperature > 0 and all(size > 0 for size in sizes.values())):
            raise MixError(f"sizes and `temperature` must be positive: got {dict(sizes)} and {temperature}.")
        raised = {source: size ** (1 / temperature) for source, size in sizes.items()}
        total = math.fsum(raised.values())
        return cls({source: value / total for source, value in raised.items()})

    def over(self, sources: Sequence[str]) -> Mix:
        """The same mix in the order of a run's sources; one that names others, or leaves some out, is refused."""
        unknown = [source for source in self.weights if source not in sources]
        absent = [source for source in sources if source not in self.weights]
        if unknown or absent:
            wrong = f"names {unknown[0]!r}, which is none" if unknown else f"leaves out {absent[0]!r}"
            raise MixError(
                f"the mix {wrong} of the run's sources {', '.join(sources)}: give each a weight, 0 for none of it."
            )
        return Mix({source: self.weights[source] for source in sources})


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of a run: the ability that it was gathered for (None: not said), and what one epoch of it holds.

    rows: documents. tokens: supervised tokens, those that the loss looks at.
    """

    name: str
    ability: str | None
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class MixTask:
    """What a policy knows before the first step. `steps` of the optimizer, of `batch` items each."""

    sources: tuple[Source, ...]
    abilities: tuple[str, ...]
    steps: int
    batch: int
    seed: int

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What a policy learns when an interval of the books closes, at optimizer step `step`; it began after step `first`.

    progress: share of the run done, 0 to 1. initial, losses, errors {ability: nats per response token}: before the
    first step, now, and the standard error of now over target rows. measured {ability: nats}: change over the interval.
    entries {ability: {source: nats}}: what the books say each source did in it; negative lowered the loss, so it
    helped. tokens {source}: supervised tokens drawn in the interval; used {source}: since the run began.
    credited {source}: supervised tokens by when the optimizer's momentum turned them into displacement, of which
    entries are: half of an interval's may come from draws before it. Without momentum these are `tokens`.
    weights {source}: the mix that was decided last, from which a policy moves on.
    train_losses {source: nats per supervised token}: mean over the interval's batches; empty unless the policy has
    `needs_train_losses = True`.
    """

    step: int
    first: int
    progress: float
    initial: Mapping[str, float]
    losses: Mapping[str, float]
    errors: Mapping[str, float]
    measured: Mapping[str, float]
    entries: Mapping[str, Mapping[str, float]]
    tokens: Mapping[str, int]
    credited: Mapping[str, float]
    used: Mapping[str, int]
    weights: Mapping[str, float]
    train_losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A policy's answer: the mix from now on, and why.

    signal, error {source}: what the decision rests on, in the policy's own unit (higher: draw more), and its standard
    error (nan where it has none). why: one sentence for a reader. details: more of it, in what JSON can hold.
    """

    weights: Mapping[str, float]
    signal: Mapping[str, float]
    error: Mapping[str, float]
    why: str
    details: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class MixPolicy(Protocol):
    """How a mix follows a run: two methods.

    A policy must be a function of what it was told: the same task and feedbacks give the same decisions, bit for bit.
    A resumed run tells it everything again, so it saves nothing; every rank asks its own copy, so it draws random
    numbers from `task.seed` alone.
    """

    def begin(self, task: MixTask) -> Mix:
        """Give the mix to start with."""
        ...

    def decide(self, feedback: Feedback) -> Decision:
        """Give the mix from now on."""
        ...


@runtime_checkable
class Resolver(Protocol):
    """How abilities that pull against each other are weighed: Gram matrix [K, K] of their gradients -> weights [K]."""

    def __call__(self, gram: Any) -> Any: ...
