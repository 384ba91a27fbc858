"""Gated adapters: one low-rank expert a task, gates that decide how much each speaks, a memory that always does.

>>> import torch
>>> from fastsft.adapters import GatedConfig, attach_gated
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
>>> config = GatedConfig(experts=["maths", "code"], rank=2, gate="one_hot", granularity="task", memory_rank=1)
>>> gated = attach_gated(model, config)
>>> gated.set_task("maths")
>>> model(torch.ones(3, 4)).shape  # as before: experts begin at zero
torch.Size([3, 2])
>>> optimizer = torch.optim.AdamW(gated.parameter_groups(1e-3))
"""

from fastsft.adapters.config import GatedConfig, GatedError
from fastsft.adapters.files import load_gated
from fastsft.adapters.gated import Gated, attach_gated
from fastsft.adapters.memory import Consolidation, memory_importance
from fastsft.adapters.peft import export_expert, import_expert

__all__ = [
    "Consolidation",
    "Gated",
    "GatedConfig",
    "GatedError",
    "attach_gated",
    "export_expert",
    "import_expert",
    "load_gated",
    "memory_importance",
]
