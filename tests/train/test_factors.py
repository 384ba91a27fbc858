"""Weights as factors that leave the step's size alone."""

import numpy as np
import pytest
import torch

from fastsft.mixing.conflict import NAMES, make_resolver
from fastsft.mixing.resolvers import Uniform
from fastsft.tasks import MixError
from fastsft.train.factors import factors, weigh
from tests.mixing._grams import KINDS, gram_of

ABILITIES = ["maths", "code", "general"]


def test_a_resolver_of_ones_own_is_held_to_its_shape():
    assert weigh(lambda gram: gram.diagonal() / gram.trace(), [[1, 0], [0, 3]]).tolist() == [0.25, 0.75]
    assert weigh(lambda gram: torch.ones(2), np.eye(2)).tolist() == [1, 1]
    with pytest.raises(MixError, match=r"answer with 2 finite weights.*function gave \[1.0\]"):
        weigh(lambda gram: [1.0], np.eye(2))
    with pytest.raises(MixError, match=r"answer with 2 finite weights.*function gave \[1.0, nan\]"):
        weigh(lambda gram: [1.0, float("nan")], np.eye(2))


def slow_factors(weights, low, high):
    """The same by halving the interval of t until it is closed."""
    weights = [max(weight, 1e-30) for weight in weights]
    below, above = 0.0, high / min(weights)
    for _ in range(400):
        middle = (below + above) / 2
        if sum(min(max(middle * weight, low), high) for weight in weights) < len(weights):
            below = middle
        else:
            above = middle
    return [min(max(above * weight, low), high) for weight in weights]


@pytest.mark.parametrize("limits", [(1 / 3, 3), (0.5, 1.2), (0, 2), (0.9, 100)])
@pytest.mark.parametrize("spread", [0.1, 1, 3, 10])
def test_factors_keep_their_sum_and_their_limits_and_equal_a_search(spread, limits):
    generator = np.random.Generator(np.random.Philox(0))
    for K in range(1, 9):
        weights = np.exp(spread * generator.standard_normal(K))
        found = factors(weights, limits)
        # K roundings of numbers that sum to K
        assert found.sum() == pytest.approx(K, rel=1e-14)
        assert found.min() >= limits[0]
        assert found.max() <= limits[1]
        np.testing.assert_allclose(found, slow_factors(weights, *limits), rtol=1e-12)


def test_factors_within_the_limits_are_the_weights_in_proportion():
    np.testing.assert_allclose(factors([2.0, 1.0, 3.0]), [1.0, 0.5, 1.5], rtol=1e-15)


@pytest.mark.parametrize("K", range(1, 40))
def test_equal_weights_give_factors_of_exactly_one(K):
    # so that the control `uniform` trains bit for bit as no resolver does
    for weights in (Uniform()(np.eye(K)), np.full(K, 0.1), np.full(K, 7e-5)):
        assert factors(weights).tolist() == [1.0] * K


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_resolvers_factors_sum_to_the_number_of_abilities(name, K):
    resolver = make_resolver(name, abilities=[f"a{at}" for at in range(K)])
    for kind in KINDS:
        found = factors(weigh(resolver, gram_of(kind, K)))
        assert found.sum() == pytest.approx(K, rel=1e-14)
        assert found.min() >= 1 / 3
        assert found.max() <= 3


def test_limits_that_leave_no_room_leave_factors_of_one():
    assert factors([1.0, 2.0, 9.0], (0.5, 1)).tolist() == [1, 1, 1]
    assert factors([1.0, 2.0, 9.0], (1, 3)).tolist() == [1, 1, 1]
    # both at a limit, and just the sum
    assert factors([1.0, 0.1], (0.5, 1.5)).tolist() == [1.5, 0.5]


def test_factors_of_weights_that_are_not_positive():
    # a negative weight counts as zero
    assert factors([2.0, -1.0, 1.0]).tolist() == factors([2.0, 0.0, 1.0]).tolist()
    assert factors([1.0, -5.0])[1] == pytest.approx(1 / 3)
    # nothing positive: nothing to tell apart
    assert factors([0.0, 0.0]).tolist() == [1, 1]
    assert factors([-1.0, -3.0]).tolist() == [1, 1]
    # one alone can't take the sum of eight: at its limit of 3 it leaves 5 to seven
    np.testing.assert_allclose(factors([1.0] + [0.0] * 7), [3] + [5 / 7] * 7, rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: factors([]), r"`weights` must be \[K\], finite, of at least one ability: got \[\]"),
        (lambda: factors([[1.0]]), r"`weights` must be \[K\]"),
        (lambda: factors([1.0, float("nan")]), r"`weights` must be \[K\], finite.*nan"),
        (lambda: factors([1.0], (1.5, 3)), r"`limits` must hold 1 between them.*got \(1.5, 3\)"),
        (lambda: factors([1.0], (-1, 3)), r"`limits` must hold 1 between them.*got \(-1, 3\)"),
        (lambda: factors([1.0], (0, 0.5)), r"`limits` must hold 1 between them.*got \(0, 0.5\)"),
    ],
)
def test_factors_refuse_what_has_none(call, sentence):
    with pytest.raises(MixError, match=sentence):
        call()
