"""The arms of the benchmark of mixing: which mixes and policies are raced, as what JSON can hold.

An arm is {"mix": {source: share}}, drawn as it is; or {"policy", "start", "settings", "guard", "resolver", "apply"},
made by `fastsft.mixing` (or here: the controls). `draws` may go with either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsft.tasks import Decision, Feedback, Mix, MixError, MixTask
from fastsft.train.sampler import Draws
from fastsft.train.steering import Steering

# mixes that need no search
STATIC = ("uniform", "proportional", "temperature 2")
# what an arm's name stands for, beside the static ones, `oracle` and `predicted`; START is put in where it is known
PREDICTED = "predicted"
# arms are judged by the mean loss in nats, so that is what align is told to lower
NATS = {"objective": "nats"}
STEERED: dict[str, dict[str, Any]] = {
    "random weights": {"policy": "random weights"},
    "odm": {"policy": "odm"},
    "velocity": {"policy": "velocity"},
    "align": {"policy": "align", "settings": NATS},
    "slope": {"policy": "slope"},
    "align+guard": {"policy": "align", "settings": NATS, "guard": True},
    "velocity from predicted": {"policy": "velocity", "start": PREDICTED},
    "align from predicted": {"policy": "align", "settings": NATS, "start": PREDICTED},
    "slope from predicted": {"policy": "slope", "start": PREDICTED},
    "uniform+upgrad": {"policy": "fixed", "resolver": "upgrad"},
    "uniform+upgrad exact": {"policy": "fixed", "resolver": "upgrad", "apply": "exact"},
    "align+upgrad": {"policy": "align", "settings": NATS, "resolver": "upgrad"},
    "books alone": {"policy": "fixed"},
}
ORACLE = "oracle"
# most important first
ARMS = ("uniform", ORACLE, "align", PREDICTED, "align from predicted", "proportional", "odm", "velocity", "slope",
        "velocity from predicted", "slope from predicted", "align+guard", "random weights", "temperature 2",
        "uniform+upgrad", "align+upgrad", "uniform+upgrad exact", "books alone")  # fmt: skip


@dataclass(frozen=True)
class Fixed:
    """The mix it is given (None: uniform), to the end: what a resolver, or the books alone, do to a static run."""

    mix: Mapping[str, float] | None = None

    def begin(self, task: MixTask) -> Mix:
        return Mix.uniform(task.names) if self.mix is None else Mix(self.mix).over(task.names)

    def decide(self, feedback: Feedback) -> Decision:
        return Decision(weights=feedback.weights, signal={}, error={}, why="the mix is fixed.")


class RandomWeights:
    """Another random mix at every decision, uniform over the simplex: a control that has no signal."""

    def begin(self, task: MixTask) -> Mix:
        self.names, self.seed = task.names, task.seed
        return Mix(self._draw(0))

    def decide(self, feedback: Feedback) -> Decision:
        return Decision(weights=self._draw(feedback.step), signal={}, error={}, why="a random mix.")

    def _draw(self, step: int) -> dict[str, float]:
        key = hashlib.blake2b(f"random weights {self.seed} {step}".encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        return dict(zip(self.names, rng.dirichlet(np.ones(len(self.names))).tolist(), strict=True))


def static_mix(name: str, sizes: Mapping[str, int]) -> Mix:
    """Give a static arm's mix; sizes {source: supervised tokens}."""
    if name == "uniform":
        return Mix.uniform(list(sizes))
    return Mix.proportional(sizes, 2.0 if name == "temperature 2" else 1.0)


def arm_of(name: str, sizes: Mapping[str, int], predicted: Mapping[str, float] | None) -> dict[str, Any] | None:
    """Say an arm as a job's `arm`; None where it starts from a predicted mix that is not known (yet)."""
    if name in STATIC:
        return {"mix": dict(static_mix(name, sizes).weights)}
    if name == PREDICTED:
        return None if predicted is None else {"mix": dict(predicted)}
    arm = dict(STEERED[name])
    if arm.get("start") == PREDICTED:
        return None if predicted is None else {**arm, "start": dict(predicted)}
    return arm


def check_names(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in ARMS:
            raise MixError(f"there is no arm {name!r}: there are {', '.join(ARMS)}.")
    return list(names)


def steering_of(arm: Mapping[str, Any], draws: Draws, abilities: Mapping[str, str], targets: Sequence[str]) -> Steering:
    """Make the policy and the resolver of an arm; abilities {source: ability}, targets: the run's abilities."""
    from fastsft.mixing.conflict import make_resolver

    resolver = make_resolver(arm.get("resolver", "none"), abilities=targets)
    apply = arm.get("apply", "lagged")
    return Steering(policy=_policy(arm), draws=draws, resolver=resolver, apply=apply, abilities=abilities)


def _policy(arm: Mapping[str, Any]) -> Any:
    name, start = arm["policy"], arm.get("start")
    if name == "fixed":
        return Fixed(start)
    if name == "random weights":
        return RandomWeights()
    from fastsft.mixing.build import make_policy

    return make_policy(name, start=start, settings=arm.get("settings"), guard=arm.get("guard", False))
