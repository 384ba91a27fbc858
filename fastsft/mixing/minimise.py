"""The mix with the lowest forecast loss, held to a prior as strongly as the pilots are noisy, within largest shares."""

# K sources, m mixes

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize

from fastsft.mixing.core import Array
from fastsft.mixing.design import spread, within
from fastsft.mixing.law import LAWS, Blend

# mixes looked at over the whole simplex, and in each round about the best
_WIDE, _NEAR = 4096, 512
# of the way from the best mix to points all over the simplex, round by round
_REACH = (0.3, 0.3, 0.1, 0.1, 0.03, 0.03, 0.01, 0.003)
# a share below it is none
_TRACE = 1e-5
# where pilots explain less than this of their variance, the prior stays
_LEAST_EXPLAINED = 0.01


def best_mix(blend: Blend, prior: Array, low: Array, high: Array, *, strength: float, seed: int = 0) -> Array:
    """Minimise forecast loss + (strength * sd / explained) KL(mix || prior) over low <= share <= high [K].

    sd: of the pilots' mean losses, so `strength` has no unit: at Olmix's 0.1, going a whole nat of KL away from the
    prior must gain a tenth of what mixes differ by. explained: the share of the pilots' variance that the surrogates
    foretell (left out one by one); the less it is, the more the mix is held, and where it is none the prior stays.
    """
    home = within(prior[None], low, high)[0]
    if blend.explained < _LEAST_EXPLAINED:
        return home
    weight = strength * float(blend.losses.std()) / blend.explained

    def objective(mixes: Array) -> Array:
        return blend.predict(mixes) + weight * divergence(mixes, prior)

    def smooth(mixes: Array) -> Array:
        return blend.predict(mixes, LAWS) + weight * divergence(mixes, prior)

    points = spread(len(prior), _WIDE, seed)
    # half of them nearer to the faces: a source that harms is best left out
    faces = np.maximum(points - np.sort(points, axis=1)[:, [-2]] / 2, 0)
    candidates = within(np.concatenate([home[None], points, faces / faces.sum(1, keepdims=True)]), low, high)
    starts = [home, candidates[int(np.argmin(objective(candidates)))]]
    best = min([*starts, *(descend(smooth, start, low, high) for start in starts)], key=_of_one(objective))
    for reach in _REACH:  # trees have steps and no slope, so the last of the way is looked for, not descended
        near = within((1 - reach) * best + reach * points[:_NEAR], low, high)
        best = min([best, near[int(np.argmin(objective(near)))]], key=_of_one(objective))
    return _without_traces(best, low, high)


def _without_traces(mix: Array, low: Array, high: Array) -> Array:
    """Leave out what is next to nothing: a run that draws one row of a source in a hundred thousand draws none."""
    trace = (mix < _TRACE) & (low <= 0)
    found = np.where(trace, 0.0, mix)
    found[np.argmax(np.where(trace, -1.0, high - found))] += mix[trace].sum()  # of the others, where most room is
    return found


def descend(objective: Callable[[Array], Array], start: Array, low: Array, high: Array) -> Array:
    """Follow a smooth objective from `start` to a minimum within the bounds (SLSQP)."""
    edge = np.maximum(low, np.minimum(1e-6, high))  # square roots have no slope at zero
    end = minimize(
        _of_one(objective),
        np.clip(start, edge, high),
        method="SLSQP",
        bounds=list(zip(edge, high, strict=True)),
        constraints={"type": "eq", "fun": lambda mix: mix.sum() - 1},
        options={"maxiter": 200, "ftol": 1e-10},
    )
    return within(np.clip(end.x, edge, high)[None], low, high)[0]


def divergence(mixes: Array, prior: Array) -> Array:
    """KL(mix || prior) of mixes [m, K] -> [m] nats; a share of zero adds nothing."""
    shares = np.maximum(mixes, 1e-300)
    return np.sum(mixes * (np.log(shares) - np.log(np.maximum(prior, 1e-300))), axis=1)


def _of_one(objective: Callable[[Array], Array]) -> Callable[[Sequence[float] | Array], float]:
    return lambda mix: float(objective(np.asarray(mix, dtype=np.float64)[None])[0])
