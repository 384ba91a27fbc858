"""What `fastsft evaluate` prints: one line a method, and the sentence that sums them up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastsft.evaluate.intervals import Value
from fastsft.evaluate.lds import LdsRow
from fastsft.evaluate.removal import RemovalRow
from fastsft.evaluate.tail_patch import TailRow

BASELINE = "bm25"


def lds_lines(rows: Sequence[LdsRow], tail: Sequence[TailRow]) -> Iterator[str]:
    """Yield the table of methods: those that score queries, then those that score abilities only."""
    falls = {row.method: row.fall for row in tail}
    names = [row.method if row.per == "query" else f"{row.method} (by ability)" for row in rows]
    wide = max(len(name) for name in [*names, "method"])
    yield f"{'method':{wide}}  {'LDS':22}  of ceiling  {'minus BM25':22}  tail-patch, 1e-3 nats"
    for name, row in zip(names, rows, strict=True):
        ceiling = f"{row.of_ceiling:.2f}" if math.isfinite(row.of_ceiling) else "-"
        difference = "-" if row.difference is None else text(row.difference)
        fall = text(falls[row.method], unit=1e-3) if row.method in falls else "-"
        yield f"{name:{wide}}  {text(row.lds):22}  {ceiling:>10}  {difference:22}  {fall}"


def removal_lines(rows: Sequence[RemovalRow]) -> Iterator[str]:
    """Yield what removing each method's top samples cost, an ability a column."""
    abilities = list(dict.fromkeys(row.ability for row in rows))
    costs = {(row.method, row.ability): text(row.cost) for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    wide = max(len(name) for name in [*methods, "method"])
    yield f"{'method':{wide}}  " + "  ".join(f"{ability:22}" for ability in abilities)
    for method in methods:
        yield f"{method:{wide}}  " + "  ".join(f"{costs.get((method, ability), '-'):22}" for ability in abilities)


def verdict(rows: Sequence[LdsRow]) -> str:
    """Say which methods beat BM25 with an interval that excludes zero, or that none does."""
    judged = [row for row in rows if row.difference is not None]
    better = [row.method for row in judged if row.difference is not None and row.difference.low > 0]
    if better:
        verb = "beats" if len(better) == 1 else "beat"
        return f"{_listed(better)} {verb} BM25 in LDS, with 95 % intervals of the difference that exclude zero."
    return (
        "No method beats BM25 in LDS with a 95 % interval that excludes zero: on this run no score is known to say "
        "more than shared words do."
    )


def text(value: Value, unit: float = 1.0) -> str:
    """Write a value with its interval, in a unit."""
    mean, low, high = (each / unit for each in value)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def plain(value: Any) -> Any:
    """Turn rows and values into types that JSON knows; what is undefined is null."""
    if isinstance(value, Value):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
