"""Weight gradients formed by the sink equal autograd's; with "none" there are none, and dx is as ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsft import ops
from fastsft.capturing import Capture, Documents
from tests.attribution._support import make_rows, tiny_model, trainable
from tests.capturing._support import one_by_one, padded, sum_loss

FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


class _Sum:
    """A sink that hands back the sum of the documents' gradients, and keeps them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, torch.Tensor]] = []

    def __call__(self, index, x, dy, documents):
        grads = ops.document_grads(x, dy, documents.offsets)
        self.seen.append((index, grads))
        return grads.sum(0)


def _moved(model: nn.Module) -> nn.Module:
    """LoRA starts at B = 0, where half of the gradients are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return model


def _grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _assert_same(found: nn.Module, plain: nn.Module, **tolerance: float) -> None:
    expected = _grads(plain)
    for name, grad in _grads(found).items():
        assert (grad is None) == (expected[name] is None), name
        if grad is not None:
            assert grad.dtype == expected[name].dtype
            scale = float(expected[name].abs().max())
            assert torch.allclose(grad, expected[name], rtol=tolerance["rtol"], atol=tolerance["atol"] * scale), name


def _packed(rows):
    lengths = [[len(row.input_ids) for row in rows]]
    ids = torch.tensor([[t for row in rows for t in row.input_ids]])
    labels = torch.tensor([[t for row in rows for t in row.labels]])
    positions = torch.tensor([[p for row in rows for p in range(len(row.input_ids))]])
    return ids, labels, positions, Documents.packed(lengths, ids.shape[1])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradients_from_the_sink_equal_autograd(lora: bool, packed: bool, checkpointing: bool | None) -> None:
    rows = make_rows(5, source="red", seed=1)
    models = [_moved(tiny_model(lora=lora)) for _ in range(2)]
    sink = _Sum()
    watcher = Capture(models[1], sink=sink, weight_grads="sink")
    for model in models:
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if packed:
            ids, labels, positions, documents = _packed(rows)
            inputs = {"position_ids": positions}
        else:
            ids, labels, mask = padded(rows)
            documents, inputs = Documents.rows(*ids.shape), {"attention_mask": mask}
        with watcher.batch(documents):
            sum_loss(model, ids, labels, **inputs).backward()
    assert sorted(index for index, _ in sink.seen) == list(range(len(watcher.layers)))
    _assert_same(models[1], models[0], **FLOAT64)
    expected = one_by_one(_moved(tiny_model(lora=lora)), rows)
    for index, grads in sink.seen:
        truth = torch.stack([each[watcher.layers[index].name] for each in expected])
        assert torch.allclose(grads, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))


def test_losses_are_the_same_bits_and_float32_gradients_agree() -> None:
    rows = make_rows(6, source="red", seed=4)
    ids, labels, mask = padded(rows)
    models = [_moved(tiny_model(lora=False, dtype=torch.float32)) for _ in range(2)]
    watcher = Capture(models[1], sink=_Sum(), weight_grads="sink")
    losses = []
    for model in models:
        with watcher.batch(Documents.rows(*ids.shape)):
            losses.append(sum_loss(model, ids, labels, attention_mask=mask))
            losses[-1].backward()
    assert torch.equal(*losses)
    # 60 tokens are added document by document instead of at once
    _assert_same(models[1], models[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_under_autocast_the_float32_weight_gets_its_gradient(lora: bool) -> None:
    rows = make_rows(6, source="red", seed=4)
    ids, labels, mask = padded(rows)
    plain, autocast, watched = (_moved(tiny_model(lora=lora, dtype=torch.float32)) for _ in range(3))
    watcher = Capture(watched, sink=_Sum(), weight_grads="sink")
    losses = []
    for model in (plain, autocast, watched):
        with watcher.batch(Documents.rows(*ids.shape)):
            with torch.autocast("cpu", torch.bfloat16, enabled=model is not plain):
                loss = sum_loss(model, ids, labels, attention_mask=mask)
            loss.backward()
            losses.append(loss.detach())
    assert torch.equal(losses[1], losses[2])
    for (name, truth), rough, found in zip(
        _grads(plain).items(), _grads(autocast).values(), _grads(watched).values(), strict=True
    ):
        assert (truth is None) == (found is None), name
        if truth is not None:
            assert found.dtype == torch.float32
            # both round the same activations to bfloat16; ours alone adds and hands on the weight's in float32
            assert (found - truth).norm() <= 1.05 * (rough - truth).norm() + 1e-6 * truth.norm(), name


def test_backward_inside_autocast_rounds_nothing_that_the_forward_pass_did_not() -> None:
    plain, watched = _Twice().float(), _Twice().float()
    watched.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 3)
    watcher = Capture(watched, sink=_Sum(), weight_grads="sink")
    with watcher.batch(Documents.rows(2, 4)):
        loss = watched(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    plain(x).square().sum().backward()
    _assert_same(watched, plain, rtol=1e-6, atol=1e-6)


def test_conv1d_gets_its_gradient_and_its_bias() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16, attn_pdrop=0, resid_pdrop=0)
    plain = GPT2LMHeadModel(config).double().eval()
    watched = GPT2LMHeadModel(config).double().eval()
    watched.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 20, (2, 7))
    watcher = Capture(watched, sink=_Sum(), weight_grads="sink")
    assert any(layer.swapped for layer in watcher.layers)
    for model in (plain, watched):
        with watcher.batch(Documents.rows(2, 7)):
            model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    _assert_same(watched, plain, **FLOAT64)


class _Twice(nn.Module):
    """One layer used twice in a pass, on an input that needs no gradient, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).tanh())


def test_a_layer_used_twice_on_a_frozen_input_and_several_batches_add_up() -> None:
    torch.manual_seed(1)
    plain, watched = _Twice(), _Twice()
    watched.load_state_dict(plain.state_dict())
    sink = _Sum()
    watcher = Capture(watched, sink=sink, weight_grads="sink")
    for _ in range(2):
        x = torch.randn(2, 4, 3, dtype=torch.float64)
        for model in (plain, watched):
            with watcher.batch(Documents.rows(2, 4)):
                model(x).square().sum().backward()
    assert len(sink.seen) == 4
    _assert_same(watched, plain, **FLOAT64)


def test_frozen_weights_are_seen_and_get_none() -> None:
    model = _Twice()
    sink = _Sum()
    watcher = Capture(model, sink=sink, weight_grads="sink")
    model.layer.weight.requires_grad_(False)
    with watcher.batch(Documents.rows(2, 4)):
        model(torch.randn(2, 4, 3, dtype=torch.float64)).sum().backward()
    assert sink.seen
    assert model.layer.weight.grad is None
    assert model.layer.bias.grad is not None


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_none_leaves_followed_weights_alone_and_sees_the_same(lora: bool, checkpointing: bool | None) -> None:
    rows = make_rows(5, source="red", seed=1)
    ids, labels, mask = padded(rows)
    seen, models = [], []
    for mode in ("autograd", "none"):
        model = _moved(tiny_model(lora=lora))
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        sink = _Sum()
        watcher = Capture(model, sink=sink, weight_grads=mode)
        followed = {layer.name for layer in watcher.layers}
        with watcher.batch(Documents.rows(*ids.shape)):
            sum_loss(model, ids, labels, attention_mask=mask).backward()
        models.append(model)
        seen.append(sink.seen)
    assert [index for index, _ in seen[0]] == [index for index, _ in seen[1]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*seen, strict=True))
    for (name, plain), none in zip(_grads(models[0]).items(), _grads(models[1]).values(), strict=True):
        assert none is None if name in followed else (none is None) == (plain is None), name
        assert none is None or torch.equal(none, plain), name
    assert [p.requires_grad for p in models[0].parameters()] == [p.requires_grad for p in models[1].parameters()]


def test_none_sees_layers_behind_which_nothing_needs_a_gradient() -> None:
    model = _Twice()
    sink = _Sum()
    watcher = Capture(model, sink=sink, weight_grads="none")
    with watcher.batch(Documents.rows(2, 4)):
        model(torch.randn(2, 4, 3, dtype=torch.float64)).sum().backward()
    assert len(sink.seen) == 2
    assert model.layer.weight.grad is None
    assert model.layer.bias.grad is None
    model(torch.randn(2, 4, 3, dtype=torch.float64)).sum().backward()
    assert model.layer.bias.grad is not None


def test_close_and_the_time_between_batches_restore_the_layers_own_forward() -> None:
    model = _Twice()
    own = model.layer.forward
    watcher = Capture(model, sink=_Sum(), weight_grads="sink")
    assert model.layer.forward != own
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    assert type(model(x).grad_fn) is type(_Twice()(x).grad_fn)
    model(x).sum().backward()  # outside a batch: autograd's own
    assert model.layer.weight.grad is not None
    watcher.close()
    assert model.layer.forward == own
    assert not model.layer._forward_hooks


def test_bad_use_of_weight_grads_is_a_sentence() -> None:
    model = _Twice()
    with pytest.raises(ValueError, match='must be "autograd", "sink" or "none": got \'me\''):
        Capture(model, weight_grads="me")
    with pytest.raises(ValueError, match="needs a `sink`"):
        Capture(model, weight_grads="sink")
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    for sink, words in ((lambda *_: None, "got None"), (lambda *_: torch.zeros(2, 3), r"got shape \[2, 3\]")):
        watcher = Capture(model, sink=sink, weight_grads="sink")
        with watcher.batch(Documents.rows(2, 4)), pytest.raises(ValueError, match=words):
            model(x).sum().backward()
        watcher.close()

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    two = nn.Sequential(nn.Linear(3, 3), Own(3, 3))
    with pytest.raises(ValueError, match=r"1.weight \(Own\) has one of its own"):
        Capture(two, sink=_Sum(), weight_grads="sink")
    assert "forward" not in vars(two[0])  # the first was given back
    watcher = Capture(model, sink=_Sum(), weight_grads="sink")
    with pytest.raises(ValueError, match="another capture"):
        Capture(model, sink=_Sum(), weight_grads="sink")
    watcher.close()
