"""Whitened dot products equal g^T P g' with P formed slowly in float64; a file gives back what was saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastsft import ops
from fastsft.sketch import AdamWhitener, LayerWhitening, SketchSpec, Whitening
from tests.attribution._support import loss_of, make_rows, tiny_model, trainable
from tests.sketch._support import collect, followed_grads, moved

ADAM = SketchSpec(size=256, precondition="adam")


def _trained(*, lora: bool, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = moved(tiny_model(lora=lora))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, **options)
    for seed in (5, 6, 7):
        loss_of(model, make_rows(4, source="blue", seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_adam_divides_dot_products_elementwise_by_the_optimizers_denominator(lora: bool, amsgrad: bool) -> None:
    model, optimizer = _trained(lora=lora, amsgrad=amsgrad, eps=1e-6, betas=(0.9, 0.99))
    whitening = AdamWhitener.from_optimizer(model, optimizer)
    named = dict(model.named_parameters())
    for name, grads in followed_grads(model, make_rows(3, source="red", seed=1)).items():
        state = optimizer.state[named[name]]
        second = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"] / (1 - 0.99**3)
        expected = torch.einsum("aoi,oi,boi->ab", grads, 1 / (second.sqrt() + 1e-6), grads)
        white = whitening.layers[name].apply(grads).flatten(1)
        assert torch.allclose(white @ white.T, expected, rtol=1e-10), name


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_sketches_under_adam_are_sketches_of_the_whitened_gradients(lora: bool) -> None:
    model, optimizer = _trained(lora=lora)
    whitening = AdamWhitener.from_optimizer(model, optimizer)
    rows = make_rows(5, source="red", seed=1)
    found = collect(model, rows, ADAM, whitening=whitening, max_tokens=25)
    sketches = torch.stack([found[row.id] for row in rows])
    expected = sum(
        ops.sketch_matrix(whitening.layers[name].apply(grads), 256, ADAM.layer_seed(name))
        for name, grads in followed_grads(model, rows).items()
    )
    assert torch.allclose(sketches, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_whitening_is_moved_to_a_float32_model() -> None:
    model, optimizer = _trained(lora=True)
    rows = make_rows(5, source="red", seed=1)
    whitening = AdamWhitener.from_optimizer(model, optimizer)
    wide, narrow = (collect(each, rows, ADAM, whitening=whitening) for each in (model, model.float()))
    for key, sketch in narrow.items():
        assert sketch.dtype == torch.float32
        # float32 through two layers
        assert (sketch - wide[key]).norm() < 1e-4 * wide[key].norm()


def _small() -> Whitening:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.rand(shape, generator=generator) for shape in ((2, 3), (2, 2), (3, 3), (4, 4))]
    layers = {"a.weight": LayerWhitening(*parts[:3]), "b.weight": LayerWhitening(parts[3])}
    return Whitening("ekfac", layers, {"damping": 0.1})


def test_a_file_gives_back_what_was_saved(tmp_path) -> None:
    whitening = _small()
    whitening.save(tmp_path / "w.safetensors")
    again = Whitening.load(tmp_path / "w.safetensors")
    assert (again.digest, again.precondition, again.about) == (whitening.digest, "ekfac", {"damping": 0.1})
    grads = torch.rand(5, 2, 3)
    assert torch.equal(again.layers["a.weight"].apply(grads), whitening.layers["a.weight"].apply(grads))
    assert again.layers["b.weight"].left is None


def test_the_digest_tells_whitenings_apart() -> None:
    whitening = _small()
    a, b = whitening.layers["a.weight"], whitening.layers["b.weight"]
    others = [
        replace(whitening, precondition="adam"),
        replace(whitening, about={"damping": 0.2}),
        replace(whitening, layers={"a.weight": a}),
        replace(whitening, layers={"a.weight": a, "c.weight": b}),
        replace(whitening, layers={"a.weight": replace(a, scale=a.scale.flip(0)), "b.weight": b}),
    ]
    assert len({each.digest for each in (whitening, *others)}) == 6
    assert _small().digest == whitening.digest


def test_a_damaged_file_is_refused_by_name(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    _small().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged: its digest is"):
        Whitening.load(path)
    for cut in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"w\.safetensors is not a whole safetensors file"):
            Whitening.load(path)
    from safetensors.torch import save_file

    save_file({"scale:a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is not a whitening saved by fastsft"):
        Whitening.load(path)


def test_bad_use_is_a_sentence() -> None:
    model, optimizer = _trained(lora=True)
    rows = make_rows(2, source="red", seed=1)
    whitening = AdamWhitener.from_optimizer(model, optimizer)
    with pytest.raises(ValueError, match="precondition 'adam', and the `whitening` given is None"):
        collect(model, rows, ADAM)
    with pytest.raises(ValueError, match="precondition None, and the `whitening` given is 'adam'"):
        collect(model, rows, SketchSpec(size=256), whitening=whitening)
    name, known = next(iter(whitening.layers.items()))
    with pytest.raises(ValueError, match=r"the whitening does not know .* fitted on 1 other layers"):
        collect(model, rows, ADAM, whitening=Whitening("adam", {name: known}))
    wrong = {**whitening.layers, name: LayerWhitening(known.scale[:, :2])}
    with pytest.raises(ValueError, match=r"has shape \[4, 2\], the layer \[4, 16\]"):
        collect(model, rows, ADAM, whitening=Whitening("adam", wrong))
    with pytest.raises(ValueError, match=r"AdamW has no second moment of base_model"):
        AdamWhitener.from_optimizer(model, torch.optim.AdamW(trainable(model)))
    with pytest.raises(ValueError, match=r"SGD has no second moment of base_model"):
        AdamWhitener.from_optimizer(model, torch.optim.SGD(trainable(model)))


def test_second_moments_by_name_serve_as_well_as_an_optimizer() -> None:
    model, optimizer = _trained(lora=True, eps=1e-7)
    moments = {
        name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    given = AdamWhitener.from_second_moments(moments, eps=1e-7)
    read = AdamWhitener.from_optimizer(model, optimizer)
    assert all(torch.allclose(given.layers[name].scale, read.layers[name].scale) for name in read.layers)
