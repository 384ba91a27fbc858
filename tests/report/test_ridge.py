from __future__ import annotations

import numpy as np
import pytest

from fastsft.report.ridge import ridge


def _world(seed: int = 0, noise: float = 0.1, intervals: int = 40):
    generator = np.random.default_rng(seed)
    columns = generator.normal(size=(intervals, 3))
    slopes = np.array([1.0, -0.5, 0.2])
    return columns, columns @ slopes + noise * generator.normal(size=intervals), slopes


def test_posterior_is_the_closed_form_at_a_noise_that_names_itself():
    columns, changes, _ = _world()
    prior, spread = np.array([0.5, 0.0, -0.3]), np.array([0.4, 1.0, 0.7])
    mean, error = ridge(columns, changes, prior, spread)

    # the plain formula, and the noise as the fixed point of its own residuals
    def closed(noise: float):
        covariance = np.linalg.inv(columns.T @ columns / noise + np.diag(1 / spread**2))
        found = covariance @ (columns.T @ changes / noise + prior / spread**2)
        fitted = np.trace(columns @ covariance @ columns.T) / noise
        return found, covariance, np.sum((changes - columns @ found) ** 2) / (len(changes) - fitted)

    noise = 1.0
    for _ in range(200):
        noise = closed(noise)[2]
    found, covariance, _ = closed(noise)
    # float64, well conditioned: far above rounding, far below any statement
    assert mean == pytest.approx(found, rel=1e-9)
    assert error == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-9)
    assert np.sqrt(noise) == pytest.approx(0.1, rel=0.3)


def test_a_column_that_never_moves_keeps_its_prior():
    columns, changes, _ = _world()
    columns[:, 1] = 0.0
    mean, error = ridge(columns, changes, np.array([0.0, 0.25, 0.0]), np.array([1.0, 0.3, 1.0]))
    assert (mean[1], error[1]) == (0.25, pytest.approx(0.3))


def test_an_exact_line_is_found_without_dividing_by_its_noise():
    columns, changes, slopes = _world(noise=0.0)
    mean, error = ridge(columns, changes, np.zeros(3), np.ones(3))
    assert mean == pytest.approx(slopes, rel=1e-9)
    assert np.all(error < 1e-6)


def test_error_covers_the_truth_as_often_as_it_says():
    left = []
    for seed in range(200):
        columns, changes, slopes = _world(seed, noise=0.5, intervals=12)
        mean, error = ridge(columns, changes, np.zeros(3), np.full(3, 5.0))
        left += ((mean - slopes) / error).tolist()
    # 600 draws of a t with 9 degrees of freedom: its deviation is 1.13, known to 3 %
    assert np.std(left) == pytest.approx(1.13, abs=0.12)
