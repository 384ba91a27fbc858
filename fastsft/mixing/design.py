"""Which mixes to try before a run: points spread over the simplex of shares, the same for the same seed."""

# K sources, n mixes

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from fastsft.mixing.core import Array
from fastsft.tasks import MixError

# scrambles of the sequence that are looked at; the best spread of them is taken
_SCRAMBLES = 32
# how far a scramble is judged: it must be good wherever its user stops
_PREFIXES = (8, 16, 32, 64)


def design(
    sizes: Sequence[float], number: int, *, seed: int = 0, least: float = 0.0, most: Sequence[float] | None = None
) -> Array:
    """Choose mixes to try: uniform, proportional to `sizes` [K], then a low-discrepancy sequence -> [number, K].

    Scrambled Sobol points (of 32 scrambles the one whose points keep most apart) are carried onto the simplex by
    sticks broken in turn: uniform there, Dirichlet(1). least, most [K]: shares that the points of the sequence keep
    within; the first two mixes stay what they are. The mixes of a smaller `number` are the first of a larger one, so
    that pilots can be added. Proportional is left out where it is uniform.
    """
    if number < 1 or len(sizes) < 2 or not all(size > 0 for size in sizes):
        raise MixError(
            f"a design needs a `number` of 1 or more, and positive `sizes` of two sources or more: got {number} and "
            f"{list(sizes)}."
        )
    K = len(sizes)
    low, high = bounds(K, least, most)
    anchors = np.array([np.full(K, 1 / K), np.asarray(sizes, dtype=np.float64) / np.sum(sizes)])
    if np.allclose(anchors[0], anchors[1], atol=1e-6):
        anchors = anchors[:1]
    # a share of `least` for each, and the sequence over what is left: nothing piles up at the edge
    points = np.full(K, least) + (1 - K * least) * spread(K, max(number - len(anchors), 1), seed)
    return np.concatenate([anchors, within(points, low, high)])[:number]


def bounds(sources: int, least: float, most: Sequence[float] | None) -> tuple[Array, Array]:
    """Check the smallest and largest shares -> low [K], high [K], of which some mix keeps both."""
    high = np.ones(sources) if most is None else np.minimum(np.asarray(most, dtype=np.float64), 1.0)
    if not 0 <= least < 1 / sources:
        raise MixError(f"the least share of {sources} sources must be at least 0 and below 1/{sources}: got {least}.")
    if high.shape != (sources,) or not (high >= 0).all() or high.sum() < 1 - 1e-9:
        raise MixError(
            f"the largest shares must be {sources} numbers, none negative, that sum to one or more: got "
            f"{high.round(4).tolist()}, which sum to {high.sum():.4g}."
        )
    return np.minimum(least, high), high


def within(mixes: Array, low: Array, high: Array) -> Array:
    """Carry mixes [n, K] to the nearest, in relative entropy, that keep low <= share <= high [K].

    Those shares that are free keep their ratios: share = clip(s * share, low, high), with the s that makes one of the
    sum (by bisection, to rounding). `core.project` does the same to one mix, exactly; this to thousands at once.
    """
    shares = np.maximum(mixes, 1e-12)
    left, right = np.full(len(shares), -30.0), np.full(len(shares), 30.0)  # of log s
    for _ in range(64):
        middle = (left + right) / 2
        total = np.clip(np.exp(middle)[:, None] * shares, low, high).sum(1)
        left, right = np.where(total < 1, middle, left), np.where(total < 1, right, middle)
    found = np.clip(np.exp(right)[:, None] * shares, low, high)
    return found / found.sum(1, keepdims=True)


def spread(sources: int, number: int, seed: int) -> Array:
    """The first `number` points of the sequence on the simplex -> [number, K]."""
    return broken_sticks(_sobol(sources - 1, number, seed, _best_scramble(sources, seed)))


@functools.lru_cache(maxsize=8)
def _best_scramble(sources: int, seed: int) -> int:
    """The scramble whose beginnings keep their points, and the uniform mix, furthest apart."""
    longest = [
        np.concatenate(
            [np.full((1, sources), 1 / sources), broken_sticks(_sobol(sources - 1, _PREFIXES[-1], seed, at))]
        )
        for at in range(_SCRAMBLES)
    ]
    scores = [sum(np.log(least_distance(points[:size]) + 1e-12) for size in _PREFIXES) for points in longest]
    return int(np.argmax(scores))


def _sobol(dimensions: int, number: int, seed: int, scramble: int) -> Array:
    from scipy.stats import qmc  # a second to import, for planning alone

    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, scramble])))
    # whole powers of two, of which the first are taken: the balance of the sequence is that of its blocks
    return qmc.Sobol(dimensions, seed=generator).random_base2(max(0, (number - 1).bit_length()))[:number]


def broken_sticks(points: Array) -> Array:
    """Carry points [n, K-1] of the unit cube onto the simplex [n, K], uniform onto uniform.

    Rosenblatt's transform: source i takes 1 - u^(1/(K-1-i)) of what the sources before it left. One to one and
    smooth, so points that keep apart stay so; sorting the points, or dividing exponentials by their sum, folds several
    places of the cube onto one. For K = 3..8 and n = 14..62 the least distance of its points was 1.2 to 3.6 times that
    of independent draws (means of 60 seeds); of sorted points 1.1 to 1.6 times, of exponentials 1.1 to 1.3 times.
    """
    n, rest = points.shape
    found, left = np.empty((n, rest + 1)), np.ones(n)
    for at in range(rest):
        found[:, at] = left * (1 - points[:, at] ** (1 / (rest - at)))
        left = left - found[:, at]
    found[:, -1] = left
    return found


def least_distance(mixes: Array) -> float:
    """The smallest distance of two mixes of [n, K], between the roots of their shares (Hellinger's, but for 1/sqrt 2).

    By roots, since a law sees them: from 0 to 1 % is as far as from 25 to 36 %.
    """
    roots = np.sqrt(mixes)
    apart = np.linalg.norm(roots[:, None] - roots[None], axis=2)
    return float(apart[np.triu_indices(len(mixes), 1)].min(initial=np.inf))
