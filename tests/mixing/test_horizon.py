"""Returns over the rest of a run: the derivative of the loss that the model of two flows ends with."""

import numpy as np
import pytest

from fastsft.mixing.horizon import ahead

GENERATOR = np.random.default_rng(0)


def end(A, losses, weights, importance, tokens):
    """The weighted loss after `tokens` more by small steps; effects are per token."""
    helps, harms = np.maximum(A, 0) / losses[:, None], np.maximum(-A, 0)
    loss, steps = losses.copy(), 20000
    for _ in range(steps):
        loss = loss + tokens / steps * (harms @ weights - (helps @ weights) * loss)
    return importance @ loss


@pytest.mark.parametrize("tokens", [1.0, 50.0, 2000.0])
def test_a_return_is_what_a_share_does_to_the_loss_at_the_end(tokens):
    J, K = 3, 4
    A = GENERATOR.normal(size=(J, K)) * 1e-3
    losses, importance = np.array([2.0, 0.5, 1.0]), np.array([0.2, 0.5, 0.3])
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    found = ahead(A, np.zeros((J, K)), losses, weights, importance, tokens)
    for at in range(K):
        step = 1e-4 * np.eye(K)[at]
        higher, lower = (end(A, losses, weights + s, importance, tokens) for s in (step, -step))
        # Euler's error is of the size of a step, tokens / 20000 times the rates
        assert found.signal[at] == pytest.approx(-(higher - lower) / 2e-4 / tokens, rel=2e-3, abs=1e-9)


def test_without_tokens_ahead_it_is_the_return_now():
    A, errors = GENERATOR.normal(size=(2, 3)) * 1e-2, np.full((2, 3), 1e-3)
    importance = np.array([0.25, 0.75])
    found = ahead(A, errors, np.ones(2), np.full(3, 1 / 3), importance, 1e-6)
    np.testing.assert_allclose(found.signal, importance @ A, rtol=1e-6)
    np.testing.assert_allclose(found.error, np.sqrt((importance**2) @ errors**2), rtol=1e-6)


def test_an_ability_at_rest_between_two_flows_counts_less_than_one_that_falls():
    # b is disturbed by a's tokens and restored by its own; a falls. Now, a token of b returns more
    A = np.array([[2e-3, 0.0], [-3e-3, 3e-3]])
    losses, weights, importance = np.array([2.0, 0.05]), np.array([0.5, 0.5]), np.ones(2)
    now = ahead(A, np.zeros((2, 2)), losses, weights, importance, 1e-6).signal
    later = ahead(A, np.zeros((2, 2)), losses, weights, importance, 2000.0).signal
    assert now[1] > now[0]
    assert later[0] > later[1] > 0


def test_what_is_not_known_has_no_effect():
    A = np.array([[1e-3, np.nan]])
    found = ahead(A, np.full((1, 2), np.inf), np.ones(1), np.full(2, 0.5), np.ones(1), 100.0)
    assert found.signal[1] == 0
    assert np.isfinite(found.error).all()
    assert ahead(
        np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1), np.full(2, 0.5), np.ones(1), 10.0
    ).signal.tolist() == [0, 0]
