"""Tail-patch: the loss after one plain step of a known length, measured by hand; the model comes back as it was."""

import pytest
import torch

from fastsft.evaluate import EvaluationError, tail_patch
from fastsft.evaluate.retrain import Query
from fastsft.evaluate.tail_patch import step_length
from fastsft.train.config import TrainConfig
from tests.attribution.methods._support import summed_loss
from tests.train._support import assert_same_bits, make_lora, make_model, make_rows, weights_of


def by_hand(model, rows, query, length):
    """How far a step along minus the gradient of the rows' mean token loss takes the query's loss down."""
    weights = [p for p in model.parameters() if p.requires_grad]
    before = summed_loss(model, query).item()
    loss = sum(summed_loss(model, row) for row in rows) / sum(row.num_supervised for row in rows)
    gradients = torch.autograd.grad(loss, weights)
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= length / norm * gradient
        after = summed_loss(model, query).item()
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
    return (before - after) / query.num_supervised


@pytest.mark.parametrize("lora", [True, False])
def test_equals_the_step_by_hand(lora):
    model = (make_lora() if lora else make_model()).double()
    rows, held = make_rows(8), make_rows(3, seed=9, prefix="held")
    queries = [Query("maths", held[0]), Query("maths", held[1]), Query("code", held[2])]
    scores = torch.randn(8, 3)
    before = weights_of(model)
    model.train()
    [found] = tail_patch(model, rows, queries, {"some": scores}, length=0.1, top=2)
    assert model.training
    assert_same_bits(weights_of(model), before)
    model.eval()
    falls = [by_hand(model, [rows[i] for i in scores[:, q].topk(2).indices], held[q], 0.1) for q in range(3)]
    assert found.fall.mean == pytest.approx(sum(falls) / 3, rel=1e-9)
    assert found.fall.low <= found.fall.mean <= found.fall.high
    assert found.above_random is None


def test_the_query_itself_helps_most_and_random_samples_are_beside():
    model = make_lora()
    held = make_rows(6, seed=9, prefix="held")
    rows = [*make_rows(30), *held]  # each query is among the samples
    queries = [Query("maths" if at % 2 else "code", row) for at, row in enumerate(held)]
    right = torch.zeros(36, 6)
    right[30:] = torch.eye(6)
    scores = {"random": torch.randn(36, 6), "right": right}
    found = {row.method: row for row in tail_patch(model, rows, queries, scores, length=0.05, top=1)}
    assert found["right"].fall.low > 0
    assert found["right"].above_random.low > 0
    assert found["random"].above_random is None


def test_scores_of_abilities_serve_all_their_queries():
    model, rows = make_lora(), make_rows(8)
    queries = [Query(("maths", "code")[at % 2], row) for at, row in enumerate(make_rows(5, seed=9))]
    by_ability = torch.randn(8, 2)
    spread = by_ability[:, [0, 1, 0, 1, 0]]
    one, other = tail_patch(model, rows, queries, {"in_run": by_ability, "same": spread}, length=0.05, top=2)
    assert one.fall == other.fall
    with pytest.raises(EvaluationError, match=r"\[8, 5\], or \[8, 2\] by ability: got \[8, 3\]"):
        tail_patch(model, rows, queries, {"odd": torch.randn(8, 3)}, length=0.05)
    with pytest.raises(EvaluationError, match="from 1 to the 8 samples: got 9"):
        tail_patch(model, rows, queries, {"in_run": by_ability}, length=0.05, top=9)


def test_the_step_is_as_long_as_the_last_of_adams():
    model = make_lora()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # linear: the last of 10 steps has a tenth of the peak; of 1000 a thousandth, so a hundredth is taken
    assert step_length(TrainConfig(steps=10, learning_rate=1e-2), model) == pytest.approx(1e-3 * size**0.5)
    assert step_length(TrainConfig(steps=1000, learning_rate=1e-2), model) == pytest.approx(1e-4 * size**0.5)
    constant = TrainConfig(steps=1000, learning_rate=1e-2, schedule="constant")
    assert step_length(constant, model) == pytest.approx(1e-2 * size**0.5)
