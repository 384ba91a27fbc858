"""The Gram matrix of the abilities' gradients, G_ij = <g_i, g_j>, until a resolver sees it: unbiased, smooth, positive.

Of noisy gradients the same-batch norm |g_i|^2 is too large by the noise (2 to 37 times on a small model), so cosines
shrink. The product of two batches' gradients is right in the mean, but its diagonal may be zero or below. It must not
reach a resolver as it is, nor be divided by: `cosines` adds to the norms, `positive` mends the matrix.
"""

# K abilities, N numbers of one gradient or sketch

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsft.tasks import MixError

Array = NDArray[np.float64]

# relative to the largest entry or to the trace: what float32 sums of a million products leave
_ROUNDING = 1e-6


def read_gram(gram: Any) -> Array:
    """Check that a Gram matrix is square [K, K], finite and symmetric -> float64, exactly symmetric."""
    values = np.asarray(gram, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise MixError(
            f"`gram` must be square [K, K], a row and a column for each ability: got the shape {list(values.shape)}."
        )
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise MixError(
            f"`gram` must be finite: entry ({row}, {column}) is {values[row, column]}. "
            f"Is every ability's loss still finite?"
        )
    apart = np.abs(values - values.T)
    if apart.max() > _ROUNDING * np.abs(values).max():
        row, column = np.unravel_index(apart.argmax(), apart.shape)
        raise MixError(
            f"`gram` must be symmetric: entry ({row}, {column}) is {values[row, column]:.6g} and its mirror "
            f"{values[column, row]:.6g}. Two batches' product is made symmetric by `cross_gram`."
        )
    return (values + values.T) / 2


def spectrum(gram: Any) -> tuple[Array, Array]:
    """Give eigenvalues [K], lowest first, and eigenvectors [K, K] of a Gram matrix; a negative eigenvalue is refused.

    Below zero by rounding counts as zero.
    """
    values, vectors = np.linalg.eigh(read_gram(gram))
    if values[0] < -_ROUNDING * np.abs(values).sum():
        raise MixError(
            f"`gram` must have no negative eigenvalue: the lowest is {values[0]:.3g}, the highest {values[-1]:.3g}. "
            f"A product of two batches may have one: hand it through `positive` first."
        )
    return np.maximum(values, 0), vectors


def cross_gram(first: Any, second: Any) -> Array:
    """Multiply the abilities' gradients of two batches: 1/2 (F S^T + S F^T), [K, N] twice -> [K, K].

    Right in the mean, diagonal included, where the two batches have no row in common. Copies both to float64.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.ndim != 2 or one.shape != other.shape or not one.size:
        raise MixError(
            f"`first` and `second` must be gradients [K, N] of the same abilities: got {list(one.shape)} and "
            f"{list(other.shape)}."
        )
    product = one @ other.T
    return (product + product.T) / 2


def smooth_gram(previous: Any | None, gram: Any, decay: float) -> Array:
    """Average with what came before: decay * previous + (1 - decay) * gram; the first one counts whole.

    It evens out noise that is drawn anew each time. Of gradients on the same target rows again and again it does not.
    """
    if not 0 <= decay < 1:
        raise MixError(f"`decay` must be at least 0 and below 1: got {decay}. 0 keeps no past.")
    now = read_gram(gram)
    if previous is None:
        return now
    before = read_gram(previous)
    if before.shape != now.shape:
        raise MixError(
            f"`previous` and `gram` must be of the same abilities: got {list(before.shape)} and {list(now.shape)}."
        )
    return decay * before + (1 - decay) * now


def positive(gram: Any, norms: Any | None = None, keep: float = 0.05) -> Array:
    """Make a Gram matrix whose diagonal was freed from noise fit for a resolver: no eigenvalue below zero.

    norms [K]: same-batch squared norms; the diagonal becomes (1 - keep) * its own + keep * norms. Then eigenvalues
    below zero become zero, which gives the nearest matrix without any (Higham 1988); a resolver's own ridge does the
    rest.
    A diagonal freed from noise wholly (keep 0) makes conflicts of noise; the same-batch one (keep 1) hides those that
    are. Half the sum of |differences| between UPGrad's weights and the true ones at keep 0 / 0.05 / 1, simulated, mean
    of 60 draws of 5 gradients [2000] whose same-batch norms are 20 times too large: without conflict .22 / .12 / .01
    from one batch and .05 / .02 / .01 from the mean of 12, with strong conflict .23 / .20 / .21 and .13 / .17 / .23.
    """
    values = read_gram(gram)
    if not 0 <= keep <= 1:
        raise MixError(f"`keep` is a share of the same-batch norms, 0 to 1: got {keep}.")
    if norms is not None:
        diagonal = (1 - keep) * values.diagonal() + keep * _read_norms(norms, len(values))
        values[np.diag_indices_from(values)] = diagonal
    eigenvalues, vectors = np.linalg.eigh(values)
    if eigenvalues[0] >= 0:
        return values
    mended = (vectors * np.maximum(eigenvalues, 0)) @ vectors.T
    return (mended + mended.T) / 2


def cosines(gram: Any, norms: Any | None = None, shrink: float = 0.1) -> Array:
    """Give cosines drawn towards zero where gradients are small: G_ij / sqrt((n_i + tau) (n_j + tau)), within [-1, 1].

    norms [K]: same-batch squared norms n; without them the diagonal, 0 where it is negative. tau = shrink * mean(n), so
    nothing is divided by a norm near zero. The diagonal is not 1: with norms it is the share of n_i that isn't noise.
    """
    values = read_gram(gram)
    if not (np.isfinite(shrink) and shrink >= 0):
        raise MixError(f"`shrink` must not be negative: got {shrink}. It is relative to the mean squared norm.")
    size = np.maximum(values.diagonal(), 0) if norms is None else _read_norms(norms, len(values))
    length = np.sqrt(size + shrink * size.mean())
    scale = np.outer(length, length)
    return np.clip(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0), -1, 1)


def conflicts(gram: Any, norms: Any | None = None, shrink: float = 0.1) -> list[tuple[int, int, float]]:
    """List the pairs (i, j, cosine), i < j, whose cosine is below zero, the lowest first.

    Not all that harms: the same prompts with contradictory answers had cosines of +0.6 to +0.98.
    """
    found = cosines(gram, norms, shrink)
    pairs = [(i, j, float(found[i, j])) for i in range(len(found)) for j in range(i + 1, len(found)) if found[i, j] < 0]
    return sorted(pairs, key=lambda pair: pair[2])


def _read_norms(norms: Any, K: int) -> Array:
    values = np.asarray(norms, dtype=np.float64)
    if values.shape != (K,) or not (np.isfinite(values).all() and (values >= 0).all()):
        raise MixError(
            f"`norms` [K] must be the squared norms of {K} gradients, none negative: got {values.tolist()}. "
            f"The diagonal of a product of two batches is not meant here."
        )
    return values
