"""Greedy answers of a model, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsft.train.loop import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    batch_tokens: int = 4096,
) -> list[tuple[str, bool]]:
    """Answer every prompt of token ids greedily -> the text, and whether it ended by itself.

    Batches of like lengths, padded on the left; the model's own settings of sampling are not used. Stops at the
    tokenizer's and the model's end tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be 1 or more: got {max_new_tokens}.")
    ends = _end_tokens(model, tokenizer)
    found: dict[int, tuple[str, bool]] = {}
    with evaluation(model) as device, _plainly(model):
        for batch in _batches(prompts, max_new_tokens, batch_tokens):
            lines = [prompts[at] for at in batch]
            for at, tokens in zip(batch, _continued(model, lines, ends, padding_id(tokenizer), max_new_tokens, device)):
                stop = next((place for place, token in enumerate(tokens) if token in ends), None)
                found[at] = (str(tokenizer.decode(tokens[:stop], skip_special_tokens=True)), stop is not None)
    return [found[at] for at in range(len(prompts))]


def _continued(
    model: Any, lines: Sequence[Sequence[int]], ends: Sequence[int], pad_id: int, most: int, device: torch.device
) -> list[list[int]]:
    """Continue prompts side by side -> the new tokens of each, padding and all."""
    from transformers import GenerationConfig

    width = max(map(len, lines))
    ids = torch.full((len(lines), width), pad_id)
    mask = torch.zeros(len(lines), width, dtype=torch.long)
    for at, line in enumerate(lines):
        ids[at, width - len(line) :] = torch.tensor(line)
        mask[at, width - len(line) :] = 1
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, num_beams=1, use_cache=True, eos_token_id=list(ends), pad_token_id=pad_id
    )
    whole: Tensor = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    return whole[:, width:].tolist()


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    ends = sorted({int(token) for token in (tokenizer.eos_token_id, *named) if token is not None})
    if not ends:
        raise ValueError("neither tokenizer nor model names an end token, so no answer would end: set `eos_token`.")
    return ends


def _batches(prompts: Sequence[Sequence[int]], most: int, batch_tokens: int) -> list[list[int]]:
    """Places of prompts by length, longest first, so many side by side that all their tokens stay below the limit."""
    batches: list[list[int]] = []
    for at in sorted(range(len(prompts)), key=lambda at: -len(prompts[at])):
        if not batches or (len(prompts[batches[-1][0]]) + most) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(at)
    return batches


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Set the models' own generation settings aside: what the caller leaves open would be filled in from them."""
    from transformers import GenerationConfig

    owners: list[tuple[Any, Any]] = [
        (module, vars(module)["generation_config"]) for module in model.modules() if "generation_config" in vars(module)
    ]
    try:
        for module, _ in owners:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in owners:
            module.generation_config = own


@contextmanager
def evaluation(model: nn.Module) -> Iterator[torch.device]:
    """Switch off dropout and put every module's mode back; gives the model's device."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        for module, mode in modes:
            module.training = mode
