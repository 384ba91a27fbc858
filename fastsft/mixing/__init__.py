"""Dynamic mixing: policies that decide from the books what to draw next, and resolvers for abilities in conflict.

>>> from fastsft.mixing import Align, make_policy
>>> from fastsft.tasks import Feedback, MixTask, Source
>>> sources = tuple(Source(name=n, ability=n, rows=100, tokens=9000) for n in ("maths", "code"))
>>> policy = Align(floor=0.05)
>>> mix = policy.begin(MixTask(sources=sources, abilities=("maths", "code"), steps=40, batch=16, seed=0))
>>> told = dict(initial={"maths": 2.0, "code": 1.0}, losses={"maths": 1.8, "code": 0.9},
...             errors={"maths": 0.1, "code": 0.1}, measured={"maths": -0.2, "code": -0.1}, progress=0.5,
...             tokens={"maths": 900, "code": 900}, credited={"maths": 900, "code": 900},
...             used={"maths": 900, "code": 900}, weights=mix.weights)
>>> helped = {"maths": {"maths": -0.19, "code": -0.01}, "code": {"maths": 0.0, "code": 0.0}}
>>> for step in (10, 20):
...     decision = policy.decide(Feedback(step=step, first=step - 10, entries=helped, **told))
>>> print(f"maths: {mix.weights['maths']:.2f} -> {decision.weights['maths']:.2f}")
maths: 0.50 -> 0.53

`fastsft.attach(trainer, targets, out="runs/a", steering=fastsft.Steering(policy=Align()))` steers a trainer with one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsft.mixing.align import Align
from fastsft.mixing.build import POLICIES, make_policy, read_start
from fastsft.mixing.guard import Guard
from fastsft.mixing.odm import Odm
from fastsft.mixing.slope import Slope
from fastsft.mixing.static import Schedule, Static, TwoStage
from fastsft.mixing.velocity import Velocity

if TYPE_CHECKING:
    from fastsft.mixing.conflict import make_resolver
    from fastsft.mixing.plan import plan_mix
    from fastsft.mixing.resolvers import MGDA, AlignedMTL, Gem, PCGrad, UPGrad

# loaded when they are first used: they import the trainer
_HOMES = {
    "AlignedMTL": "resolvers",
    "Gem": "resolvers",
    "MGDA": "resolvers",
    "PCGrad": "resolvers",
    "UPGrad": "resolvers",
    "make_resolver": "conflict",
    "plan_mix": "plan",
}
__all__ = [
    "MGDA",
    "POLICIES",
    "Align",
    "AlignedMTL",
    "Gem",
    "Guard",
    "Odm",
    "PCGrad",
    "Schedule",
    "Slope",
    "Static",
    "TwoStage",
    "UPGrad",
    "Velocity",
    "make_policy",
    "make_resolver",
    "plan_mix",
    "read_start",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fastsft.mixing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastsft.mixing' has no attribute {name!r}; public names: {', '.join(__all__)}.")
