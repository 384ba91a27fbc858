"""Random scores: what chance gives, below which no method may be."""

# N samples, Q queries

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from fastsft.attribution.methods._base import Queries
from fastsft.attribution.methods._samples_only import SampleMethod
from fastsft.attribution.methods._scores import Block


class Random(SampleMethod):
    """A number in [-1, 1) hashed from seed, sample id and query name: the order of samples and queries changes none."""

    name = "random"
    unit = "random in [-1, 1): no unit that means anything in nats"

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def blocks(self, queries: Queries) -> Iterator[Block]:
        """Yield a block a query."""
        places = list(range(len(self.samples)))
        for number, name in enumerate(queries.names):
            values = torch.tensor([self._number(row.id, name) for row in self.samples], dtype=torch.float32)
            yield Block(places, number, values[:, None])

    def _number(self, sample: str, query: str) -> float:
        # lengths first: no two pairs of names are written alike
        key = f"{self.seed} {len(sample)} {sample} {query}".encode()
        # 24 bits: float32 holds them all, so 1 is never rounded to
        return int.from_bytes(hashlib.blake2b(key, digest_size=3).digest(), "little") / 2**23 - 1.0
