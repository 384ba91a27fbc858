"""Small stores with known contents."""

import torch

from fastsft import ops
from fastsft.store import StoreWriter

SOURCES = ["maths", "code", "chat"]


def settings(format="int8", size=192, blocks=1, **changes):
    return {
        "spec": {"kind": "sjlt", "size": size, "seed": 0, "loss": "sum"},
        "size": size,
        "format": format,
        "blocks": blocks,
        "sources": SOURCES,
        "model": {"name": "tiny", "digest": "0123"},
        "shard_rows": 4,
    } | changes


class Samples:
    """N made-up samples; a slice of them can be appended."""

    def __init__(self, number, size=192, seed=0, prefix="sample"):
        generator = torch.Generator().manual_seed(seed)
        self.sketches = torch.randn(number, size, generator=generator)
        self.ids = [f"{prefix}-{row:05d}" for row in range(number)]
        self.sources = [SOURCES[row % 7 % 3] for row in range(number)]
        self.steps = [row // 2 for row in range(number)]
        self.tokens = [row % 50 + 1 for row in range(number)]

    def append(self, writer, start=0, stop=None):
        here = slice(start, stop)
        writer.append(
            self.sketches[here],
            ids=self.ids[here],
            sources=self.sources[here],
            steps=self.steps[here],
            tokens=self.tokens[here],
        )

    @property
    def groups(self):
        return [SOURCES.index(name) for name in self.sources]


def write(path, samples, **changes):
    """Write the samples three at a time, so that appends and shards do not end together."""
    with StoreWriter.create(path, **settings(size=samples.sketches.shape[1], **changes)) as writer:
        for start in range(0, len(samples.ids), 3):
            samples.append(writer, start, start + 3)
    return path


def same_rows(ours, theirs):
    assert ours.format == theirs.format
    assert torch.equal(ours.data, theirs.data)
    assert (ours.scales is None) == (theirs.scales is None)
    assert ours.scales is None or torch.equal(ours.scales, theirs.scales)


def encoded(samples, format="int8", blocks=1):
    return ops.encode_rows(samples.sketches, format, blocks)
