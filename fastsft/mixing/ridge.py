"""Bayesian linear regression that forgets, and keeps its prior: what a thousand tokens of each source do to a loss."""

# K sources, N intervals

from __future__ import annotations

import numpy as np

from fastsft.mixing.core import Array


class Ridge:
    """Learn theta [K] in y = x . theta + noise from one (x, y) at a time.

    After N of them, with forgetting f and prior N(mean, diag(deviation^2)), the posterior is that of a ridge on all:

        precision = diag(1 / deviation^2) + sum_n f^(N - n) x_n x_n^T / variance_n
        theta = mean + precision^-1 sum_n f^(N - n) x_n (y_n - x_n . mean) / variance_n

    The prior itself is not forgotten, and may be another at each reading.
    """

    def __init__(self, num_sources: int, forgetting: float) -> None:
        self.forgetting = forgetting
        self.squares, self.products = np.zeros((num_sources, num_sources)), np.zeros(num_sources)

    def add(self, x: Array, y: float, variance: float) -> None:
        self.squares = self.forgetting * self.squares + np.outer(x, x) / variance
        self.products = self.forgetting * self.products + x * y / variance

    def posterior(self, mean: Array, deviation: Array) -> tuple[Array, Array]:
        """Give theta's mean [K] and covariance [K, K]."""
        # in units of the deviation: the precision is then at least the identity
        units = deviation[:, None] * deviation
        covariance = np.linalg.inv(np.eye(len(mean)) + units * self.squares) * units
        covariance = (covariance + covariance.T) / 2
        return mean + covariance @ (self.products - self.squares @ mean), covariance
