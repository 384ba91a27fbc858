"""EK-FAC equals a dense construction: Kronecker eigenvectors, diagonal Lambda, one layer's whole matrix inverted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastsft.attribution.methods.ekfac import EkFac
from fastsft.data import Row
from fastsft.sketch.passes import Batching
from tests.attribution._support import tiny_model
from tests.attribution.methods._support import assert_same, at, gradient, made, run_of
from tests.attribution.methods.test_gradients import BATCHINGS
from tests.sketch.test_curvature import covariances, fisher


def _dense(model: nn.Module, fitted: list[Row], samples: list[Row], targets: dict[str, list[Row]]) -> Tensor:
    """1/N sum over layers of g_q^T (Q Lambda Q^T + 0.1 mean Lambda)^-1 g_i."""
    sides = covariances(model, fitted)
    curvature, mine = [gradient(model, row) for row in fitted], [gradient(model, row) for row in samples]
    theirs = [[gradient(model, row) for row in rows] for rows in targets.values()]
    tokens = [sum(row.num_supervised for row in rows) for rows in targets.values()]
    total = torch.zeros(len(samples), len(targets), dtype=torch.float64)
    for name in curvature[0]:
        matrix = fisher(sides[name], torch.stack([grads[name] for grads in curvature]), 0.1)
        queries = torch.stack(
            [sum(grads[name] for grads in each).flatten() / count for each, count in zip(theirs, tokens, strict=True)]
        )
        flat = torch.stack([grads[name].flatten() for grads in mine])
        total += flat @ torch.linalg.solve(matrix, queries.T)
    return total / len(samples)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_scores_equal_the_dense_construction(lora: bool) -> None:
    model, samples, targets = made(lora=lora)
    expected = _dense(model, samples, samples, targets)
    for keep_bytes in (0, 2**30):
        method = EkFac(keep_bytes=keep_bytes, batching=Batching(max_tokens=30)).fit(model, [], samples)
        assert_same(method.score(targets).matrix(), expected)


def test_the_fit_may_take_some_of_the_samples() -> None:
    model, samples, targets = made(lora=True, rows=8)
    found = EkFac(max_documents=4).fit(model, [], samples).score(targets).matrix()
    assert_same(found, _dense(model, samples[::2], samples, targets))


def test_checkpoints_add_by_share_each_with_curvature_of_its_own() -> None:
    model, samples, targets = made(lora=True)
    checkpoints = run_of(model, steps=2)
    parts = [at(model, checkpoint, lambda: _dense(model, samples, samples, targets)) for checkpoint in checkpoints]
    found = EkFac().fit(model, checkpoints, samples).score(targets).matrix()
    assert_same(found, (parts[0] + 2 * parts[1]) / 3)


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_neither_batches_nor_order_change_a_score_and_tokens_sum(kind: str) -> None:
    model, samples, targets = made(lora=True)
    expected = EkFac(fisher=kind, seed=5).fit(model, [], samples).score(targets).matrix()
    for batching in BATCHINGS.values():
        method = EkFac(fisher=kind, seed=5, batching=batching).fit(model, [], samples[::-1])
        scores = method.score(targets, per="token")
        assert_same(scores.matrix().flip(0), expected)
        for row, values in zip(samples, expected, strict=True):
            assert_same(scores.tokens()[row.id].sum(0), values)


def test_copies_score_alike_and_the_model_is_given_back() -> None:
    model, samples, targets = made(lora=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = Row("copy", samples[0].source, samples[0].input_ids, samples[0].labels)
    found = EkFac().fit(model, run_of(model, 2), [*samples, copy, samples[1]]).score(targets).matrix()
    assert_same(found[-2:], found[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_without_gradient_score_zero() -> None:
    model = tiny_model(lora=True)  # B = 0: no gradient reaches A
    _, samples, targets = made(lora=True)
    for kind in ("empirical", "true"):
        found = EkFac(fisher=kind).fit(model, [], samples).score(targets).matrix()
        assert torch.isfinite(found).all()
        assert found.any()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()  # none reaches B either
    assert not EkFac().fit(model, [], samples).score(targets).matrix().any()


def test_the_true_fisher_draws_under_a_seed() -> None:
    model, samples, targets = made(lora=True)

    def scores(**settings):
        return EkFac(**settings).fit(model, [], samples).score(targets).matrix()

    assert torch.equal(scores(fisher="true", seed=1), scores(fisher="true", seed=1))
    assert not torch.allclose(scores(fisher="true", seed=1), scores(fisher="true", seed=2))
    assert not torch.allclose(scores(fisher="true"), scores())
    with pytest.raises(ValueError, match="`fisher` must be 'empirical' or 'true'"):
        EkFac(fisher="sampled")


def test_among_twice_the_samples_each_counts_half() -> None:
    model, samples, targets = made(lora=True)
    scores = EkFac().fit(model, [], samples).score(targets).matrix()
    twice = EkFac().fit(model, [], samples * 2).score(targets).matrix()
    assert_same(twice[: len(samples)], scores / 2)
    assert_same(twice[len(samples) :], scores / 2)
