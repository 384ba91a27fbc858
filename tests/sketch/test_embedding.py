"""Sketches of embeddings and norms equal sketches of their whole per-document gradients."""

from __future__ import annotations

import pytest
import torch

from fastsft import ops
from fastsft.sketch import AdamWhitener, SketchSpec, fit_whitening
from fastsft.sketch.project import add_embedding
from tests.attribution._support import loss_of, make_rows, tiny_model, trainable
from tests.sketch._support import collect, followed_grads

BOTH = ("embedding", "norm")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("width", [1, 16, 37])
def test_touched_rows_hash_as_in_the_whole_matrix(width: int, scaled: bool) -> None:
    offsets = torch.tensor([1, 4, 4, 9])  # an empty document, and tokens of none at both ends
    ids, dy = torch.randint(0, 7, (11,)), torch.randn(11, width, dtype=torch.float64)
    scale = torch.rand(7, width, dtype=torch.float64) if scaled else None
    grads = ops.document_grads(dy, torch.nn.functional.one_hot(ids, 7).double(), offsets)  # [D, V, H]
    expected = ops.sketch_matrix(grads if scale is None else grads * scale, 64, 9)
    out = torch.ones(3, 64, dtype=torch.float64)
    add_embedding(dy, ids, offsets, 9, scale, out)
    assert torch.allclose(out - 1, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("precondition", [None, "adam"])
def test_a_models_sketch_holds_embeddings_and_norms_where_asked(precondition: str | None, packing: bool) -> None:
    model = tiny_model(lora=False)
    whitening = None
    if precondition:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, eps=1e-4)
        loss_of(model, make_rows(4, source="blue", seed=5)).backward()
        optimizer.step()
        optimizer.zero_grad()
        whitening = AdamWhitener.from_optimizer(model, optimizer, extra=BOTH)
    spec = SketchSpec(size=256, precondition=precondition, extra=BOTH)
    rows = make_rows(5, source="red", seed=1)
    found = collect(model, rows, spec, whitening=whitening, max_tokens=30, packing=packing)
    expected = 0
    for name, grads in followed_grads(model, rows, BOTH).items():
        white = grads if whitening is None else whitening.layers[name].apply(grads)
        expected = expected + ops.sketch_matrix(white, 256, spec.layer_seed(name))
    sketches = torch.stack([found[row.id] for row in rows])
    assert torch.allclose(sketches, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


def test_norms_are_whitened_by_ekfac_as_one_row() -> None:
    model = tiny_model(lora=False)
    rows = make_rows(6, source="red", seed=1)
    spec = SketchSpec(size=256, precondition="ekfac", extra=("norm",))
    whitening = fit_whitening(model, rows, spec)
    found = collect(model, rows, spec, whitening=whitening)
    expected = 0
    for name, grads in followed_grads(model, rows, ("norm",)).items():
        white = whitening.layers[name].apply(grads)
        expected = expected + ops.sketch_matrix(white, 256, spec.layer_seed(name))
    sketches = torch.stack([found[row.id] for row in rows])
    assert torch.allclose(sketches, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("how", ["autocast", "bfloat16 weights"])
@pytest.mark.parametrize("precondition", [None, "ekfac"])
def test_half_precision_passes_give_float32_sketches_close_by(precondition: str | None, how: str) -> None:
    spec = SketchSpec(size=256, precondition=precondition, extra=("norm",) if precondition else BOTH)
    rows = make_rows(6, source="red", seed=1)
    model = tiny_model(lora=False, dtype=torch.float32)
    whitening = fit_whitening(model, rows, spec) if precondition else None
    plain = collect(model, rows, spec, whitening=whitening)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            rough = collect(model, rows, spec, whitening=whitening)
    else:
        rough = collect(model.bfloat16(), rows, spec, whitening=whitening)
    for key, sketch in rough.items():
        assert sketch.dtype == torch.float32
        # bfloat16 keeps 8 bits; activations and gradients pass two layers of it
        assert torch.cosine_similarity(sketch, plain[key], dim=0) > 0.98, key
