"""Fit a straight line to few noisy numbers, leaning on what was thought before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ROUNDS = 100


def ridge(columns: Array, changes: Array, prior: Array, spread: Array) -> tuple[Array, Array]:
    """Fit changes [T] = columns [T, P] @ slopes + noise, where slopes ~ Normal(prior, spread^2) [P]; needs T > P.

    Gives the posterior's mean and standard deviation, [P] each, at the noise variance v which the fit itself names:
    the fixed point of v = sum of squared residuals / (T - trace of the hat matrix) (MacKay, Neural Computation 1992).
    With Z = columns * spread: mean = prior + spread * (Z'Z + v I)^-1 Z' (changes - columns @ prior), and the variance
    is spread^2 * v * diag (Z'Z + v I)^-1.
    """
    scaled, aim = columns * spread, changes - columns @ prior
    strengths, axes = np.linalg.eigh(scaled.T @ scaled)
    strengths = np.clip(strengths, 0.0, None)
    pull = axes.T @ (scaled.T @ aim)
    # an exact fit has no noise but what rounding leaves, and must not divide by it
    least = (1e-9 * float(np.abs(changes).max(initial=0.0)) + 1e-30) ** 2
    noise = max(float(aim @ aim) / len(aim), least)
    for _ in range(_ROUNDS):
        left = aim - scaled @ (axes @ (pull / (strengths + noise)))
        fitted = float((strengths / (strengths + noise)).sum())
        noise = max(float(left @ left) / (len(aim) - fitted), least)
    mean = prior + spread * (axes @ (pull / (strengths + noise)))
    return mean, spread * np.sqrt(axes**2 @ (noise / (strengths + noise)))
