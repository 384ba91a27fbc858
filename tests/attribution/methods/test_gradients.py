"""The dot-product core equals a loop over rows by autograd, in any batches, and leaves the model alone."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastsft import ops
from fastsft.attribution.methods import Checkpoint, GradDot, Queries
from fastsft.attribution.methods._dots import formed_dots
from fastsft.attribution.methods._gradients import chunks, contract, followed, query_gradients
from fastsft.data import Row
from fastsft.sketch.passes import Batching
from tests.attribution.methods._support import assert_same, at, gradients, made, query_gradient, run_of

BATCHINGS = {
    "one by one": Batching(max_tokens=1),
    "padded": Batching(max_tokens=4096),
    "some": Batching(max_tokens=30),
    "packed": Batching(max_tokens=40, packing=True),
}
# more than the fused pass is given
MANY = 13


def _dots(model: nn.Module, samples: list[Row], targets: dict[str, list[Row]]) -> Tensor:
    queries = torch.stack([query_gradient(model, rows) for rows in targets.values()])
    return gradients(model, samples) @ queries.T


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return same and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("batching", BATCHINGS.values(), ids=BATCHINGS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_grad_dot_equals_autograd_row_by_row(lora: bool, batching: Batching) -> None:
    model, samples, targets = made(lora=lora)
    found = GradDot(batching=batching).fit(model, [], samples).score(targets)
    assert_same(found.matrix(), _dots(model, samples, targets))
    assert found.queries == list(targets)


@pytest.mark.parametrize("batching", BATCHINGS.values(), ids=BATCHINGS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_many_queries_equal_autograd_row_by_row(lora: bool, batching: Batching) -> None:
    model, samples, targets = made(lora=lora)
    many = {f"{name} {number}": rows for number in range(5) for name, rows in targets.items()}
    assert len(many) > MANY
    found = GradDot(batching=batching).fit(model, [], samples).score(many).matrix()
    assert_same(found, _dots(model, samples, many))


@pytest.mark.parametrize("limit", [1, 100, 2**20])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [5, 0, 7], []])
def test_gradients_formed_in_pieces_give_dots_and_squares(lengths: list[int], limit: int, monkeypatch) -> None:
    monkeypatch.setattr("fastsft.attribution.methods._dots._FORMED", {"cpu": limit})
    T, O, I = sum(lengths) + 2, 6, 9
    x, dy = torch.randn(T, I, dtype=torch.float64), torch.randn(T, O, dtype=torch.float64)
    directions = torch.randn(3, O, I, dtype=torch.float64)
    offsets = torch.tensor([1, *lengths]).cumsum(0)
    squares = torch.zeros(len(lengths), dtype=torch.float64)
    found = formed_dots(x, dy, offsets, directions, squares)
    grads = ops.document_grads(x, dy, offsets).flatten(1)
    assert found is not None
    assert torch.allclose(found, grads @ directions.flatten(1).T)
    assert torch.allclose(squares, grads.square().sum(1))


def test_narrow_types_are_added_up_in_float32() -> None:
    x, dy = torch.randn(8, 5).bfloat16(), torch.randn(8, 4).bfloat16()
    offsets, directions = torch.tensor([0, 3, 8]), torch.randn(2, 4, 5)
    found = formed_dots(x, dy, offsets, directions)
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.allclose(found, formed_dots(x.float(), dy.float(), offsets, directions), rtol=1e-6)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_tokens_sum_to_their_sample(lora: bool) -> None:
    model, samples, targets = made(lora=lora)
    for batching in BATCHINGS.values():
        found = GradDot(batching=batching).fit(model, [], samples).score(targets, per="token")
        assert_same(found.matrix(), _dots(model, samples, targets))
        for row, values in zip(samples, found.matrix(), strict=True):
            tokens = found.tokens()[row.id]
            assert tokens.shape == (len(row.input_ids), len(targets))
            assert_same(tokens.sum(0), values)


def test_checkpoints_add_by_share() -> None:
    model, samples, targets = made(lora=True)
    checkpoints = run_of(model)
    parts = [at(model, checkpoint, lambda: _dots(model, samples, targets)) for checkpoint in checkpoints]
    expected = (parts[0] + 2 * parts[1] + 3 * parts[2]) / 6
    for per in ("sample", "token"):
        assert_same(GradDot().fit(model, checkpoints, samples).score(targets, per=per).matrix(), expected)


def test_order_does_not_matter_and_a_row_may_come_twice() -> None:
    model, samples, targets = made(lora=True)
    expected = _dots(model, samples, targets)
    places = [3, 1, 1, 0, 6, 3, 2, 4, 5, 3]
    again = [samples[place] for place in places]
    again[2] = Row(again[2].id, "another source", list(again[2].input_ids), list(again[2].labels))
    for batching in BATCHINGS.values():
        scores = GradDot(batching=batching).fit(model, [], again).score(targets)
        assert_same(scores.matrix(), expected[places])
        assert sorted(row for block in scores for row in block.rows) == list(range(len(places)))


def test_one_row_may_be_in_several_queries_and_twice_in_one() -> None:
    model, samples, _ = made(lora=True)
    one, two, three = samples[:3]
    targets = {"a": [one, two], "b": [two, three, two], "c": [two]}
    for batching in BATCHINGS.values():
        found = GradDot(batching=batching).fit(model, [], samples).score(targets).matrix()
        assert_same(found, _dots(model, samples, targets))


def test_queries_are_scored_in_blocks_that_fit() -> None:
    model, samples, targets = made(lora=True)
    size = sum(8 * layer.weight.numel() for layer in followed(model))
    whole = GradDot().fit(model, [], samples).score(targets)
    some = GradDot(direction_bytes=2 * size).fit(model, [], samples).score(targets, per="token")
    assert sorted({block.first for block in some}) == [0, 2]
    assert_same(some.matrix(), whole.matrix())
    assert all(tokens.shape[1] == 3 for tokens in some.tokens().values())


def test_the_summary_is_the_sorted_matrix() -> None:
    model, samples, targets = made(lora=True)
    scores = GradDot().fit(model, [], samples).score(targets)
    matrix, top = scores.matrix(), scores.summary(3).top
    assert torch.equal(top.largest_rows, matrix.argsort(0, descending=True)[:3].T)
    assert torch.equal(top.smallest_rows, matrix.argsort(0)[:3].T)
    assert torch.allclose(scores.summary().by_source["red"], matrix[:4].sum(0))


def test_the_model_is_its_owners_between_blocks(monkeypatch) -> None:
    model, samples, targets = made(lora=True)
    monkeypatch.setattr("fastsft.attribution.methods._gradients.chunks", lambda plan, rows: chunks(plan, rows, 1))
    model.train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before, checkpoints = _state(model), run_of(model)
    method = GradDot(batching=Batching(max_tokens=1)).fit(model, checkpoints, samples)
    assert _unchanged(model, before)
    expected = method.score(targets).matrix()
    one, other = iter(method.score(targets)), iter(method.score(targets))
    for mine, theirs in itertools.islice(zip(one, other, strict=True), 3):
        assert torch.equal(mine.values, expected[mine.rows])
        assert torch.equal(theirs.values, mine.values)
        assert _unchanged(model, before)
        assert model.training
    assert frozen == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    with torch.no_grad():  # what is scored are the checkpoints, not the present weights
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(method.score(targets).matrix(), expected)


def test_contract_and_query_gradients_stand_alone() -> None:
    model, samples, targets = made(lora=False)
    directions = query_gradients(model, Queries.of(targets), Batching())
    flat = torch.cat([direction.flatten(1) for direction in directions.values()], dim=1)
    assert_same(flat, torch.stack([query_gradient(model, rows) for rows in targets.values()]))
    values, tokens = contract(model, [samples[:2], samples[2:]], directions, Batching())
    assert tokens == []
    assert_same(values, _dots(model, samples, targets))
    name = next(iter(directions))
    part, _ = contract(model, [samples], {name: directions[name]}, Batching())
    width = directions[name][0].numel()
    assert_same(part, gradients(model, samples)[:, :width] @ flat[:, :width].T)


def test_a_queries_loss_does_not_follow_the_samples_loss() -> None:
    model, samples, targets = made(lora=True)
    mean = GradDot(batching=Batching(loss="mean")).fit(model, [], samples).score(targets).matrix()
    tokens = torch.tensor([row.num_supervised for row in samples], dtype=torch.float64)
    assert_same(mean, _dots(model, samples, targets) / tokens[:, None])


def test_scores_stay_those_of_their_fit() -> None:
    model, samples, targets = made(lora=True)
    method = GradDot().fit(model, [], samples)
    scores = method.score(targets)
    method.fit(model, run_of(model), samples[::-1])
    assert_same(scores.matrix(), _dots(model, samples, targets))


def test_bad_use_is_a_sentence() -> None:
    model, samples, _ = made(lora=True)
    with pytest.raises(ValueError, match="one state a checkpoint: got 2 for 1 checkpoints"):
        GradDot().fit(model, [], samples, [{}, {}])
    with pytest.raises(ValueError, match="no direction is of a layer"):
        contract(model, [samples], {"elsewhere.weight": torch.zeros(1, 2, 2)}, Batching())
    with pytest.raises(ValueError, match="has no weights of"):
        GradDot().fit(model, [Checkpoint("empty", {})], samples)
    silent = SimpleNamespace(num_supervised=0, id="silent")
    with pytest.raises(ValueError, match="query 'silent' has no supervised token"):
        GradDot().fit(model, [], samples).score([silent])
    with pytest.raises(ValueError, match="`targets` is empty"):
        GradDot().fit(model, [], samples).score({})
