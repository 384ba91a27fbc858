"""Mixes that must be searched for: the best of a lattice, which no arm may look at, and one predicted from pilots.

The oracle is chosen by validation losses on seeds of its own, and reported on the test rows of the paired seeds. It is
a static mix; a policy may beat it. Pilots are of the seed that they predict for, as a user's are.
"""

# K sources, N parts

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.system.mixing_statistics import Result, final

# selection seeds are far from those that are reported
FIRST_SELECTION = 100
# of a run's tokens
PILOT_SHARE = 0.25
# what a source gives to another in each round of the search after the lattice
STEPS = (0.1, 0.05)

Weights = dict[str, float]


def lattice(sources: Sequence[str], parts: int) -> list[Weights]:
    """Mixes to begin a search with: uniform, uniform without each source, and a lattice in between.

    The lattice's shares are whole multiples of 1 / parts, averaged with uniform's: at the simplex' own edge, where a
    coarse lattice has most of its mixes, abilities starve that would have been served with a little.
    """
    K = len(sources)
    uniform = np.full(K, 1 / K)
    without = [(1 - np.eye(K)[source]) / (K - 1) for source in range(K)]
    found = [
        (uniform + (np.diff([-1, *bars, parts + K - 1]) - 1) / parts) / 2
        for bars in itertools.combinations(range(parts + K - 1), K - 1)
    ]
    return [dict(zip(sources, mix.tolist(), strict=True)) for mix in [uniform, *without, *found]]


def neighbours(mix: Mapping[str, float], step: float) -> list[Weights]:
    """All mixes in which one source gives `step`, or what it has, to another."""
    found = []
    for giver, taker in itertools.permutations(mix, 2):
        given = min(step, mix[giver])
        if given > 1e-9:
            found.append({**mix, giver: mix[giver] - given, taker: mix[taker] + given})
    return found


def name_of(mix: Mapping[str, float]) -> str:
    return "-".join(f"{weight:.4g}" for weight in mix.values())


def best_of(results: Mapping[str, Mapping[int, Result]]) -> str | None:
    """Name the mix {name: {seed: result}} of the lowest mean validation loss, of those that have all seeds."""
    most = max((len(runs) for runs in results.values()), default=0)
    scores = {
        name: statistics.fmean(validation(runs).values())
        for name, runs in results.items()
        if runs and len(runs) == most
    }
    return min(scores, key=lambda name: scores[name], default=None)


def validation(runs: Mapping[int, Result]) -> dict[str, float]:
    """Average each ability's final validation loss over seeds."""
    losses = [final(run, "validation") for run in runs.values()]
    return {ability: statistics.fmean(each[ability] for each in losses) for ability in losses[0]}


def pilot_mixes(sizes: Mapping[str, int], number: int, seed: int) -> list[Weights]:
    """The mixes that `fastsft mix plan` would try."""
    from fastsft.mixing.design import design

    mixes = design([float(size) for size in sizes.values()], number, seed=seed)
    return [dict(zip(sizes, mix, strict=True)) for mix in mixes.tolist()]


def predict(
    sizes: Mapping[str, int], runs: Sequence[tuple[Weights, Mapping[str, float]]], strength: float = 0.1
) -> Weights | None:
    """The mix that `fastsft mix plan` would choose after these runs and their losses; None of too few."""
    from fastsft.mixing.forecast import choose

    if len(runs) < len(sizes) + 2:
        return None
    mixes = np.array([[mix[name] for name in sizes] for mix, _ in runs])
    losses = {ability: [found[ability] for _, found in runs] for ability in runs[0][1]}
    return dict(choose(mixes, losses, sizes=sizes, strength=strength).chosen.weights)


def cost_of(runs: Sequence[Result]) -> dict[str, Any]:
    """What a search took."""
    return {
        "runs": len(runs),
        "tokens": sum(run["tokens"][-1] for run in runs),
        "seconds": round(sum(run["seconds"] for run in runs), 1),
    }
