"""Sanity checks: a randomised model is put back, methods that look at it are told from those that don't."""

import pytest
import scipy.stats
import torch

from fastsft.attribution.methods import Block, Checkpoint, GradDot, Queries, Scores
from fastsft.attribution.methods._checkpoints import trainable
from fastsft.evaluate.sanity import distinct_top, length_correlation, randomisation, randomised, redrawn
from tests.attribution._support import make_rows, tiny_model


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lora", [False, True])
def test_all_weights_are_drawn_anew_with_their_own_spread_and_put_back(lora):
    model = tiny_model(lora=lora)
    if lora:  # an adapter that has been trained
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    before = weights_of(model)
    with randomised(model, seed=1):
        inside = weights_of(model)
    after = weights_of(model)
    for name, weight in before.items():
        assert torch.equal(after[name], weight)
        if weight.std() > 0:
            assert not torch.isclose(inside[name], weight).any()
            error = weight.std() * (4 / weight.numel() ** 0.5)  # 4 standard errors
            assert abs(inside[name].std() - weight.std()) < error
            assert abs(inside[name].mean() - weight.mean()) < error
        else:
            assert torch.equal(inside[name], weight), "a norm's weights of 1 stay 1"


def test_weights_are_put_back_after_an_error_and_drawn_by_seed():
    model = tiny_model(lora=False)
    before = weights_of(model)
    drawn = []
    for seed in (1, 1, 2):
        with pytest.raises(KeyError), randomised(model, seed):
            drawn.append(weights_of(model)["lm_head.weight"]) or {}["an error"]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_weights_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match=r"head\.weight holds torch\.int8, which can't be drawn anew"):
        redrawn({"head.weight": torch.zeros(3, dtype=torch.int8)}, 0)


class Lengths:
    """A method that never looks at the model."""

    name = "lengths"

    def fit(self, model, checkpoints, samples, optimizer_state=None):
        self.samples = list(samples)
        return self

    def score(self, targets, *, per="sample"):
        queries = Queries.of(targets)
        values = torch.tensor([[float(len(row.input_ids) * (1 + at))] for at, row in enumerate(self.samples)])
        block = Block(list(range(len(self.samples))), 0, values.expand(-1, len(queries)))
        ids = [row.id for row in self.samples]
        return Scores(self.name, "", ids, [""] * len(ids), queries.names, lambda: iter([block]))


def test_a_method_that_does_not_look_at_the_model_is_told():
    model, rows = tiny_model(lora=True), make_rows(12, source="one", seed=0)
    queries = make_rows(3, source="two", seed=1)
    blind = randomisation(Lengths, model, rows, queries)
    assert blind.correlation == pytest.approx((1, 1, 1))
    assert not blind.sees_model
    assert "it does not look at it" in str(blind)


@pytest.mark.parametrize("checkpoints", [0, 2])
def test_a_method_that_follows_gradients_looks_at_the_model(checkpoints):
    model, rows = tiny_model(lora=False), make_rows(40, source="one", seed=0)
    queries = make_rows(6, source="two", seed=1)
    before = weights_of(model)
    run = [Checkpoint(f"step {at}", trainable(tiny_model(lora=False, seed=at))) for at in range(checkpoints)]
    found = randomisation(GradDot, model, rows, queries, checkpoints=run)
    assert found.method == "grad_dot"
    assert found.correlation.mean < 0.8
    assert found.sees_model
    assert "0 is best" in str(found)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_checkpoints_are_randomised_too_and_read_when_they_are_loaded():
    model, rows = tiny_model(lora=False), make_rows(8, source="one", seed=0)
    seen = []

    class Watching(GradDot):
        def contract(self, *args):
            seen.append(weights_of(self.model)["model.layers.0.mlp.up_proj.weight"])
            return super().contract(*args)

    weights = trainable(model)
    checkpoints = [Checkpoint("one", weights), Checkpoint("two", lambda: weights)]
    randomisation(Watching, model, rows, rows[:2], checkpoints=checkpoints)
    assert torch.equal(seen[0], seen[1])
    assert not torch.isclose(seen[2], seen[0]).any()
    assert not torch.isclose(seen[2], seen[3]).any(), "each checkpoint is drawn with a seed of its own"


def test_length_correlation_equals_scipy():
    matrix, lengths = torch.randn(30, 4).round(decimals=1), torch.randint(1, 9, (30,))
    wanted = [scipy.stats.spearmanr(column, lengths).statistic for column in matrix.T]
    found = length_correlation(matrix, lengths)
    assert found.mean == pytest.approx(sum(wanted) / 4)
    assert min(wanted) <= found.low <= found.mean <= found.high <= max(wanted)
    assert length_correlation(lengths[:, None].double() ** 3, lengths).mean == pytest.approx(1)


def test_queries_that_rank_nothing_are_left_out():
    lengths = torch.arange(5)
    matrix = torch.stack([torch.zeros(5), lengths.float(), lengths.float()], dim=1)
    assert length_correlation(matrix, lengths) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="no query ranks the samples"):
        length_correlation(matrix, [3] * 5)
    with pytest.raises(ValueError, match=r"must have the 5 rows of `matrix`: got the shape \[4\]"):
        length_correlation(matrix, [3] * 4)


def test_distinct_top_counts_different_samples():
    matrix = torch.tensor([[9.0, 9, 0], [8, 0, 9], [0, 8, 8], [1, 1, 1]])
    assert distinct_top(matrix, 1) == pytest.approx(2 / 3)
    assert distinct_top(matrix, 2) == pytest.approx(3 / 6)
    assert distinct_top(torch.zeros(4, 3), 2) == pytest.approx(2 / 6), "no ranking at all: the same for all queries"
    assert distinct_top(torch.eye(5), 1) == 1
    with pytest.raises(ValueError, match="`k` must be 1 to 4, the number of samples: got 5"):
        distinct_top(matrix, 5)
