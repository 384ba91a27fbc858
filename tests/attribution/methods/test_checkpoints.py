"""Checkpoints: what is loaded, what is refused in words, and that the model comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsft.attribution.methods import Checkpoint
from fastsft.attribution.methods._checkpoints import load, present, restored, shares, trainable


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    return model


def test_trainable_weights_are_loaded_from_a_mapping_or_a_function() -> None:
    model = _model()
    weights = {name: torch.full_like(weight, 2.0) for name, weight in trainable(model).items()}
    assert set(weights) == {"1.weight", "1.bias"}
    load(model, Checkpoint("one", weights))
    assert (model[1].weight == 2).all()
    load(model, Checkpoint("two", lambda: {name: -weight for name, weight in weights.items()}))
    assert (model[1].bias == -2).all()


def test_the_model_is_put_back_also_after_an_error() -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stopped() -> None:
        with restored(model):
            load(model, Checkpoint("zero", {name: 0 * weight for name, weight in trainable(model).items()}))
            assert not model[1].weight.any()
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        stopped()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_present_weights_are_a_copy() -> None:
    model = _model()
    checkpoint = present(model)
    before = model[1].weight.detach().clone()
    with torch.no_grad():
        model[1].weight.zero_()
    load(model, checkpoint)
    assert torch.equal(model[1].weight, before)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = _model()
    weights = {name: weight + 1 for name, weight in trainable(model).items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {
        "has no weights of 1.bias": {"1.weight": weights["1.weight"]},
        r"its 1.bias has the shape \[3\]": {**weights, "1.bias": torch.zeros(3)},
        "has other values of 0.weight than the model, where it is frozen": {
            **weights,
            "0.weight": model[0].weight + 1,
        },
    }
    for sentence, given in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            load(model, Checkpoint("wrong", given))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load(model, Checkpoint("whole", {**weights, "0.weight": model[0].weight.detach().clone()}))
    assert torch.equal(model[1].weight, weights["1.weight"])


def test_shares_sum_to_one_or_are_refused() -> None:
    weights = {"w": torch.zeros(1)}
    assert shares([Checkpoint("a", weights, share=1.0), Checkpoint("b", weights, share=3.0)]) == [0.25, 0.75]
    for bad in ([-1.0, 2.0], [0.0]):
        with pytest.raises(ValueError, match="must not be negative"):
            shares([Checkpoint("a", weights, share=share) for share in bad])
