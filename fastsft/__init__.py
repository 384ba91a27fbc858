"""fastsft keeps the books of a fine-tuning run, and balances them.

    run = fastsft.attach(trainer, targets={"maths": maths_val, "code": code_val}, out="runs/a")
    trainer.train()
    run.report()

Importing it imports no trainer, no dataset library and no kernel; each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsft.adapters import Gated, GatedConfig, attach_gated, load_gated
    from fastsft.attribution import Attribution, Books, Targets
    from fastsft.capturing import capture
    from fastsft.mixing.run import run
    from fastsft.record import Record
    from fastsft.report import write_report
    from fastsft.train.attach import attach
    from fastsft.train.attribute import attribute, attribute_model
    from fastsft.train.config import load_config
    from fastsft.train.estimate import attribute_queries
    from fastsft.train.followed import Run
    from fastsft.train.query import search_store
    from fastsft.train.sampler import Draws
    from fastsft.train.steering import Steering

_HOMES = {
    "Attribution": "fastsft.attribution",
    "Books": "fastsft.attribution",
    "Draws": "fastsft.train",
    "Gated": "fastsft.adapters",
    "GatedConfig": "fastsft.adapters",
    "Record": "fastsft.record",
    "Run": "fastsft.train",
    "Steering": "fastsft.train",
    "Targets": "fastsft.attribution",
    "attach": "fastsft.train",
    "attach_gated": "fastsft.adapters",
    "attribute": "fastsft.train",
    "attribute_model": "fastsft.train",
    "attribute_queries": "fastsft.train",
    "capture": "fastsft.capturing",
    "load_config": "fastsft.train",
    "load_gated": "fastsft.adapters",
    "run": "fastsft.mixing.run",
    "search_store": "fastsft.train",
    "write_report": "fastsft.report",
}
__all__ = [
    "Attribution",
    "Books",
    "Draws",
    "Gated",
    "GatedConfig",
    "Record",
    "Run",
    "Steering",
    "Targets",
    "attach",
    "attach_gated",
    "attribute",
    "attribute_model",
    "attribute_queries",
    "capture",
    "load_config",
    "load_gated",
    "run",
    "search_store",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastsft' has no attribute {name!r}; public names: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
