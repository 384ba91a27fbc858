"""A tiny language model in float64, rows of random tokens, and a plain loop with the books kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsft.attribution import Attribution, Books, Targets
from fastsft.data import Row, collate
from fastsft.record import Record

VOCABULARY = 24


def tiny_model(*, lora: bool, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    return (with_lora(model) if lora else model).to(dtype)


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    dtype = next(model.parameters()).dtype
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).to(dtype)


def make_rows(number: int, *, source: str, seed: int) -> list[Row]:
    """Rows whose answers repeat their question shifted by a step of the source's own: something to learn, shared and
    not."""
    generator = torch.Generator().manual_seed(seed)
    shift = 1 + sum(map(ord, source)) % 5
    rows = []
    for index in range(number):
        size = int(torch.randint(2, 7, (1,), generator=generator))
        question = torch.randint(1, VOCABULARY - 8, (size,), generator=generator).tolist()
        answer = [token + shift for token in question]
        rows.append(Row(f"{source}-{index}", source, question + answer, [-100] * size + answer))
    return rows


def make_targets(names: tuple[str, ...] = ("one", "two"), rows: int = 6) -> Targets:
    made = {name: make_rows(rows, source=name, seed=100 + place) for place, name in enumerate(names)}
    return Targets(made, pad_id=0)


def loss_of(model: nn.Module, rows: list[Row]) -> Tensor:
    """Mean over supervised tokens, computed apart from the model's own loss."""
    batch = collate(rows, 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels.reshape(-1), ignore_index=-100)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def keep_books(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[list[Row]],
    *,
    sources: list[str],
    source_of: Callable[[Row], str] = lambda row: row.source,
    settings: Attribution | None = None,
    targets: Targets | None = None,
    clip: float | None = None,
    step: int = 0,
) -> Books:
    """Train on `batches`, one optimizer step each, and finish the books."""
    books = Books(
        model,
        optimizer,
        targets or make_targets(),
        sources=sources,
        record=Record.create(out),
        settings=settings,
        total_steps=step + len(batches),
        step=step,
    )
    model.train()
    for rows in batches:
        size = max(len(row.input_ids) for row in rows)
        lengths = [[len(row.input_ids)] for row in rows]
        with books.batch(
            rows=(len(rows), size),
            lengths=lengths,
            samples=[row.id for row in rows],
            sources=[source_of(row) for row in rows],
        ):
            loss = loss_of(model, rows)
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()
        books.after_step()
    books.finish()
    return books


def intervals(books: Books) -> list[dict[str, Any]]:
    return list(books.record.events("interval"))


def total(books: Books, ability: str, field: str) -> Any:
    """Sum a field of an ability's entries over the run."""
    entries = [event["abilities"][ability][field] for event in intervals(books)]
    if isinstance(entries[0], dict):
        return {name: sum(entry[name] for entry in entries) for name in entries[0]}
    return sum(entries)


def phi_by_sample(books: Books) -> dict[tuple[str, str], float]:
    """{(sample, ability): phi summed over its draws}."""
    found: dict[tuple[str, str], float] = {}
    for row in books.record.influence().to_pylist():
        key = (row["sample_id"], row["ability"])
        found[key] = found.get(key, 0.0) + row["phi"]
    return found
