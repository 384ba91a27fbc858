"""Per-document gradients seen by the hooks equal a loop of backward passes, and nothing changes by being watched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsft
from fastsft.capturing import Capture, Documents, capture, find_layers
from tests.attribution._support import loss_of, make_rows, tiny_model, trainable
from tests.capturing._support import one_by_one, padded, sum_loss


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_document_grads_equal_one_backward_a_document(
    lora: bool, packed: bool, dtype: torch.dtype, rtol: float
) -> None:
    model = tiny_model(lora=lora, dtype=dtype)
    with torch.no_grad():  # LoRA starts at B = 0, where half of the gradients are zero
        for parameter in trainable(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = make_rows(5, source="red", seed=1)
    with capture(model) as captured:
        if packed:
            lengths = [[len(row.input_ids) for row in rows]]
            size = sum(lengths[0]) + 3  # a tail of padding, which belongs to the last document and adds nothing
            ids = torch.tensor([[t for row in rows for t in row.input_ids] + [0] * 3])
            labels = torch.tensor([[t for row in rows for t in row.labels] + [-100] * 3])
            positions = torch.tensor([[p for row in rows for p in range(len(row.input_ids))] + [0, 1, 2]])
            with captured.batch(lengths=lengths, row_length=size):
                sum_loss(model, ids, labels, position_ids=positions).backward()
        else:
            ids, labels, mask = padded(rows)
            with captured.batch(rows=tuple(ids.shape)):
                sum_loss(model, ids, labels, attention_mask=mask).backward()
        grads = captured.document_grads()
    expected = one_by_one(model, rows)
    assert set(grads) >= {name for name in expected[0] if "proj" in name}
    for name, grad in grads.items():
        truth = torch.stack([each[name] for each in expected])
        # of the largest entry: float32 sums over a sequence lose that much
        assert torch.allclose(grad, truth, rtol=rtol, atol=rtol * float(truth.abs().max())), name
        total = dict(model.named_parameters())[name].grad
        assert torch.allclose(grad.sum(0), total, rtol=rtol, atol=10 * rtol * float(total.abs().max())), name


def test_influence_equals_dot_products_with_the_gradients() -> None:
    model = tiny_model(lora=True)
    rows = make_rows(4, source="blue", seed=2)
    ids, labels, mask = padded(rows)
    with capture(model) as captured, captured.batch(rows=tuple(ids.shape)):
        sum_loss(model, ids, labels, attention_mask=mask).backward()
    grads = captured.document_grads()
    targets = {name: torch.randn(2, *grad.shape[1:], dtype=torch.float64) for name, grad in grads.items()}
    expected = sum(torch.einsum("doi,aoi->da", grad, targets[name]) for name, grad in grads.items())
    assert torch.allclose(captured.influence(targets), expected, rtol=1e-10)
    tokens = captured.influence(targets, per="token").view(*ids.shape, 2)
    assert torch.allclose(tokens.sum(1), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="nothing to dot"):
        captured.influence({"not a layer": torch.zeros(1, 2, 2)})


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["no checkpointing", "non-reentrant", "reentrant"])
def test_capture_is_exact_under_gradient_checkpointing(reentrant: bool | None) -> None:
    rows = make_rows(4, source="blue", seed=2)
    ids, labels, mask = padded(rows)
    found = []
    for how in (None, reentrant):
        model = tiny_model(lora=True)
        model.train()
        if how is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": how})
        with capture(model) as captured, captured.batch(rows=tuple(ids.shape)):
            sum_loss(model, ids, labels, attention_mask=mask).backward()
        found.append(captured.document_grads())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_gradients_are_the_same_bits_when_watched() -> None:
    rows = make_rows(6, source="red", seed=4)
    plain, watched = tiny_model(lora=True, dtype=torch.float32), tiny_model(lora=True, dtype=torch.float32)
    loss_of(plain, rows).backward()
    seen: list[int] = []
    watcher = Capture(watched, sink=lambda index, x, dy, documents: seen.append(index))
    size = max(len(row.input_ids) for row in rows)
    with watcher.batch(Documents.rows(len(rows), size)):
        loss_of(watched, rows).backward()
    assert sorted(set(seen)) == list(range(len(watcher.layers)))
    for (name, a), (_, b) in zip(plain.named_parameters(), watched.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    watcher.close()
    assert not any(module._forward_hooks for module in watched.modules())


def test_tied_embeddings_and_heads_are_left_out_and_gpt2_layers_are_found() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)).double()
    names = [layer.name for layer in find_layers(model)]
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert not any("wte" in name or "lm_head" in name for name in names)
    ids = torch.randint(0, 20, (2, 7))
    with capture(model) as captured, captured.batch(rows=(2, 7)):
        _sum = model(input_ids=ids, use_cache=False).logits.square().sum()
        _sum.backward()
    for name, grad in captured.document_grads().items():
        assert torch.allclose(grad.sum(0), dict(model.named_parameters())[name].grad, rtol=1e-9, atol=1e-12), name


def test_bad_use_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="no trainable linear layer"):
        Capture(nn.LayerNorm(4))
    model = nn.Linear(3, 2)
    with fastsft.capture(model) as captured:
        with pytest.raises(ValueError, match="either `rows="):
            with captured.batch():
                pass
        with captured.batch(rows=(2, 4)):
            with pytest.raises(ValueError, match="saw 6 tokens, the documents of this batch cover 8"):
                model(torch.ones(2, 3, 3)).sum().backward()
    watcher = Capture(model)
    with watcher.batch(Documents.rows(2, 3)):
        loss = model(torch.ones(2, 3, 3)).sum()
    with pytest.raises(RuntimeError, match="inside the same `with` block"):
        loss.backward()
    with pytest.raises(ValueError, match="must hold 1 or more documents of 4 tokens"):
        Documents.packed([[3, 2]], 4)
