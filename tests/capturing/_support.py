"""Rows side by side, their summed loss, and the slow truth: one backward pass a row."""

from __future__ import annotations

import torch
from torch import nn

from tests.attribution._support import VOCABULARY


def sum_loss(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def one_by_one(model: nn.Module, rows: list) -> list[dict[str, torch.Tensor]]:
    """Each row's gradient of its summed loss, of every trainable parameter that has one."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for row in rows:
        loss = sum_loss(model, torch.tensor([row.input_ids]), torch.tensor([row.labels]))
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found.append({name: grad for name, grad in zip(named, grads, strict=True) if grad is not None})
    return found


def padded(rows: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    mask = torch.tensor([[1] * len(row.labels) + [0] * (width - len(row.labels)) for row in rows])
    return ids, labels, mask
