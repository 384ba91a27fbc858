"""Forward passes over rows, for the methods that need no gradient."""

# N rows, B rows of a batch, T tokens of the longest of them

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastsft.data import Row, collate
from fastsft.sketch.passes import Batching


def over_rows(
    model: nn.Module, rows: Sequence[Row], batching: Batching, measure: Callable[[dict[str, Tensor]], Tensor]
) -> Tensor:
    """Measure every row, in eval mode and without gradients -> [N, ...] on the CPU, in the order of `rows`.

    measure: of a padded batch {input_ids, labels, attention_mask [B, T]} -> [B, ...].
    """
    order = sorted(range(len(rows)), key=lambda at: -len(rows[at].input_ids))
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    parts: list[Tensor] = []
    try:
        model.eval()
        with torch.no_grad():
            start = 0
            while start < len(order):
                stop = start + max(1, batching.max_tokens // len(rows[order[start]].input_ids))
                batch = collate([rows[at] for at in order[start:stop]], batching.pad_id)
                parts.append(measure({name: tensor.to(device) for name, tensor in batch.items()}).cpu())
                start = stop
    finally:
        for module, training in modes:
            module.training = training
    if not parts:
        return torch.zeros(0)
    found = torch.cat(parts)
    return found[torch.tensor(order).argsort()]
