"""Truths whose scores are known: losses that are sums over the samples of a subset, with noise of a known size."""

import torch

from fastsft.evaluate import Truth
from fastsft.evaluate.measure import draw_subsets


def linear_truth(*, samples=40, subsets=30, seeds=4, queries=12, noise=0.0, seed=0, abilities=("maths", "code")):
    """losses[m, s, q] = 2 - sum over subset m of effect[i, q] + noise; returns the truth and the effects [N, Q]."""
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(samples, queries, generator=generator, dtype=torch.float64)
    drawn = draw_subsets(samples, subsets, 0.5, seed)
    clean = 2 - drawn.double() @ effects
    shake = torch.randn(subsets, seeds, queries, generator=generator, dtype=torch.float64)
    truth = Truth(
        ids=[f"s{i}" for i in range(samples)],
        sources=[("apples", "bricks")[i % 2] for i in range(samples)],
        queries=[f"q{q}" for q in range(queries)],
        abilities=[abilities[q % len(abilities)] for q in range(queries)],
        tokens=torch.arange(3, 3 + queries),
        subsets=drawn,
        losses=clean[:, None] + noise * shake,
        base=torch.full((queries,), 2.0, dtype=torch.float64),
        full=(2 - effects.sum(0)).expand(seeds, queries).clone(),
        about={"digest": "of nothing", "queries_per_target": 6},
    )
    return truth, effects
