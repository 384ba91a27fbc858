"""Gram matrices to try resolvers on, by what is hard about them."""

import numpy as np

KINDS = ("random", "ill-conditioned", "rank-deficient", "conflicting", "conflict-free")
SIZES = range(2, 9)


def gram_of(kind, K, seed=0):
    """G [K, K] of gradients drawn from (kind, K, seed); its trace is about K, well above TorchJD's zero of 1e-4."""
    generator = np.random.Generator(np.random.Philox([seed, K, KINDS.index(kind)]))
    gradients = generator.standard_normal((K, 50)) / 50**0.5
    if kind == "ill-conditioned":
        # lengths from 1 to 1e-3: eigenvalues from 1 to 1e-6
        left, _, right = np.linalg.svd(gradients, full_matrices=False)
        gradients = (left * np.logspace(0, -3, K)) @ right
    elif kind == "rank-deficient":
        gradients = generator.standard_normal((K, max(1, K // 2))) @ gradients[: max(1, K // 2)]
    elif kind == "conflicting":
        # all pull apart from their mean, which is all but nothing
        gradients = gradients - 0.95 * gradients.mean(0) + 0.3 * np.outer(generator.standard_normal(K), gradients[0])
    elif kind == "conflict-free":
        gradients = np.abs(gradients)
    return gradients @ gradients.T
