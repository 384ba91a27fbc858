"""The nouns of a sketch; the arithmetic is in `fastsft.ops`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SketchSpec:
    """How gradients are compressed to `size` numbers that keep inner products in the mean.

    kind "sjlt": blocked sparse Johnson-Lindenstrauss transform of the whole gradient, one nonzero a coordinate;
    the error of a cosine is about 1/sqrt(size) whatever the gradient's rank.
    """

    kind: str = "sjlt"
    size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind != "sjlt":
            raise ValueError(f"`kind` must be 'sjlt': got {self.kind!r}.")
        if self.size < 16 or self.size % 16:
            raise ValueError(f"`size` must be a positive multiple of 16: got {self.size}.")

    def layer_seed(self, name: str) -> int:
        """Key the hash by seed and parameter name: 32 bits that no batch order or device can change."""
        key = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=4).digest()
        return int.from_bytes(key, "little")
