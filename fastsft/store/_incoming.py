"""What a writer checks of the rows it is given, before it takes any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import pyarrow as pa
import torch
from torch import Tensor

from fastsft.ops import Rows, encode_rows
from fastsft.store._files import StoreError
from fastsft.store.manifest import NAME, Manifest

Pair = tuple[str, int | None]
_KINDS: dict[str, tuple[type, str]] = {
    "id": (str, "strings"),
    "source": (str, "strings"),
    "step": (SupportsIndex, "whole numbers"),
    "tokens": (SupportsIndex, "whole numbers"),
}


def check_sketches(path: Path, size: int, sketches: Tensor) -> None:
    if sketches.ndim != 2 or sketches.shape[1] != size or not sketches.is_floating_point():
        raise StoreError(
            f"{path} holds sketches of K={size} numbers: got {tuple(sketches.shape)} of {sketches.dtype}, "
            f"expected [n, {size}] of float32."
        )


def check_columns(columns: Mapping[str, Sequence[Any] | None], number: int) -> None:
    for name, values in columns.items():
        argument = name if name == "tokens" else f"{name}s"
        if values is None:
            continue
        if isinstance(values, str) or len(values) != number:
            raise ValueError(f"`{argument}` must be a list of one a sketch: got {values!r} for {number} sketches.")
        kind, words = _KINDS[name]
        wrong = [value for value in values if not isinstance(value, kind)]
        if wrong:
            raise TypeError(f"`{argument}` must be {words}: got {wrong[0]!r}.")


def check_sources(path: Path, known: Sequence[str], sources: Sequence[str]) -> None:
    unknown = sorted({*sources} - {*known})
    if unknown:
        raise StoreError(
            f"{path / NAME} does not know the source {unknown[0]!r}: it lists {list(known)}. "
            f"Name every source when the store is created."
        )


def pairs_of(meta: pa.Table) -> list[Pair]:
    """Return (id, step) of every row: what must not come twice."""
    return list(zip(meta["id"].to_pylist(), meta["step"].to_pylist()))


def new_pairs(path: Path, seen: set[Pair], meta: pa.Table) -> set[Pair]:
    """Return the pairs of `meta`; one that was seen, or that comes twice, is refused."""
    pairs: set[Pair] = set()
    for id, step in pairs_of(meta):
        if (id, step) in seen or (id, step) in pairs:
            when = "without a step" if step is None else f"at step {step}"
            raise StoreError(
                f"{path} holds the sample {id!r} {when} already. "
                f"Skip what `writer.ids` names, or give each row the step it was taken at."
            )
        pairs.add((id, step))
    return pairs


def encode(path: Path, manifest: Manifest, sketches: Tensor, ids: Sequence[str]) -> Rows:
    """Encode the sketches, on their device, and bring them to the CPU; one that is not finite is refused by its id."""
    # float() also copies what is narrower: the caller may use its memory again.
    sketches = sketches.detach().float()
    bad = (~torch.isfinite(sketches)).any(1).nonzero().flatten().tolist()
    if bad:
        raise StoreError(
            f"{path}: the sketch of sample {ids[bad[0]]!r} has NaN or infinity. "
            f"Did its loss overflow? Leave the sample out, or compute it in float32."
        )
    rows = encode_rows(sketches, manifest.format, manifest.blocks)
    return Rows(rows.format, rows.data.cpu(), None if rows.scales is None else rows.scales.cpu())
