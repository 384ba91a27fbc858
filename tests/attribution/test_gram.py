"""Gram matrices from noisy gradients: right in the mean, smooth, fit for a resolver; and what is said of conflicts."""

import numpy as np
import pytest
import torch

from fastsft.attribution.gram import conflicts, cosines, cross_gram, positive, read_gram, smooth_gram
from fastsft.mixing.resolvers import UPGrad
from fastsft.tasks import MixError
from tests.mixing._grams import KINDS, gram_of


def draw(seed):
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize(
    ("gram", "sentence"),
    [
        (np.ones((2, 3)), r"must be square \[K, K\].*got the shape \[2, 3\]"),
        (np.ones(4), r"must be square \[K, K\].*got the shape \[4\]"),
        (np.zeros((0, 0)), r"must be square \[K, K\].*got the shape \[0, 0\]"),
        ([[1, float("nan")], [0, 1]], r"must be finite: entry \(0, 1\) is nan"),
        ([[1, 0], [0, float("inf")]], r"must be finite: entry \(1, 1\) is inf"),
        ([[1, 0.5], [0.4, 1]], r"must be symmetric: entry \(0, 1\) is 0.5 and its mirror 0.4"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, sentence):
    with pytest.raises(MixError, match=sentence):
        read_gram(gram)


def test_a_gram_matrix_in_float32_from_torch_is_read_and_made_exactly_symmetric():
    given = torch.tensor([[1.0, 0.25], [0.25 * (1 + 1e-7), 2.0]])
    read = read_gram(given)
    assert read.dtype == np.float64
    assert np.array_equal(read, read.T)
    np.testing.assert_allclose(read, given, rtol=1e-7)


def test_the_product_of_two_batches_equals_a_loop_and_is_symmetric():
    first, second = draw(0).standard_normal((2, 3, 7))
    slow = [
        [sum(first[i, n] * second[j, n] + first[j, n] * second[i, n] for n in range(7)) / 2 for j in range(3)]
        for i in range(3)
    ]
    found = cross_gram(first, second)
    # 14 products of float64
    np.testing.assert_allclose(found, slow, atol=1e-14)
    assert np.array_equal(found, found.T)
    assert np.array_equal(cross_gram(torch.from_numpy(first), second), found)


def test_the_product_of_two_batches_is_right_in_the_mean_where_one_batchs_own_is_not():
    K, N, times = 3, 20, 4000
    true = draw(1).standard_normal((K, N))
    noise = 2 * draw(2).standard_normal((times, 2, K, N))
    crossed = np.array([cross_gram(true + one, true + other) for one, other in noise])
    own = np.array([(true + one) @ (true + one).T for one, _ in noise])
    error = crossed.std(0) / times**0.5
    # 9 entries, 6 of them different, within 4 standard errors: missed with a chance of 0.04 %
    assert (np.abs(crossed.mean(0) - true @ true.T) < 4 * error).all()
    # the noise's squared length: 4 N = 80 too much, on the diagonal alone
    np.testing.assert_allclose((own.mean(0) - true @ true.T).diagonal(), 4 * N, rtol=0.05)


def test_smoothing_is_a_weighted_mean_of_all_before():
    grams = [gram_of("random", 3, seed) for seed in range(3)]
    smooth = None
    for gram in grams:
        smooth = smooth_gram(smooth, gram, 0.8)
    wanted = 0.64 * grams[0] + 0.16 * grams[1] + 0.2 * grams[2]
    np.testing.assert_allclose(smooth, wanted, rtol=1e-14)
    assert np.array_equal(smooth_gram(grams[0], grams[1], 0), grams[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_without_negative_eigenvalues_stays_as_it_is(kind):
    gram = gram_of(kind, 5)
    # of low rank: an eigenvalue of zero may be below it by rounding
    np.testing.assert_allclose(positive(gram), gram, rtol=0, atol=1e-14)


def test_the_mended_matrix_is_the_nearest_without_negative_eigenvalues():
    noisy = draw(3).standard_normal((5, 5))
    noisy = noisy + noisy.T
    mended = positive(noisy)
    # rounding of five eigenvalues of size 5
    assert np.linalg.eigvalsh(mended)[0] > -1e-14
    distance = np.linalg.norm(mended - noisy)
    assert distance > 1
    # no other is nearer: not one of 500 near it, not those in between, not a root's square far off
    for seed in range(500):
        root = np.linalg.cholesky(mended + 1e-9 * np.eye(5)) + 0.1 * draw([4, seed]).standard_normal((5, 5))
        assert np.linalg.norm(root @ root.T - noisy) > distance - 1e-6
    assert np.array_equal(mended, mended.T)
    UPGrad()(mended)


def test_a_share_of_the_same_batch_norms_is_kept_on_the_diagonal():
    gram = np.array([[1.0, 0.2], [0.2, 2.0]])
    assert positive(gram, [11.0, 12.0], keep=0.25).tolist() == [[3.5, 0.2], [0.2, 4.5]]
    assert positive(gram, [11.0, 12.0], keep=0).tolist() == gram.tolist()
    assert gram[0, 0] == 1


def test_keeping_some_of_the_norms_guards_against_conflicts_made_of_noise():
    # abilities that do not conflict, one pair of half batches, norms 20 times too large
    K, N = 5, 2000
    distance = {0.0: [], 0.05: []}
    for seed in range(40):
        true = draw([5, seed]).standard_normal((K, N)) / N**0.5
        noise = (19 / N) ** 0.5 * 2**0.5 * draw([6, seed]).standard_normal((2, K, N))
        halves = true + noise
        both = halves.mean(0) @ halves.mean(0).T
        gram = both.copy()
        gram[np.diag_indices(K)] = cross_gram(*halves).diagonal()
        wanted = UPGrad()(true @ true.T)
        for keep, found in distance.items():
            weights = UPGrad()(positive(gram, both.diagonal(), keep=keep))
            found.append(np.abs(weights / weights.sum() - wanted / wanted.sum()).sum() / 2)
    saved = np.array(distance[0.0]) - np.array(distance[0.05])
    assert saved.mean() > 3 * saved.std() / len(saved) ** 0.5
    assert np.mean(distance[0.05]) < 0.75 * np.mean(distance[0.0])


def test_cosines_without_shrinkage_are_cosines():
    gradients = draw(7).standard_normal((4, 9))
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines(gradients @ gradients.T, shrink=0), unit @ unit.T, atol=1e-14)


def test_cosines_shrink_most_where_gradients_are_small_and_divide_by_no_norm_near_zero():
    gram = np.array([[4.0, -1.0, 0.01], [-1.0, 2.0, 0.0], [0.01, 0.0, -0.001]])
    found = cosines(gram, [6.0, 3.0, 0.0], shrink=0.1)
    # tau = 0.1 * mean(6, 3, 0) = 0.3
    assert found[0, 1] == pytest.approx(-1 / (6.3 * 3.3) ** 0.5)
    assert found[0, 2] == pytest.approx(0.01 / (6.3 * 0.3) ** 0.5)
    assert found[0, 0] == pytest.approx(4 / 6.3)
    assert np.isfinite(cosines(gram)).all()
    assert cosines(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]
    # the norms of another batch may be smaller than a product: no cosine is beyond one
    assert cosines([[9.0, -9], [-9, 9]], [1.0, 1.0], shrink=0).tolist() == [[1, -1], [-1, 1]]


def test_conflicts_are_the_pairs_below_zero_the_worst_first():
    gram = np.array([[1.0, -0.2, 0.5], [-0.2, 1.0, -0.6], [0.5, -0.6, 1.0]])
    assert conflicts(gram, shrink=0) == [(1, 2, -0.6), (0, 1, -0.2)]
    assert conflicts(gram) == [(1, 2, pytest.approx(-0.6 / 1.1)), (0, 1, pytest.approx(-0.2 / 1.1))]
    assert conflicts(np.eye(3)) == []


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: cross_gram(np.ones((2, 3)), np.ones((2, 4))), r"gradients \[K, N\].*got \[2, 3\] and \[2, 4\]"),
        (lambda: smooth_gram(None, np.eye(2), 1.0), "`decay` must be at least 0 and below 1: got 1.0"),
        (lambda: smooth_gram(np.eye(3), np.eye(2), 0.5), r"of the same abilities: got \[3, 3\] and \[2, 2\]"),
        (lambda: positive(np.eye(2), [1, 1], keep=1.5), "`keep` is a share of the same-batch norms, 0 to 1: got 1.5"),
        (lambda: positive(np.eye(2), [1, -1]), r"squared norms of 2 gradients, none negative: got \[1.0, -1.0\]"),
        (lambda: cosines(np.eye(2), [1.0]), r"squared norms of 2 gradients, none negative: got \[1.0\]"),
        (lambda: cosines(np.eye(2), shrink=-1), "`shrink` must not be negative: got -1"),
    ],
)
def test_settings_that_cannot_hold_are_refused(call, sentence):
    with pytest.raises(MixError, match=sentence):
        call()
