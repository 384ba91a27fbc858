"""Specs: equal ones hash alike, layers apart, and bad ones are refused."""

import json

import pytest
import torch

from fastsft import ops
from fastsft.sketch import SketchSpec


def test_layer_seeds_depend_on_seed_and_name_alone() -> None:
    assert SketchSpec(seed=1).layer_seed("a") == SketchSpec(seed=1, size=64).layer_seed("a")
    seeds = {SketchSpec(seed=seed).layer_seed(name) for seed in range(8) for name in ("a", "b", "c")}
    assert len(seeds) == 24
    # pinned: a store written today must be readable by tomorrow's version
    assert SketchSpec().layer_seed("model.layers.0.self_attn.q_proj.weight") == 530456770


def test_sketches_of_a_layer_keep_inner_products_in_the_mean() -> None:
    a, b = torch.randn(2, 12, 40, dtype=torch.float64)
    truth = float((a * b).sum())
    dots = []
    for seed in range(400):
        key = SketchSpec(size=64, seed=seed).layer_seed("layer")
        left, right = ops.sketch_matrix(torch.stack([a, b]), 64, key)
        dots.append(float(left @ right))
    error = float(a.norm() * b.norm()) / 8  # one sketch of 64
    # the mean of 400: 4 standard errors
    assert abs(sum(dots) / 400 - truth) < 4 * error / 20


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kind": "dense"}, ValueError, "must be one of 'sjlt', 'factored', 'kronecker': got 'dense'"),
        ({"size": 100}, ValueError, "multiple of 16"),
        ({"size": 0}, ValueError, "16"),
        ({"size": 64.0}, ValueError, "16"),
        ({"seed": "1"}, TypeError, "whole number"),
        ({"precondition": "sgd"}, ValueError, "None, 'adam' or 'ekfac': got 'sgd'"),
        ({"extra": "norm"}, ValueError, "must be a tuple of 'embedding' and 'norm': got 'norm'"),
        ({"extra": ("norm", "norm")}, ValueError, "tuple"),
        ({"extra": ("bias",)}, ValueError, "tuple"),
        ({"kind": "kronecker", "size": 48}, ValueError, "power of two"),
        ({"kind": "factored", "precondition": "adam"}, ValueError, "which kind 'factored' gives up"),
        ({"kind": "kronecker", "extra": ("norm",)}, ValueError, "which kind 'kronecker' gives up"),
        ({"precondition": "ekfac", "extra": ("embedding",)}, ValueError, "use precondition 'adam'"),
    ],
)
def test_bad_specs_are_refused(options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        SketchSpec(**options)


def test_a_spec_goes_through_json_and_nothing_else_does() -> None:
    spec = SketchSpec(size=64, seed=3, precondition="adam", extra=("norm", "embedding"))
    assert SketchSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
    fields = SketchSpec().as_dict()
    with pytest.raises(ValueError, match=r"missing \['size'\], unknown \['width'\]"):
        SketchSpec.from_dict({"width" if key == "size" else key: value for key, value in fields.items()})
    with pytest.raises(ValueError, match="must be one of"):
        SketchSpec.from_dict({**fields, "kind": "dense"})
