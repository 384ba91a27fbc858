"""Norms and embeddings, followed on request: their factors make autograd's own per-document gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastsft import ops
from fastsft.capturing import Capture, Documents, find_layers
from tests.attribution._support import make_rows, tiny_model
from tests.capturing._support import one_by_one, padded, sum_loss

BOTH = ("embedding", "norm")


class _Grads:
    """A sink that forms the per-document gradients of every kind of layer."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def follow(self, watcher: Capture) -> _Grads:
        self.layers = watcher.layers
        return self

    def __call__(self, index, x, dy, documents):
        layer = self.layers[index]
        if layer.kind == "embedding":
            dy = nn.functional.one_hot(dy, layer.shape[0]).to(x)
        grads = ops.document_grads(x, dy, documents.offsets)
        assert tuple(grads.shape[1:]) == layer.shape
        self.found[layer.name] = self.found.get(layer.name, 0) + grads.reshape(len(documents), *layer.weight.shape)
        return grads.sum(0)


def _watch(model: nn.Module, extra: tuple[str, ...], **options: Any) -> tuple[Capture, _Grads]:
    sink = _Grads()
    watcher = Capture(model, sink=sink, extra=extra, **options)
    sink.follow(watcher)
    return watcher, sink


@pytest.mark.parametrize("weight_grads", ["autograd", "sink", "none"])
def test_norms_and_embeddings_of_llama_equal_one_backward_a_row(weight_grads: str) -> None:
    rows = make_rows(5, source="red", seed=1)
    ids, labels, mask = padded(rows)
    model, plain = tiny_model(lora=False), tiny_model(lora=False)
    watcher, sink = _watch(model, BOTH, weight_grads=weight_grads)
    with watcher.batch(Documents.rows(*ids.shape)):
        sum_loss(model, ids, labels, attention_mask=mask).backward()
    expected = one_by_one(plain, rows)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(sink.found)
    assert set(sink.found) == set(dict(model.named_parameters())) - {"lm_head.weight"}
    for name, grads in sink.found.items():
        truth = torch.stack([each[name] for each in expected])
        assert torch.allclose(grads, truth, rtol=1e-10, atol=1e-12 * float(truth.abs().max())), name
    sum_loss(plain, ids, labels, attention_mask=mask).backward()
    for (name, found), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if weight_grads == "none" and name in sink.found:
            assert found.grad is None
        else:
            assert torch.allclose(found.grad, other.grad, rtol=1e-10, atol=1e-12), name


def test_scaled_embeddings_and_norms_of_one_plus_w_as_in_gemma() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = Gemma3ForCausalLM(config).double().eval()
    rows = make_rows(4, source="red", seed=1)
    rows[0].input_ids[2] = 0  # the padding row gets no gradient
    ids, labels, mask = padded(rows)
    watcher, sink = _watch(model, BOTH)
    with watcher.batch(Documents.rows(*ids.shape)):
        sum_loss(model, ids, labels, attention_mask=mask).backward()
    watcher.close()
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"} <= set(sink.found)
    expected = one_by_one(model, rows)
    for name, grads in sink.found.items():
        truth = torch.stack([each[name] for each in expected])
        # it norms in float32
        assert torch.allclose(grads, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max())), name
        assert float(truth.abs().max()) > 0


@pytest.mark.parametrize("transposed", [False, True], ids=["tokens first", "heads first"])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_norms_of_heads_are_summed_over_them(heads: int, transposed: bool) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(4).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.view(*x.shape[:2], heads, 4)
            return self.norm(x.transpose(1, 2) if transposed else x).sin()

    model = Heads()
    x = torch.randn(3, 5, heads * 4, dtype=torch.float64)  # 5 tokens: as many as heads, once
    watcher, sink = _watch(model, ("norm",))
    with watcher.batch(Documents.packed([[2, 3]] * 3, 5)):
        model(x).square().sum().backward()
    watcher.close()
    parts = [part for row in x for part in (row[None, :2], row[None, 2:])]
    expected = [torch.autograd.grad(model(part).square().sum(), model.norm.weight)[0] for part in parts]
    assert torch.allclose(sink.found["norm.weight"], torch.stack(expected), rtol=1e-10)


def test_layer_norms_and_their_biases_and_a_tied_embedding_as_in_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).double().eval()
    with pytest.raises(ValueError, match=r"transformer.wte.weight is shared with another layer"):
        find_layers(model, ("embedding",))
    watcher, sink = _watch(model, ("norm",))
    ids = torch.randint(0, 20, (2, 7))
    with watcher.batch(Documents.rows(2, 7)):
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    named = dict(model.named_parameters())
    assert {"transformer.h.0.ln_1.weight", "transformer.ln_f.weight"} <= set(sink.found)
    for name, grads in sink.found.items():
        assert torch.allclose(grads.sum(0), named[name].grad, rtol=1e-9, atol=1e-12), name


def test_extra_layers_are_followed_on_request_alone() -> None:
    model = tiny_model(lora=False)
    kinds = {extra: {layer.kind for layer in find_layers(model, extra)} for extra in ((), ("norm",), BOTH)}
    assert kinds == {(): {"linear"}, ("norm",): {"linear", "norm"}, BOTH: {"linear", "norm", "embedding"}}
    model.model.embed_tokens.weight.requires_grad_(False)
    assert {layer.kind for layer in find_layers(model, BOTH)} == {"linear", "norm"}
    assert all(layer.kind == "linear" for layer in find_layers(tiny_model(lora=True), BOTH))  # frozen all


def test_bad_use_of_extra_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="`extra` may name embedding, norm: got bias"):
        find_layers(nn.Linear(2, 2), ("bias",))
    with pytest.raises(ValueError, match="how often a token occurs in the batch"):
        find_layers(nn.Embedding(3, 2, scale_grad_by_freq=True), ("embedding",))
