"""What a forward pass of the whole model knows, and its layers can't: sequences, their prompts and their tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsft.adapters.config import GatedConfig, GatedError
from fastsft.data.prompts import labels_told
from fastsft.ops.gated_adapter import Sequences


@dataclass(eq=False)
class Context:
    """One forward pass. `gates` are those that its blocks found, by block, or found earlier for the same cache."""

    sequences: Sequences | None = None
    task: Tensor | None = None
    gates: dict[int, Tensor] = field(default_factory=dict)
    # whether this pass goes on from a cache, with the gates of its prompt
    goes_on: bool = False


def make_context(
    config: GatedConfig, given: Mapping[str, Any], task: Tensor | None, gates: dict[int, Tensor] | None, *, strict: bool
) -> Context:
    """Read what the model was called with. gates: those of the cache that it goes on from, None where it begins.

    strict: the pass is trained on, so that gates per sequence must know where prompts end.
    """
    needs_rows = config.granularity == "sequence" or (task is not None and len(task) != 1)
    if not needs_rows:
        return Context(task=task)
    ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if ids is None:
        raise GatedError("gates per sequence or per task read `input_ids` or `inputs_embeds`: the model got neither.")
    rows, length = ids.shape[:2]
    labels = given.get("labels") if given.get("labels") is not None else labels_told()
    if config.granularity == "sequence" and gates is None and labels is None and strict:
        raise GatedError(
            "gates per sequence look at prompts, and a forward pass in training got no labels that say where prompts "
            "end (does the trainer take them out, for label smoothing or a loss of its own?). Call the model with "
            "`labels`, or inside `with fastsft.data.told_labels(labels):`."
        )
    if gates is None and labels is not None and labels.shape != (rows, length):
        raise GatedError(f"labels must have the shape of the batch, {[rows, length]}: got {list(labels.shape)}.")
    if gates is not None:
        # a sequence goes on: its prompt was seen, and its gates stand
        sequences = Sequences.of_rows(torch.ones(rows, length, dtype=torch.bool, device=ids.device))
    else:
        sequences = find_sequences(
            (rows, length), ids.device, given.get("attention_mask"), given.get("position_ids"), labels
        )
    context = Context(sequences, task, dict(gates or {}), goes_on=gates is not None)
    if task is not None:
        context.task = _tasks_of(task, len(sequences.offsets) - 1, strict=strict)
    return context


def find_sequences(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
) -> Sequences:
    """Tell sequences apart, packed (positions begin anew) or a row each, and their prompts from their answers.

    Prompt: the attended tokens before the first with a label; without labels all of them. The first token always
    counts, since nothing predicts it.
    """
    rows, length = shape
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask is not None and attention_mask.ndim == 2:
        mask = attention_mask[:, -length:].bool()
    offsets = _packed_offsets(shape, mask, position_ids)
    answered = torch.zeros(shape, dtype=torch.bool, device=device) if labels is None else labels.to(device) != -100
    if offsets is None:
        prompt = mask & ((answered.cumsum(1) == 0) | (mask.cumsum(1) == 1))
        return Sequences.of_rows(prompt)
    flat_mask, flat_answered = mask.flatten(), answered.flatten()
    document = torch.repeat_interleave(offsets.diff(), output_size=rows * length)

    def count_within(flags: Tensor) -> Tensor:
        total = flags.cumsum(0)
        before = torch.cat([total.new_zeros(1), total])[offsets[:-1]]
        return total - before[document]

    prompt = flat_mask & ((count_within(flat_answered) == 0) | (count_within(flat_mask) == 1))
    return Sequences.packed(offsets, prompt)


def _packed_offsets(shape: tuple[int, int], mask: Tensor, position_ids: Tensor | None) -> Tensor | None:
    """Where sequences begin and the last ends, in flattened tokens; None where every row is one."""
    if position_ids is None:
        return None
    positions = position_ids if position_ids.ndim == 2 else position_ids[0]  # [3, B, L] of multimodal models
    positions = positions.expand(shape)
    begins = torch.ones(shape, dtype=torch.bool, device=mask.device)
    # padding on the left has positions of its own, and begins nothing
    begins[:, 1:] = (positions.diff(dim=1) != 1) & mask[:, 1:] & mask[:, :-1]
    if int(begins.sum()) == shape[0]:
        return None
    first = begins.flatten().nonzero().flatten()
    return torch.cat([first, first.new_full((1,), begins.numel())])


def _tasks_of(task: Tensor, count: int, *, strict: bool) -> Tensor:
    if len(task) == count:
        return task
    if not strict and len(task) and count % len(task) == 0:
        return task.repeat_interleave(
            count // len(task)
        )  # beams, or several answers to a prompt, as `generate` lays them
    raise GatedError(
        f"{len(task)} tasks were set for {count} sequences in the batch: `set_task` one for all, or one a sequence (or "
        f"call the model with `task_ids`)."
    )
