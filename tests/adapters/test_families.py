"""Model families of transformers: fused and separate projections, attention beside the MLP, experts of a mixture."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.adapters._models import Loops, gated_model, make_batch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# layers that share one read of their input, in the order of a block's groups
FAMILIES = {
    "qwen2": ({}, [3, 1, 2, 1]),
    "gemma2": ({"head_dim": 16}, [3, 1, 2, 1]),
    "olmo2": ({}, [3, 1, 2, 1]),
    "phi3": ({}, [1, 1, 1, 1]),  # one projection for q, k and v, which is registered after that of the output
    "phi": ({"resid_pdrop": 0.0}, [3, 1, 1, 1]),
    "gpt_neox": ({}, [1, 1, 1, 1]),
    "falcon": ({}, [1, 1, 1, 1]),
    "bloom": ({"n_layer": 2, "n_head": 2}, [1, 1, 1, 1]),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, [3, 1, 1, 1]),
    # their experts are no linear layers and stay as they are
    "mixtral": ({"num_local_experts": 4}, [3, 1]),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        [3, 1, 2, 1, 1],
    ),
}
# the mixtures multiply their experts in float32 at most
MIXTURES = ("mixtral", "qwen2_moe")
# these flatten rows before some layers, which the loops of the tests do not follow
FLAT = ("opt", "qwen2_moe")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_trains_and_generates(family):
    settings, groups = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **settings}))
    model, gated = gated_model("sigmoid", "sequence", model=model, double=family not in MIXTURES)
    close = {"rtol": 0, "atol": 1e-5 if family in MIXTURES else 1e-12}
    assert [len(group.adapters) for group in gated.blocks[0].groups] == groups
    ids, labels = make_batch()
    whole = model(ids, labels=labels)
    if family not in FLAT:
        torch.testing.assert_close(whole.logits, Loops(gated, 4)(ids, labels).logits, **close)
    # with a cache
    out = model(ids[:, :4], use_cache=True)
    logits = [out.logits]
    for at in range(4, 9):
        logits.append(model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **close)
    # and checkpointed
    model.train()

    def grads():
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in gated.named_parameters()}

    plain = grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in grads().items():
        torch.testing.assert_close(grad, plain[name], **close)
