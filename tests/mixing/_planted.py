"""Planted truths: what an ability's loss would be under a mix, of two kinds, and a third in which nothing matters."""

import numpy as np

from fastsft.mixing.design import design

NAMES = ("apples", "bricks", "clouds", "dunes", "elms")
SIZES = (1.0, 2.0, 3.0, 4.0, 5.0)


def exponential(seed, *, sources=5, abilities=2):
    """floor + exp(1/2 + t . sqrt(mix)): each ability has a source of its own, and the last source harms all."""
    draw = np.random.default_rng(seed)
    floors = draw.uniform(0.5, 1.5, abilities)
    slopes = -draw.exponential(0.3, (abilities, sources))
    slopes[range(abilities), range(abilities)] = -draw.uniform(1.5, 3, abilities)
    slopes[:, -1] = draw.uniform(0, 1, abilities)
    return lambda mixes: floors + np.exp(0.5 + np.sqrt(mixes) @ slopes.T)


def saturating(seed, *, sources=5, abilities=2):
    """floor + 1.5 (1 + 20 data)^-b, data = what the sources hold for an ability: of no surrogate's form."""
    draw = np.random.default_rng(seed)
    floors, powers = draw.uniform(0.5, 1.5, abilities), draw.uniform(0.3, 0.7, abilities)
    holds = draw.uniform(0, 0.2, (abilities, sources))
    holds[range(abilities), range(abilities)] = 1
    holds[:, -1] = -draw.uniform(0, 0.3, abilities)
    return lambda mixes: floors + 1.5 * (1 + np.maximum(20 * mixes @ holds.T, -0.5)) ** -powers


def flat(seed, *, sources=5, abilities=2):
    """No mix is better than another."""
    return lambda mixes: np.full((len(mixes), abilities), 2.0)


def pilots(truth, number, *, seed=0, noise=0.15, sizes=SIZES, **bounds):
    """The designed mixes and what pilots on them measure; noise in standard deviations of an ability's losses."""
    mixes = design(sizes, number, seed=seed, **bounds)
    return mixes, noisy(truth(mixes), noise, np.random.default_rng(seed))


def noisy(losses, noise, draw):
    spread = losses.std(0)
    return losses + noise * np.where(spread > 1e-12, spread, 1.0) * draw.normal(size=losses.shape)
