"""A sample's sketch is the sketch of its own gradient, whatever shared its batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsft import ops
from fastsft.sketch import SketchSpec, sketch_samples
from tests.attribution._support import make_rows, tiny_model
from tests.capturing._support import one_by_one
from tests.sketch._support import collect, moved

SPEC = SketchSpec(size=256, seed=5)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss", ["sum", "mean"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_sketches_equal_sketches_of_one_backward_a_row(lora: bool, loss: str, packing: bool) -> None:
    model = moved(tiny_model(lora=lora))
    rows = make_rows(6, source="red", seed=1)
    found = collect(model, rows, SPEC, loss=loss, max_tokens=30, packing=packing)
    followed = {name for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2}
    followed -= {"model.embed_tokens.weight", "lm_head.weight"}
    assert sorted(found) == sorted(row.id for row in rows)
    for row, grads in zip(rows, one_by_one(model, rows), strict=True):
        truth = sum(ops.sketch_matrix(grads[name], 256, SPEC.layer_seed(name)) for name in followed)
        truth = truth / (row.num_supervised if loss == "mean" else 1)
        # the shares 1/n of a mean are float32
        assert torch.allclose(found[row.id], truth, rtol=1e-6, atol=1e-7 * float(truth.abs().max())), row.id


@pytest.mark.parametrize("kind", ["sjlt", "factored", "kronecker"])
def test_sketches_do_not_depend_on_batch_size_order_or_packing(kind: str) -> None:
    rows = make_rows(7, source="red", seed=1) + make_rows(6, source="blue", seed=2)
    model = moved(tiny_model(lora=True, dtype=torch.float32))
    spec = SketchSpec(size=16, kind=kind)  # as many as the narrowest layer leaves to "kronecker"
    alone = collect(model, rows, spec, max_tokens=1)
    for settings in ({"max_tokens": 4096}, {"max_tokens": 33}, {"max_tokens": 40, "packing": True}):
        found = collect(model, rows[::-1], spec, **settings)
        for key, sketch in alone.items():
            # float32: a pass of two layers, added in another order
            assert (found[key] - sketch).norm() < 1e-5 * sketch.norm(), (key, settings)


def test_sources_tokens_and_skipped_rows() -> None:
    rows = make_rows(4, source="red", seed=1) + make_rows(3, source="blue", seed=2)
    model = tiny_model(lora=True, dtype=torch.float32)
    batches = list(sketch_samples(model, rows, SPEC, max_tokens=24, skip=["red-1", "blue-2", "elsewhere"]))
    found = {id: (s, n) for b in batches for id, s, n in zip(b.ids, b.sources, b.tokens, strict=True)}
    assert found == {r.id: (r.source, r.num_supervised) for r in rows if r.id not in ("red-1", "blue-2")}
    assert all(b.sketches.dtype == torch.float32 for b in batches)
    lengths = {row.id: len(row.input_ids) for row in rows}
    assert [lengths[b.ids[0]] for b in batches] == sorted((lengths[b.ids[0]] for b in batches), reverse=True)
    assert all(lengths[b.ids[0]] * len(b.ids) <= 24 for b in batches)
    assert list(sketch_samples(model, [], SPEC)) == []


def test_the_model_is_left_as_it_was_found() -> None:
    model = moved(tiny_model(lora=True))
    model.train()
    model.base_model.model.lm_head.eval()
    state = [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    iterator = sketch_samples(model, make_rows(6, source="red", seed=1), SPEC, max_tokens=12)
    next(iterator)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    iterator.close()  # left early
    after = [(p.requires_grad, p.grad, p.detach()) for p in model.parameters()]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(state, after, strict=True))
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_callers_no_grad_does_not_matter_and_is_kept() -> None:
    model, rows = moved(tiny_model(lora=True)), make_rows(3, source="red", seed=1)
    with torch.no_grad():
        found = collect(model, rows, SPEC)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(found[key], sketch) for key, sketch in collect(model, rows, SPEC).items())


def test_dropout_acts_only_where_asked() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    model = moved(get_peft_model(tiny_model(lora=False), config).double())
    model.train()
    rows = make_rows(3, source="red", seed=1)
    first, second = collect(model, rows, SPEC), collect(model, rows, SPEC)
    assert all(torch.equal(first[key], second[key]) for key in first)
    dropped = collect(model, rows, SPEC, dropout=True)
    assert not any(torch.allclose(first[key], dropped[key]) for key in first)


def test_the_head_is_shown_supervised_tokens_alone_and_a_model_that_names_none_gives_the_same() -> None:
    model, rows = tiny_model(lora=False), make_rows(4, source="red", seed=1)
    shown = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shown.append(inputs[0].shape))
    expected = collect(model, rows, SPEC)
    assert shown == [(1, sum(row.num_supervised for row in rows), 16)]
    assert not model.lm_head._forward_pre_hooks

    class Plain(type(model)):
        get_output_embeddings = None

        def forward(self, input_ids, use_cache):
            assert not use_cache
            return super().forward(input_ids=input_ids, use_cache=False)

    model.__class__ = Plain
    model.lm_head.weight.requires_grad_(False)  # a head nobody names is a layer like others
    for key, sketch in collect(model, rows, SPEC).items():
        assert torch.allclose(sketch, expected[key], rtol=1e-9, atol=1e-9 * float(sketch.norm()))
    assert len(shown[-1]) == 3
    assert shown[-1][0] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"loss": "max"}, "`loss` must be 'sum' or 'mean'"), ({"max_tokens": 0}, "1 or more: got 0")],
)
def test_bad_settings_are_refused_before_anything_runs(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sketch_samples(nn.Linear(2, 2), [], SPEC, **settings)


def test_a_row_without_loss_is_refused_by_name() -> None:
    rows = make_rows(2, source="red", seed=1)
    rows[1].labels[1:] = [-100] * (len(rows[1].labels) - 1)
    with pytest.raises(ValueError, match="row 'red-1' of source 'red' has no supervised token"):
        sketch_samples(tiny_model(lora=True), rows, SPEC)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "qwen3"])
def test_padding_is_not_seen_without_a_mask(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 24, "pad_token_id": 0}
    more = {
        "gpt2": {"n_positions": 64},
        "opt": {"word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 64},
        "gemma3": {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
        "qwen3": {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text" if family == "gemma3" else family, **sizes, **more[family])
    model = AutoModelForCausalLM.from_config(config).double()
    rows = make_rows(5, source="red", seed=1)
    alone, together = (collect(model, rows, SPEC, max_tokens=size) for size in (1, 4096))
    for key, sketch in alone.items():
        # some norm, or turn positions, in float32
        assert (together[key] - sketch).norm() < 1e-5 * sketch.norm(), key
