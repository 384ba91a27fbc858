"""The index-build case, shared by ourselves and the rivals: a model, rows, and the plain training step to compare with.

Imports torch, and transformers and peft where it loads a model, but never fastsft: rivals run it in their environments.
A folder holds the case: model/ (transformers) and rows.json ([{id, source, input_ids, labels}]).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# padded tokens of a batch, for the training step, ourselves and every rival that takes such a number
BATCH_TOKENS = 2048
LORA_RANK = 8


@dataclass(frozen=True)
class Line:
    """One tokenised sample; labels are -100 where no loss is."""

    id: str
    source: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class IndexCase:
    """A loaded case. `method` is "lora" (r=8 on all linears, the base frozen) or "full"."""

    folder: Path
    method: str
    rows: list[Line]
    pad_id: int

    @property
    def shape(self) -> str:
        tokens = sum(len(row.input_ids) for row in self.rows)
        return f"N{len(self.rows)}, {tokens} tokens, batches of {BATCH_TOKENS}, {self.method}"


def load_case(folder: Path, method: str) -> IndexCase:
    told = json.loads((folder / "rows.json").read_text())
    return IndexCase(folder, method, [Line(**row) for row in told["rows"]], told["pad_id"])


def load_model(case: IndexCase) -> Any:
    """Load the case's model in float32, with adapters whose B is not zero: at zero half the gradients would be zero."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(case.folder / "model", dtype=torch.float32)
    if case.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def batches(rows: Sequence[Line], order: str) -> list[list[int]]:
    """Cut the rows into batches of at most BATCH_TOKENS padded tokens, in "random" or "sorted" (by length) order."""
    numbers = list(range(len(rows)))
    random.Random(0).shuffle(numbers)
    if order == "sorted":
        numbers.sort(key=lambda number: -len(rows[number].input_ids))
    found: list[list[int]] = []
    width = 0
    for number in numbers:
        width = max(width, len(rows[number].input_ids))
        if not found or width * (len(found[-1]) + 1) > BATCH_TOKENS:
            found.append([])
            width = len(rows[number].input_ids)
        found[-1].append(number)
    return found


def pad(rows: Sequence[Line], pad_id: int) -> dict[str, Tensor]:
    """Pad rows on the right -> input_ids, labels, attention_mask [B, T]."""
    width = max(len(row.input_ids) for row in rows)
    gaps = [width - len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.input_ids + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]),
        "labels": torch.tensor([row.labels + [-100] * gap for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
    }


def training_step(case: IndexCase, order: str) -> Callable[[], None]:
    """What the case is measured against: every row once, forward, backward and AdamW, on a copy of the model."""
    model = load_model(case).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    inputs = [pad([case.rows[number] for number in batch], case.pad_id) for batch in batches(case.rows, order)]

    def epoch() -> None:
        for batch in inputs:
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def sample_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Each row's summed response loss, [B]: what rivals that take a loss function are given."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(len(logits), -1).sum(1)
