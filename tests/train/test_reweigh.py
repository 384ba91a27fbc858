"""Weights on abilities' gradients: what the optimizer gets is the sum it says, and the books stay true to it."""

import numpy as np
import pytest
import torch

import fastsft
from fastsft.data import PackedDataset, RowDataset, pack
from fastsft.tasks import MixError
from fastsft.train import Steering
from fastsft.train.logits import LogitsTap
from fastsft.train.loop import Padding
from tests.train._support import (
    SOURCES,
    assert_adds_up,
    make_lora,
    make_model,
    make_rows,
    make_targets,
    make_trainer,
    weights_of,
)

ABILITIES = {"apples": "maths", "bricks": "code"}
FACTORS = {"apples": 0.5, "bricks": 1.5, "clouds": 1.0}


class Given:
    """Weights for code and maths, whatever the gradients."""

    def __init__(self, code=3.0, maths=1.0):
        self.weights = np.array([maths, code])

    def __call__(self, gram):
        self.seen = gram
        return self.weights


def train(out, steering, *, model=None, dataset=None, width=None, collator=None, steps=1, tokens=False, **settings):
    """Train by SGD without clipping, so that a step is its gradient -> the run and how far each weight moved."""
    model = (model or make_lora()).double()
    before = weights_of(model)
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **settings}
    trainer = make_trainer(out / "trainer", model, dataset, width=width, collator=collator, max_steps=steps, **settings)
    run = fastsft.attach(
        trainer,
        make_targets(),
        out=out / "run",
        settings=fastsft.Attribution(refresh_every=2, tokens=tokens, factor="exact"),
        steering=steering,
    )
    trainer.train()
    return run, {name: weight - before[name] for name, weight in weights_of(model).items()}


def weighted(rows, factors, model):
    """The slow truth: -0.1 times the gradient of the mean token loss, each row's loss times its source's factor."""
    model = model.double()
    total = sum(sum(label != -100 for label in row.labels[1:]) for row in rows)
    model.zero_grad()
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        (loss * factors[row.source] / total).backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else -0.1 * weight.grad
        for name, weight in model.named_parameters()
    }


def steering(apply, resolver=None):
    return Steering(resolver=resolver or Given(), apply=apply, abilities=ABILITIES)


@pytest.mark.parametrize("apply", ["lagged", "exact"])
@pytest.mark.parametrize("layout", ["padded", "accumulated", "packed", "padded on the left"])
def test_the_step_is_the_weighted_sum_of_the_abilities_gradients(tmp_path, apply, layout):
    rows = make_rows(8)
    given = {"dataset": RowDataset(rows), "per_device_train_batch_size": 8}
    if layout == "accumulated":
        given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    if layout == "packed":
        given["dataset"] = PackedDataset(rows, pack(rows, 48, seed=0))
        given |= {"width": 48, "per_device_train_batch_size": len(given["dataset"])}
    if layout == "padded on the left":
        given["collator"] = LeftPadding()
    _, moved = train(tmp_path, steering(apply), **given)
    wanted = weighted(rows, FACTORS, make_lora())
    assert any(change.abs().max() > 1e-3 for change in wanted.values())
    for name, change in wanted.items():
        # the trainer's loss is float32: its epsilon, times the length of the sums
        torch.testing.assert_close(moved[name], change, rtol=2e-4, atol=2e-7, msg=lambda text, name=name: name + text)


class LeftPadding:
    def __call__(self, features):
        width = max(len(feature["input_ids"]) for feature in features)
        gaps = [width - len(feature["input_ids"]) for feature in features]
        pairs = list(zip(features, gaps, strict=True))
        return {
            "input_ids": torch.tensor([[0] * gap + list(each["input_ids"]) for each, gap in pairs]),
            "labels": torch.tensor([[-100] * gap + list(each["labels"]) for each, gap in pairs]),
            "attention_mask": torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
            "position_ids": torch.tensor([[0] * gap + list(range(width - gap)) for gap in gaps]),
        }


@pytest.mark.parametrize("apply", ["lagged", "exact"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_the_books_balance_under_weights(tmp_path, apply, optimizer):
    rate = 0.1 if optimizer == "sgd" else 5e-3
    run, _ = train(
        tmp_path,
        steering(apply),
        steps=8,
        optim=optimizer,
        learning_rate=rate,
        max_grad_norm=1.0,
        tokens=True,
        dataset=RowDataset(make_rows(24)),
    )
    assert_adds_up(run.record)
    for event in run.record.events("interval"):
        assert event["displacement_error"] < 1e-9  # float64: what is booked is what the optimizer got
    for event in run.record.events("step"):
        assert event["identity_error"] < 1e-6  # gradients reach the probe through a float32 loss
    intervals = list(run.record.events("interval"))
    entries = np.zeros((3, 2))
    samples = np.zeros((3, 2))
    for event in intervals:
        for a, entry in enumerate(event["abilities"].values()):
            entries[:, a] += [entry["by_source"][name] for name in SOURCES]
            samples[:, a] += [entry["samples"][name] for name in SOURCES]
    assert np.abs(entries - samples).sum() < 1e-6 * np.abs(entries).sum()  # phi by kept gradients: rounding
    table = run.record.influence().to_pydict()
    for phi, tokens in zip(table["phi"], table["tokens"], strict=True):
        assert np.isfinite(phi)
        assert np.isfinite(tokens).all()


def test_lagged_works_on_full_weights_with_tied_embeddings(tmp_path):
    def model():
        made = make_model()
        made.config.tie_word_embeddings = True
        made.tie_weights()
        return made

    rows = make_rows(8)
    _, moved = train(
        tmp_path, steering("lagged"), model=model(), dataset=RowDataset(rows), per_device_train_batch_size=8
    )
    for name, change in weighted(rows, FACTORS, model()).items():
        torch.testing.assert_close(moved[name], change, rtol=2e-4, atol=2e-7)


def test_exact_needs_all_trained_weights_booked(tmp_path):
    with pytest.raises(MixError, match="train LoRA, or use apply='lagged'"):
        train(tmp_path, steering("exact"), model=make_model())


def test_the_targets_gradients_are_what_a_lagged_resolver_sees(tmp_path):
    """Inner products of the targets' gradients by autograd, up to their scale."""
    resolver = Given()
    run, _ = train(tmp_path, Steering(resolver=resolver, abilities=ABILITIES), steps=1)
    model = make_lora().double()
    gradients = []
    for rows in make_targets().values():
        truth = weighted(rows, dict.fromkeys(SOURCES, 1.0), model)
        gradients.append(torch.cat([each.flatten() for name, each in truth.items() if "lora" in name]))
    G = torch.stack(gradients)
    gram = (G @ G.T).numpy()
    first = next(run.record.events("conflict"))
    np.testing.assert_allclose(first["gram"], gram / np.diag(gram).mean(), rtol=1e-4)
    assert first["abilities"] == ["maths", "code"]
    assert first["factors"] == pytest.approx({"maths": 0.5, "code": 1.5})
    refresh = next(run.record.events("refresh"))
    np.testing.assert_allclose(refresh["norms"], 100 * np.diag(gram), rtol=1e-4)
    assert refresh["gram"][0][1] == pytest.approx(100 * gram[0, 1], rel=1e-3, abs=1e-9)


def test_the_diagonal_is_free_of_the_noise_of_rows(tmp_path):
    """Gradients of two halves of the rows, each scaled to the whole."""
    run, _ = train(tmp_path, steering("lagged"), steps=1)
    refresh = next(run.record.events("refresh"))
    for place, rows in enumerate(make_targets().values()):
        halves = []
        for part in (rows[::2], rows[1::2]):
            truth = weighted(part, dict.fromkeys(SOURCES, 1.0), make_lora())
            halves.append(torch.cat([each.flatten() for name, each in truth.items() if "lora" in name]) / -0.1)
        assert refresh["gram"][place][place] == pytest.approx(float(halves[0] @ halves[1]), rel=1e-3)
        assert refresh["gram"][place][place] < refresh["norms"][place]


def test_what_can_not_be_weighed_is_refused(tmp_path):
    with pytest.raises(MixError, match="sources belong to 1 of the targets"):
        train(tmp_path, Steering(resolver=Given(), abilities={"apples": "maths"}))
    with pytest.raises(MixError, match="ability 'cooking', which has no target"):
        train(tmp_path, Steering(resolver=Given(), abilities={"apples": "cooking"}))
    with pytest.raises(MixError, match="'pears', which is none of the sources"):
        train(tmp_path, Steering(resolver=Given(), abilities={"pears": "maths"}))
    resolver = Given()
    resolver.weights = np.array([1.0])
    with pytest.raises(MixError, match="2 finite weights"):
        train(tmp_path / "a", Steering(resolver=resolver, abilities=ABILITIES))
    for settings in ({"apply": "later"}, {"smoothing": 1.0}, {"limits": (2.0, 3.0)}, {"policy": Given()}):
        with pytest.raises(MixError):
            Steering(**settings)
    with pytest.raises(MixError, match="callable"):
        Steering(resolver=3)


def test_logits_that_a_loss_computes_by_itself_are_noticed():
    model = make_model()
    tap = LogitsTap(model, 3, losses=False)
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ValueError, match="was not called in a training step"), tap.batch([0], [[3]], ids, packed=False):
        model.model(input_ids=ids)
    with (
        pytest.raises(ValueError, match="switch off what leaves tokens out"),
        tap.batch([0], [[3]], ids, packed=False),
    ):
        model(input_ids=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match="names no output layer"):
        LogitsTap(torch.nn.Linear(2, 2), 1, losses=False)


def test_the_tap_knows_each_sources_mean_training_loss():
    model, rows = make_model(), make_rows(6)
    tap = LogitsTap(model, 3, losses=True)
    batch = Padding(0, None)([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    lengths = [[len(row.input_ids)] for row in rows]
    with tap.batch([SOURCES.index(row.source) for row in rows], lengths, batch["labels"], packed=False):
        model(**batch)
    model.requires_grad_(False)
    for source, found in zip(SOURCES, tap.take_losses(torch.device("cpu")), strict=True):
        sums, counts = 0.0, 0
        for row in rows:
            if row.source == source:
                logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
                wanted = torch.tensor(row.labels[1:])
                sums += float(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum"))
                counts += int((wanted != -100).sum())
        assert found == pytest.approx(sums / counts, rel=1e-5)
    assert all(np.isnan(tap.take_losses(torch.device("cpu"))))
