"""What an adapter hands over; adapters run in the rival's environment and import torch, the rival, never fastsft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# sides of a two-sided projection whose numbers add up to about 4096 a sample: 56 adapter matrices, 28 full ones
SIDES = {"lora": 8, "full": 12}


@dataclass(frozen=True)
class Contestant:
    """One way of doing the case: `run` does all of it once; `stored` is the bytes a sample of the last run."""

    describe: str
    run: Callable[[], object]
    stored: Callable[[], float] | None = None
    # samples that one run handles, where it is not all of them: times are scaled up from it
    num_samples: int | None = None
    facts: dict[str, object] = field(default_factory=dict)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def linear_names(model: object, method: str) -> list[str]:
    """The layers that every method here follows: LoRA's A and B, or every linear layer but the head."""
    from torch import nn

    assert isinstance(model, nn.Module)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if method == "lora":
        return [name for name in linears if "lora_" in name]
    return [name for name in linears if not name.endswith("lm_head")]
