"""Unrolled scores against finite differences of a plain torch training loop with a weight a sample."""

import pytest
import torch

from fastsft.attribution.methods import Checkpoint
from fastsft.attribution.methods._replay import Schedule
from fastsft.attribution.methods.unrolled import Unrolled
from fastsft.data import Row
from fastsft.sketch.passes import Batching
from tests.attribution._support import make_rows
from tests.attribution.methods._support import summed_loss
from tests.attribution.methods.test_replay import BATCHES, RATES, SAMPLES, half_decay, make_model, train, trainable

TARGETS = {"one row": make_rows(1, source="two", seed=3), "three rows": make_rows(3, source="one", seed=4)}


def start_of(model):
    return Checkpoint("start", {name: parameter.detach().clone() for name, parameter in trainable(model).items()})


def schedule_for(model, optimizer="adamw", **settings):
    # eps: Adam's early steps are all but signs with a smaller one, and finite differences need room
    return Schedule(
        **{
            "batches": BATCHES,
            "learning_rate": RATES,
            "optimizer": optimizer,
            "eps": 1e-3,
            "momentum": 0.8 if optimizer == "sgd" else 0.0,
            "weight_decay": half_decay(model),
            "max_grad_norm": 3.0,
            **settings,
        }
    )


def losses_after(lora, schedule, weights, normaliser="fixed", samples=SAMPLES):
    """Train from the first weights with a weight a sample -> every query's final loss [Q]."""
    model = make_model(lora=lora)
    train(model, samples, schedule, weights, normaliser)
    with torch.no_grad():
        return torch.stack(
            [
                sum(summed_loss(model, row) for row in rows) / sum(row.num_supervised for row in rows)
                for rows in TARGETS.values()
            ]
        )


def differences(lora, schedule, normaliser="fixed", h=2e-4):
    """-d loss / d weight of every sample, by central differences of fourth order [N, Q]."""
    found = []
    for at in range(len(SAMPLES)):
        losses = []
        for shift in (-2, -1, 1, 2):
            weights = torch.ones(len(SAMPLES), dtype=torch.float64)
            weights[at] += shift * h
            losses.append(losses_after(lora, schedule, weights, normaliser))
        found.append(-(losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * h))
    return torch.stack(found)


def scores_of(model, schedule, **settings):
    return Unrolled(schedule, **settings).fit(model, [start_of(model)], SAMPLES).score(TARGETS)


@pytest.mark.parametrize(
    ("lora", "optimizer", "normaliser"),
    [(True, "adamw", "fixed"), (True, "adamw", "weighted"), (True, "sgd", "fixed"), (False, "adamw", "fixed")],
)
def test_scores_equal_finite_differences_of_training(lora, optimizer, normaliser):
    model = make_model(lora=lora)
    schedule = schedule_for(model, optimizer)
    found = scores_of(model, schedule, normaliser=normaliser).matrix()
    wanted = differences(lora, schedule, normaliser)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8 * float(wanted.abs().max()))
    assert (found[9] == 0).all()  # drawn in no step
    assert found[:9].abs().min() > 0


def test_how_the_run_is_cut_changes_nothing():
    model = make_model(lora=True)
    schedule = schedule_for(model)
    wanted = scores_of(model, schedule).matrix()
    for settings in (
        {"keep_bytes": 0},
        {"direction_bytes": 1},
        {"batching": Batching(max_tokens=1)},
        {"batching": Batching(max_tokens=64, packing=True)},
        {"batching": Batching(pad_id=7)},
    ):
        torch.testing.assert_close(scores_of(model, schedule, **settings).matrix(), wanted, rtol=1e-8, atol=1e-12)


def test_tokens_sum_to_their_sample_and_lie_at_their_labels():
    model = make_model(lora=True)
    method = Unrolled(schedule_for(model)).fit(model, [start_of(model)], SAMPLES)
    scores = method.score(TARGETS, per="token")
    tokens, values = scores.tokens(), scores.matrix()
    torch.testing.assert_close(values, method.score(TARGETS).matrix())
    for row, value in zip(SAMPLES, values, strict=True):
        torch.testing.assert_close(tokens[row.id].sum(0), value)
        assert [bool(each.any()) for each in tokens[row.id]] == [
            label != -100 and bool(value.any()) for label in row.labels
        ]


def test_a_token_scores_what_its_own_weight_does():
    """One step of SGD: a token's weight is a sample's of which no other token is supervised."""
    model = make_model(lora=True)
    row = SAMPLES[0]
    alone = [
        Row(str(at), "", row.input_ids, [label if place == at else -100 for place, label in enumerate(row.labels)])
        for at, label in enumerate(row.labels)
        if label != -100
    ]
    schedule = Schedule(batches=[[0]], learning_rate=[0.1], optimizer="sgd")
    whole = Unrolled(schedule).fit(model, [start_of(model)], [row]).score(TARGETS, per="token").tokens()[row.id]
    schedule = Schedule(batches=[list(range(len(alone)))], learning_rate=[0.1], optimizer="sgd")
    parts = Unrolled(schedule).fit(model, [start_of(model)], alone).score(TARGETS).matrix()
    torch.testing.assert_close(whole[[label != -100 for label in row.labels]], parts)


def test_smoothing_stays_near_the_derivative_where_it_is_small():
    model = make_model(lora=True)
    schedule = schedule_for(model)
    wanted = scores_of(model, schedule).matrix()
    torch.testing.assert_close(scores_of(model, schedule, smooth=1e-12).matrix(), wanted, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(scores_of(model, schedule, smooth=1e-2).matrix(), wanted, rtol=1e-2)


def test_the_query_itself_helps():
    model = make_model(lora=True)
    samples = [*TARGETS["one row"], *SAMPLES[:5]]
    schedule = Schedule(batches=[[0, 1, 2], [3, 4, 5]] * 3, learning_rate=[0.01] * 6)
    scores = Unrolled(schedule).fit(model, [start_of(model)], samples).score(TARGETS).matrix()
    assert scores[0, 0] > 0
    assert scores[:, 0].argmax() == 0


def test_the_final_weights_are_compared_with_the_runs():
    model = make_model(lora=True)
    schedule = schedule_for(model)
    trained = make_model(lora=True)
    train(trained, SAMPLES, schedule)
    final = start_of(trained).weights
    method = Unrolled(schedule, final=final).fit(model, [start_of(model)], SAMPLES)
    assert "missed the run's final weights by" in method.report
    with pytest.raises(ValueError, match="missed the run's final weights by 1 of the way"):
        Unrolled(schedule_for(model, learning_rate=[0.0] * 6), final=final).fit(model, [start_of(model)], SAMPLES)
    with pytest.raises(ValueError, match="`final` has no weights of"):
        Unrolled(schedule, final={}).fit(model, [start_of(model)], SAMPLES)


def test_a_run_without_its_beginning_is_refused():
    model = make_model(lora=True)
    with pytest.raises(ValueError, match="got no checkpoint"):
        Unrolled(schedule_for(model)).fit(model, [], SAMPLES)
    late = Checkpoint("epoch 1", start_of(model).weights, about={"step": 24})
    with pytest.raises(ValueError, match="got epoch 1, of a later step"):
        Unrolled(schedule_for(model)).fit(model, [late], SAMPLES)
    with pytest.raises(ValueError, match="normaliser"):
        Unrolled(schedule_for(model), normaliser="mean")
    with pytest.raises(ValueError, match="loss='sum'"):
        Unrolled(schedule_for(model), batching=Batching(loss="mean"))


def test_the_model_is_given_back_as_it_was():
    model = make_model(lora=True).train()
    start = start_of(model)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Unrolled(schedule_for(model)).fit(model, [start], SAMPLES).score(TARGETS).matrix()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
