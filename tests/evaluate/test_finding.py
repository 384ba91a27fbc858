"""Metrics of planted truths, against loops over all pairs and all orders."""

import itertools

import pytest
import torch

from fastsft.evaluate.finding import auc, duplicate_agreement, mrr, recall_at, wrong_label_auc


def slow_auc(scores, wrong):
    pairs = [(a, b) for a, bad in zip(scores, wrong) if bad for b, other in zip(scores, wrong) if not other]
    return sum((a < b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_equals_the_count_over_all_pairs(levels):
    scores = torch.randint(levels, (60,)).double()
    wrong = torch.rand(60) < 0.3
    found = auc(scores, wrong)
    assert found.mean == pytest.approx(slow_auc(scores.tolist(), wrong.tolist()))
    assert found.low < found.mean < found.high


def test_auc_at_its_ends():
    wrong = [True, True, False, False, False]
    assert auc(torch.tensor([-2.0, -1, 0, 1, 2]), wrong) == (1.0, 1.0, 1.0)
    assert auc(torch.tensor([2.0, 1, 0, -1, -2]), wrong) == (0.0, 0.0, 0.0)
    assert auc(torch.zeros(5), wrong).mean == 0.5


def test_the_interval_of_auc_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    truth = float(torch.distributions.Normal(0, 1).cdf(torch.tensor(1 / 2**0.5)))  # P(N(0,1) < N(1,1))
    covered = 0
    for _ in range(60):
        scores = torch.cat([torch.randn(40, generator=generator), 1 + torch.randn(120, generator=generator)])
        found = auc(scores, torch.arange(160) < 40)
        covered += found.low <= truth <= found.high
    assert covered >= 51  # binomial(60, 0.95): below 51 with a chance of 0.1 %


def test_auc_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="needs wrong and right samples: 3 of 3 are wrong"):
        auc(torch.zeros(3), [True] * 3)
    with pytest.raises(ValueError, match=r"must be \[N\] alike: got \[3\] and \[2\]"):
        auc(torch.zeros(3), [True, False])
    with pytest.raises(ValueError, match="must be finite"):
        auc(torch.tensor([float("nan"), 1.0]), [True, False])


def test_wrong_labels_are_looked_for_in_their_own_source_and_ability():
    # rows: two wrong and two right of source a (maths), one of source b (code); the code query tells lies
    matrix = torch.tensor([[-3.0, -1, 9], [-2, -2, 9], [1, 1, -9], [2, 2, -9], [-9, -9, -9]])
    told = {"sources": ["a", "a", "a", "a", "b"], "abilities": ["maths"] * 4 + ["code"]}
    wrong = [True, True, False, False, False]
    found = wrong_label_auc(matrix, wrong, **told, targets=["maths", "maths", "code"])
    assert found.mean == 1.0
    assert wrong_label_auc(matrix, wrong, **told, targets=["code", "code", "maths"]).mean == 0.0
    with pytest.raises(ValueError, match="no query of the abilities maths"):
        wrong_label_auc(matrix, wrong, **told, targets=["code"] * 3)
    with pytest.raises(ValueError, match="must have the 5 rows of `matrix`, `targets` its 3 columns"):
        wrong_label_auc(matrix, wrong, **told, targets=["maths"])


def orders(scores):
    """All orders, best first, that equal scores can come in."""
    groups = [[at for at, s in enumerate(scores) if s == level] for level in sorted(set(scores), reverse=True)]
    for parts in itertools.product(*(itertools.permutations(group) for group in groups)):
        yield [at for part in parts for at in part]


@pytest.mark.parametrize(
    "scores", [[3, 1, 2, 0, 5], [1, 1, 1, 1, 1], [2, 2, 2, 1, 0], [0, 1, 1, 1, 2], [1, 2, 2, 3, 3]]
)
@pytest.mark.parametrize("true", [[0], [1, 2], [0, 3, 4]])
def test_recall_and_reciprocal_rank_equal_the_mean_over_all_orders_of_ties(scores, true):
    matrix = torch.tensor(scores).double()[:, None]
    every = list(orders(scores))
    for k in (1, 2, 3, 5, 9):
        wanted = sum(len(set(order[:k]) & set(true)) / len(true) for order in every) / len(every)
        assert recall_at(matrix, [true], k).mean == pytest.approx(wanted)
    wanted = sum(1 / (1 + min(order.index(at) for at in true)) for order in every) / len(every)
    assert mrr(matrix, [true]).mean == pytest.approx(wanted)


def test_metrics_are_means_over_queries_with_an_interval():
    matrix = torch.tensor([[9.0, 0, 0, 0], [1, 9, 1, 1], [2, 1, 9, 2], [3, 2, 2, 9]])
    own = [[0], [1], [2], [3]]
    assert mrr(matrix, own) == (1.0, 1.0, 1.0)
    assert recall_at(matrix, own, 1) == (1.0, 1.0, 1.0)
    found = mrr(matrix, [[0], [1], [0], [0]])
    assert found.mean == pytest.approx((1 + 1 + 1 / 4 + 1 / 4) / 4)
    assert found.low < found.mean < found.high
    lone = mrr(matrix[:, :1], [[0]])
    assert lone.mean == 1
    assert lone.low != lone.low, "no interval from one query"


def test_permuting_samples_changes_nothing():
    matrix, order = torch.randn(30, 5).round(decimals=1), torch.randperm(30)
    true = [[0, 3], [1], [2, 7, 9], [4], [29]]
    place = order.argsort().tolist()
    moved = [[place[row] for row in rows] for rows in true]
    assert recall_at(matrix[order], moved, 4) == recall_at(matrix, true, 4)
    assert mrr(matrix[order], moved) == mrr(matrix, true)


def test_true_rows_are_checked():
    for true, k, sentence in (
        ([[0]], 1, "rows for each of 2 queries: got 1"),
        ([[0], []], 1, r"query 1 must have true rows, all below 3: got \[\]"),
        ([[0], [3]], 1, r"all below 3: got \[3\]"),
        ([[0], [1]], 0, "`k` must be 1 or more: got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            recall_at(torch.zeros(3, 2), true, k)
    with pytest.raises(ValueError, match=r"\[N, Q\], not empty: got the shape \[0, 2\]"):
        mrr(torch.zeros(0, 2), [[0], [0]])


def test_agreement_is_one_for_copies_and_about_zero_for_strangers():
    matrix = torch.randn(400, 3)
    matrix[1::2] = matrix[::2]
    copies = [(at, at + 1) for at in range(0, 400, 2)]
    assert duplicate_agreement(matrix, copies) == (1.0, 1.0, 1.0)
    strangers = duplicate_agreement(torch.randn(2000, 3), [(at, at + 1) for at in range(0, 2000, 2)])
    assert strangers.low < 0 < strangers.high
    assert abs(strangers.mean) < 0.06  # 3 standard errors of a mean over 1000 pairs and 3 queries


def test_agreement_measures_by_the_mean_distance_of_any_two():
    column = torch.tensor([0.0, 1, 5, 5, 9])
    apart = [abs(a - b) for a, b in itertools.combinations(column.tolist(), 2)]
    found = duplicate_agreement(column[:, None], [(0, 1), (2, 3)])
    assert found.mean == pytest.approx(1 - (1 / (sum(apart) / len(apart)) + 0) / 2)
    assert duplicate_agreement(column[:, None] * 7, [(0, 1), (2, 3)]).mean == pytest.approx(found.mean)
    with pytest.raises(ValueError, match="query 0 scores all samples alike"):
        duplicate_agreement(torch.zeros(4, 1), [(0, 1)])
    with pytest.raises(ValueError, match="`pairs` is empty"):
        duplicate_agreement(torch.zeros(4, 1), [])
