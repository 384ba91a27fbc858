"""From a Gram matrix to what each ability's gradient is multiplied by: a resolver asked, its weights within limits."""

# K abilities

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastsft.attribution.gram import Array, read_gram
from fastsft.tasks import MixError, Resolver

# a weight of zero, relative to the largest: small enough to get nothing as long as another can take it
_VANISHING = 1e-200


def weigh(resolver: Resolver, gram: Any) -> Array:
    """Ask any resolver, a user's own included, for weights [K] in float64, and check that its answer is such."""
    values = read_gram(gram)
    weights = np.asarray(resolver(values), dtype=np.float64)
    if weights.shape != (len(values),) or not np.isfinite(weights).all():
        raise MixError(
            f"a resolver must answer with {len(values)} finite weights, one for each row of `gram`: "
            f"{type(resolver).__name__} gave {weights.tolist()}."
        )
    return weights


def factors(weights: Any, limits: tuple[float, float] = (1 / 3, 3)) -> Array:
    """Turn weights [K] into factors of the abilities' losses [K]: K w / sum(w), within limits, the sum K.

    The sum keeps a resolver from being a learning-rate schedule in disguise. f_i = t w_i clipped to the limits, with
    the one t that gives the sum (to rounding). A negative weight counts as 0: a factor lessens a pull, it doesn't
    reverse it. Where no weight is positive all factors are 1; where the positive ones, all at their upper limit, leave
    some of the sum, the zeros share it.
    """
    given = np.asarray(weights, dtype=np.float64)
    if given.ndim != 1 or not given.size or not np.isfinite(given).all():
        raise MixError(f"`weights` must be [K], finite, of at least one ability: got {given.tolist()}.")
    low, high = limits
    if not 0 <= low <= 1 <= high < math.inf:
        raise MixError(f"`limits` must hold 1 between them, the lower not negative: got {limits}.")
    K, top = len(given), given.max()
    if top <= 0:
        return np.ones(K)
    # by the largest, so that equal weights give 1 exactly
    parts = np.maximum(given / top, _VANISHING)
    # the sum rises with t, with a bend wherever a factor leaves or meets a limit: find the last bend before K
    bends = np.sort(np.append(low / parts, high / parts))
    before = max(bend for bend in bends if math.fsum(np.clip(bend * parts, low, high)) <= K or bend == bends[0])
    free = (low / parts <= before) & (high / parts > before)
    if not free.any():
        return np.clip(before * parts, low, high)
    rest = K - math.fsum(np.clip(before * parts, low, high)[~free])
    return np.clip(rest / math.fsum(parts[free]) * parts, low, high)
