"""An answer as lines for a terminal: aligned, and no wider than it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from fastsft.train.estimate import Estimate
from fastsft.train.query import Answer

_SIDES = {
    "helpful": "most helpful (training on them lowers the query's loss):",
    "harmful": "most harmful (training on them raises the query's loss):",
    # of a baseline
    "highest": "highest scores:",
    "lowest": "lowest scores:",
}


def answer_lines(answer: Answer | Estimate, *, width: int = 100, by_source: bool = False) -> Iterator[str]:
    """Yield the tables of every query: the samples of both signs, and with `by_source` sums and means by source."""
    yield answer.heading if isinstance(answer, Estimate) else f"{answer.store.path}: {len(answer.store)} rows"
    yield f"score: {answer.unit}"
    yield from answer.notes
    for number, query in enumerate(answer.queries):
        yield ""
        yield f"query: {query}"
        for side, hits in answer.hits(number).items():
            yield _SIDES[side] if hits else f"{_SIDES[side][:-1]}: none"
            yield from _aligned(_hit_rows(hits), width)
        if by_source:
            yield "by source:"
            rows = [["source", "rows", "sum", "mean"]]
            for name, entry in answer.by_source(number).items():
                rows.append([name, str(entry["rows"]), _number(entry["sum"]), _number(entry["mean"])])
            yield from _aligned(rows, width)


def _hit_rows(hits: Sequence[dict[str, Any]]) -> list[list[str]]:
    if not hits:
        return []
    stepped = any(hit["step"] is not None for hit in hits)
    rows = [["", "score", "source", "id", *(["step"] if stepped else []), "text"]]
    for rank, hit in enumerate(hits, start=1):
        text = "" if hit["prompt"] is None else f"{hit['prompt']} -> {hit['response']}"
        step = [str(hit["step"])] if stepped else []
        rows.append([str(rank), _number(hit["score"]), hit["source"], hit["id"], *step, text])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def _aligned(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Pad columns to their widest cell, and cut lines at `width`: the last column is the one that may be long."""
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell + " " * (wide - _width(cell)) for cell, wide in zip(row[:-1], widths, strict=False))
        yield _cut(f"  {line}  {row[-1]}", width).rstrip()


def _plain(text: str) -> str:
    """One line, without the control characters that a terminal would obey."""
    return "".join(each for each in " ".join(text.split()) if unicodedata.category(each)[0] != "C")


def _width(text: str) -> int:
    return sum(_columns(each) for each in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    kept, used = [], 0
    for character in text:
        used += _columns(character)
        if used > width - 3:
            break
        kept.append(character)
    return "".join(kept) + "..."
