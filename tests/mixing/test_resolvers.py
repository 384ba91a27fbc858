"""Resolvers against TorchJD, and the laws that their weights keep."""

import numpy as np
import pytest
import torch
from torchjd.aggregation import (
    AlignedMTLWeighting,
    DualProjWeighting,
    MGDAWeighting,
    PCGradWeighting,
    UPGradWeighting,
)

from fastsft.mixing.resolvers import MGDA, AlignedMTL, Gem, PCGrad, Random, Uniform, UPGrad
from fastsft.tasks import MixError
from tests.mixing._grams import KINDS, SIZES, gram_of

GRAMS = {kind: [gram_of(kind, K, seed) for K in SIZES for seed in range(2)] for kind in KINDS}
of_each_kind = pytest.mark.parametrize("grams", GRAMS.values(), ids=GRAMS)
INDEPENDENT = [UPGrad(), Gem(), AlignedMTL(), AlignedMTL(scale="min"), AlignedMTL(scale="rmse"), MGDA(), Uniform()]
ALL = [*INDEPENDENT, PCGrad(), Random()]


def asked(weighting, gram):
    return weighting(torch.from_numpy(gram)).numpy()


def close(ours, theirs, tolerance=1e-8):
    """No weight differs by more than solvers' rounding, relative to the largest weight, which may be in the 1000s."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, np.abs(theirs).max()))


def rounding(resolver):
    # MGDA's answer is hardly one where gradients depend on each other: rounding over the ridge of 1e-10
    return 1e-5 if isinstance(resolver, MGDA) else 1e-8


@of_each_kind
def test_upgrad_equals_torchjd(grams):
    for gram in grams:
        close(UPGrad()(gram), asked(UPGradWeighting(), gram))


def test_upgrad_resolves_small_gradients_too_where_torchjd_takes_a_trace_below_1e_4_for_zero():
    gram = gram_of("conflicting", 4)
    small = gram * 1e-5 / np.trace(gram)
    assert asked(UPGradWeighting(), small).tolist() == [0.25] * 4
    close(UPGrad()(small), asked(UPGradWeighting(), gram))


@of_each_kind
def test_gem_with_all_protected_equals_torchjds_dual_projection(grams):
    for gram in grams:
        close(Gem()(gram), asked(DualProjWeighting(), gram))
        assert np.array_equal(Gem()(gram), Gem(protected=tuple(range(len(gram))))(gram))


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@of_each_kind
def test_aligned_mtl_equals_torchjd(grams, scale):
    for gram in grams:
        close(AlignedMTL(scale=scale)(gram), asked(AlignedMTLWeighting(scale_mode=scale), gram))


def torchjd_pcgrad(gram, order, monkeypatch):
    """TorchJD's PCGrad with each of its random orders replaced by one."""
    monkeypatch.setattr(torch, "randperm", lambda K: torch.tensor(order))
    weights = asked(PCGradWeighting(), gram)
    monkeypatch.undo()
    return weights


@of_each_kind
def test_pcgrad_equals_torchjd_in_a_fixed_order_and_in_the_mean_over_the_cyclic_ones(grams, monkeypatch):
    for gram in grams:
        K = len(gram)
        cyclic = [[(first + at) % K for at in range(K)] for first in range(K)]
        every = [torchjd_pcgrad(gram, order, monkeypatch) for order in cyclic]
        close(PCGrad()(gram), np.mean(every, axis=0))
        backwards = tuple(reversed(range(K)))
        close(PCGrad(order=backwards)(gram), torchjd_pcgrad(gram, backwards, monkeypatch))


@pytest.mark.parametrize("seed", range(10))
def test_mgda_equals_torchjd_where_that_converges(seed):
    # of two gradients Frank-Wolfe's first step is exact
    gram = gram_of("random", 2, seed)
    # 1e-8: what makes the answer unique moves it by 1e-10 over the lowest eigenvalue
    close(MGDA()(gram), asked(MGDAWeighting(), gram))
    # of orthogonal ones the answer is inside, where Frank-Wolfe converges linearly
    gram = np.diag(gram_of("random", 4, seed).diagonal())
    close(MGDA()(gram), asked(MGDAWeighting(epsilon=1e-12, max_iters=2000), gram))


@of_each_kind
def test_mgda_is_on_the_simplex_and_no_vertex_improves_it(grams):
    for gram in grams:
        weights, total = MGDA()(gram), np.trace(gram)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1, abs=1e-14)
        value, slopes = weights @ gram @ weights, gram @ weights
        # Karush, Kuhn and Tucker: slope = value where w > 0, not less elsewhere; 1e-10 * trace is the ridge
        assert slopes.min() >= value - 3e-10 * total
        assert np.abs(slopes - value)[weights > 1e-9].max() <= 3e-10 * total
        # and it is no worse than TorchJD's
        theirs = asked(MGDAWeighting(), gram)
        assert value <= theirs @ gram @ theirs + 1e-10 * total


@of_each_kind
def test_upgrads_direction_opposes_no_ability(grams):
    for gram in grams:
        weights = UPGrad()(gram)
        # the ridge lets this much through, and rounding 1e-12 of the trace
        allowed = 1e-4 * np.trace(gram) * weights
        assert (gram @ weights >= -allowed - 1e-12 * np.trace(gram)).all()


def test_the_plain_mean_does_oppose_one_in_these_cases():
    # else the law above would hold of anything
    opposed = [
        (gram @ Uniform()(gram)).min() < -0.01 * np.trace(gram) / len(gram)
        for grams in GRAMS.values()
        for gram in grams
    ]
    assert sum(opposed) >= 10


@of_each_kind
def test_gem_never_opposes_a_protected_ability_and_raises_no_other_weight(grams):
    for gram in grams:
        K = len(gram)
        for protected in [(0,), (K - 1,), (1, 0)]:
            weights = Gem(protected=protected)(gram)
            guarded = list(protected)
            allowed = (1e-4 * weights[guarded] + 1e-12) * np.trace(gram)
            assert ((gram @ weights)[guarded] >= -allowed).all()
            assert (weights[guarded] >= 1 / K).all()
            assert (np.delete(weights, guarded) == 1 / K).all()


def test_gem_leaves_an_unprotected_ability_to_be_opposed():
    # two abilities together outweigh a third that they oppose
    gram = np.array([[1, 0.9, -0.8], [0.9, 1, -0.8], [-0.8, -0.8, 1.0]])
    assert (gram @ Gem(protected=(0,))(gram))[2] < -0.1
    assert (gram @ Gem(protected=(2,))(gram))[2] > -1e-3


@pytest.mark.parametrize("resolver", [*INDEPENDENT, PCGrad()], ids=str)
def test_orthogonal_gradients_of_one_length_get_equal_weights(resolver):
    weights = resolver(2.5 * np.eye(5))
    np.testing.assert_allclose(weights, weights[0], rtol=1e-12)


@pytest.mark.parametrize("resolver", [UPGrad(), Gem(), PCGrad(), Uniform()], ids=str)
@pytest.mark.parametrize("K", SIZES)
def test_without_conflict_nothing_is_mended(resolver, K):
    weights = resolver(gram_of("conflict-free", K))
    np.testing.assert_allclose(weights, weights[0], rtol=1e-12)


@pytest.mark.parametrize("resolver", INDEPENDENT, ids=str)
@of_each_kind
def test_weights_follow_a_reordering_of_the_abilities(resolver, grams):
    for gram in grams:
        order = np.random.Generator(np.random.Philox(len(gram))).permutation(len(gram))
        close(resolver(gram[np.ix_(order, order)]), resolver(gram)[order], rounding(resolver))


@of_each_kind
def test_pcgrad_follows_a_rotation_of_the_abilities(grams):
    for gram in grams:
        order = np.roll(np.arange(len(gram)), 1)
        close(PCGrad()(gram[np.ix_(order, order)]), PCGrad()(gram)[order])


@pytest.mark.parametrize("resolver", [*INDEPENDENT, PCGrad()], ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1e9])
@of_each_kind
def test_one_scale_for_all_gradients_changes_no_weight(resolver, scale, grams):
    for gram in grams:
        close(resolver(scale * gram), resolver(gram), rounding(resolver))


@pytest.mark.parametrize("resolver", ALL, ids=str)
def test_a_single_ability_has_weight_one(resolver):
    assert resolver([[0.3]]) == pytest.approx([1.0], abs=1e-15)


@pytest.mark.parametrize("resolver", [*INDEPENDENT, PCGrad()], ids=str)
def test_gradients_that_vanished_are_weighed_alike(resolver):
    weights = resolver(np.zeros((4, 4)))
    assert weights[0] > 0
    close(weights, np.full(4, weights[0]))


@pytest.mark.parametrize("resolver", ALL, ids=str)
def test_one_vanished_gradient_beside_others_leaves_finite_weights(resolver):
    gram = np.zeros((4, 4))
    gram[:3, :3] = gram_of("conflicting", 3)
    assert np.isfinite(resolver(gram)).all()
    # or so it is but for rounding
    assert np.isfinite(resolver([[1.0, -1e-8], [-1e-8, 0.0]])).all()


@pytest.mark.parametrize("resolver", ALL, ids=str)
@pytest.mark.parametrize("K", SIZES)
def test_the_same_matrix_gives_the_same_bits_and_is_left_as_it_was(resolver, K):
    gram = gram_of("conflicting", K)
    before = gram.copy()
    first = resolver(gram)
    resolver(gram_of("random", K))
    assert resolver(gram.tolist()).tobytes() == first.tobytes()
    assert np.array_equal(gram, before)
    assert first.dtype == np.float64


def test_random_weights_hang_on_the_seed_and_on_every_bit_of_the_matrix():
    gram = gram_of("random", 4)
    nudged = gram.copy()
    nudged[0, 0] = np.nextafter(gram[0, 0], 9)
    given = [Random(seed=0)(gram), Random(seed=1)(gram), Random(seed=0)(nudged)]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert np.abs(given[one] - given[other]).max() > 0.01
    assert Random()(np.array([[1.0, 0.0], [0.0, 1]])).tolist() == Random()(np.array([[1.0, -0.0], [-0.0, 1]])).tolist()
    # over many matrices: positive, sum one, none preferred (200 draws of s.d. 0.13: a mean within 4 x 0.01)
    drawn = np.array([Random()(gram * scale) for scale in range(1, 201)])
    assert drawn.min() > 0
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-14)
    np.testing.assert_allclose(drawn.mean(0), 0.25, atol=0.04)


NEEDS_POSITIVE = [UPGrad(), Gem(), PCGrad(), AlignedMTL(), MGDA()]


@pytest.mark.parametrize("resolver", NEEDS_POSITIVE, ids=str)
def test_a_matrix_with_a_negative_eigenvalue_is_refused(resolver):
    with pytest.raises(MixError, match=r"no negative eigenvalue: the lowest is -1, the highest 3.*through `positive`"):
        resolver([[1.0, 2], [2, 1]])
    # what float32 sums leave is no such thing
    assert np.isfinite(resolver([[1.0, 1], [1, 1 - 1e-7]])).all()


@pytest.mark.parametrize("resolver", ALL, ids=str)
def test_every_resolver_checks_its_matrix(resolver):
    with pytest.raises(MixError, match=r"must be square \[K, K\].*got the shape \[2, 3\]"):
        resolver(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: UPGrad(ridge=0), "`ridge` must be positive: got 0"),
        (lambda: Gem(ridge=float("nan")), "`ridge` must be positive: got nan"),
        (lambda: Gem(protected=()), "`protected` must hold different places"),
        (lambda: Gem(protected=(1, 1)), r"`protected` must hold different places.*got \(1, 1\)"),
        (lambda: Gem(protected=(4,))(np.eye(3)), r"`protected` must name places in `gram`, 0 to 2: got \(4,\)"),
        (lambda: PCGrad(order=(0, 2)), r"`order` must hold each of 0 to K - 1 once: got \(0, 2\)"),
        (lambda: PCGrad(order=(1, 0))(np.eye(3)), r"`order` must hold the 3 abilities of `gram`: got \(1, 0\)"),
        (lambda: AlignedMTL(scale="max"), "`scale` must be one of min, median, rmse: got 'max'"),
        (lambda: AlignedMTL(smallest=0), "`smallest` must be a share of the highest eigenvalue"),
        (lambda: Random(seed=0.5), "`seed` must be a whole number: got 0.5"),
    ],
)
def test_settings_that_cannot_hold_are_refused(make, sentence):
    with pytest.raises(MixError, match=sentence):
        make()
