"""Read the held-out rows of every ability, text or tokens, into targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsft.attribution import Attribution, Targets
from fastsft.data import Row, Sample, Tokenized, tokenize_all
from fastsft.train.samples import integers

TargetRows = Sequence[Any]  # rows {prompt, response}, {messages}, or tokenised {input_ids, labels}


def read_targets(trainer: Any, targets: Mapping[str, TargetRows], settings: Attribution) -> tuple[Targets, list[str]]:
    """Tokenise the targets; the notes say what was cut for its length."""
    tokenizer: Any = trainer.processing_class
    config = trainer.model.config
    longest: Any = getattr(trainer.args, "max_length", None) or getattr(config, "max_position_embeddings", 2048)
    rows: dict[str, list[Row]] = {}
    notes: list[str] = []
    for ability, given in targets.items():
        found = _rows(ability, given, tokenizer, longest)
        rows[ability] = found.rows
        if found.dropped or found.truncated:
            notes.append(
                f"target {ability}, over {longest} tokens: {len(found.dropped)} rows dropped, "
                f"{len(found.truncated)} cut."
            )
    pad_id: int | None = getattr(tokenizer, "pad_token_id", None)
    if pad_id is None:
        pad_id = getattr(config, "pad_token_id", None)
    return Targets(rows, pad_id=pad_id or 0, batch_tokens=settings.target_batch_tokens), notes


def _rows(ability: str, given: TargetRows, tokenizer: Any, longest: int) -> Tokenized:
    rows = list(given)
    if not rows:
        raise ValueError(f"target {ability!r} has no rows: give it held-out samples or leave it out.")
    if isinstance(rows[0], Row):
        return Tokenized(rows, [], [])
    if isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
        tokenised = [
            Row(str(number), ability, integers(row["input_ids"]), integers(row.get("labels", row["input_ids"])))
            for number, row in enumerate(rows)
        ]
        return Tokenized(tokenised, [], [])
    if tokenizer is None:
        raise ValueError(f"target {ability!r} is text, and the trainer has no processing_class to tokenise it with.")
    samples = [
        row
        if isinstance(row, Sample)
        else Sample.from_row(_renamed(row), source=ability, where=f"target {ability!r}, row {n}")
        for n, row in enumerate(rows, start=1)
    ]
    return tokenize_all(samples, tokenizer, max_length=longest, over_long="truncate")


def _renamed(row: Any) -> Any:
    """TRL calls the response `completion`."""
    if not isinstance(row, Mapping):
        return row
    fields = dict(row)
    if "completion" in fields and "response" not in fields:
        fields["response"] = fields.pop("completion")
    return fields
