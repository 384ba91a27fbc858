"""The nouns of a sketch; the arithmetic is in `fastsft.ops`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsft.capturing import EXTRAS

KINDS = ("sjlt", "factored", "kronecker")
PRECONDITIONS = (None, "adam", "ekfac")


@dataclass(frozen=True, kw_only=True)
class SketchSpec:
    """How gradients are compressed to `size` numbers that keep inner products in the mean."""

    # "sjlt": blocked sparse Johnson-Lindenstrauss transform of the whole gradient, one nonzero a coordinate; the error
    # of a cosine is about 1/sqrt(size) whatever the gradient's rank. "factored" and "kronecker" (LoGra,
    # arXiv 2405.13954) compress a layer's inputs and output gradients apart, before their product.
    kind: str = "sjlt"
    size: int = 4096
    seed: int = 0
    # by what the gradient is whitened before: the optimizer's second moments, or EK-FAC's eigenvalues
    precondition: str | None = None
    # what is sketched beside linear layers: "embedding", "norm"
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}: got {self.kind!r}.")
        if type(self.size) is not int or self.size < 16 or self.size % 16:
            raise ValueError(f"`size` must be a positive multiple of 16: got {self.size}.")
        if type(self.seed) is not int:
            raise TypeError(f"`seed` must be a whole number: got {self.seed!r}.")
        if self.precondition not in PRECONDITIONS:
            raise ValueError(f"`precondition` must be None, 'adam' or 'ekfac': got {self.precondition!r}.")
        if not isinstance(self.extra, tuple) or set(self.extra) - set(EXTRAS) or len(set(self.extra)) < len(self.extra):
            raise ValueError(f"`extra` must be a tuple of {' and '.join(map(repr, EXTRAS))}: got {self.extra!r}.")
        if self.kind == "kronecker" and self.size & (self.size - 1):
            raise ValueError(f"kind 'kronecker' needs a `size` that is a power of two: got {self.size}.")
        if self.kind != "sjlt" and (self.precondition is not None or self.extra):
            raise ValueError(
                f"`precondition` and `extra` need the gradient's own coordinates, which kind {self.kind!r} gives up: "
                f"use kind 'sjlt', or leave them out."
            )
        if self.precondition == "ekfac" and "embedding" in self.extra:
            raise ValueError(
                "EK-FAC of an embedding would keep one eigenvalue for every token and width of the vocabulary: "
                "use precondition 'adam', or leave 'embedding' out of `extra`."
            )

    def layer_seed(self, name: str) -> int:
        """Key the hash by seed and parameter name: 32 bits that no batch order or device can change."""
        key = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=4).digest()
        return int.from_bytes(key, "little")

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, of types that JSON knows."""
        return {**dataclasses.asdict(self), "extra": list(self.extra)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SketchSpec:
        """Read what `as_dict` wrote: every field must be there, and no other."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != expected:
            raise ValueError(
                f"a SketchSpec has the fields {', '.join(sorted(expected))}: "
                f"missing {sorted(expected - set(fields))}, unknown {sorted(set(fields) - expected)}. "
                f"Was it written by another version?"
            )
        return cls(**{**fields, "extra": tuple(fields["extra"])})
