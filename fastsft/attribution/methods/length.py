"""Length: long answers first. A method whose scores follow it says little else."""

# N samples, Q queries

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastsft.attribution.methods._base import Queries
from fastsft.attribution.methods._samples_only import SampleMethod
from fastsft.attribution.methods._scores import Block


class Length(SampleMethod):
    """score(i, q) = the number of response tokens of sample i, the same for every query."""

    name = "length"
    unit = "response tokens of the sample: no unit that means anything in nats, and the same for every query"

    def blocks(self, queries: Queries) -> Iterator[Block]:
        """Yield one block."""
        lengths = torch.tensor([row.num_supervised for row in self.samples], dtype=torch.float32)
        yield Block(list(range(len(self.samples))), 0, lengths[:, None].repeat(1, len(queries)))
