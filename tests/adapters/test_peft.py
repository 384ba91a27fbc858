"""Experts to PEFT and back: both sides compute the same, and a LoRA that is more than one is refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fastsft.adapters import GatedConfig, GatedError, attach_gated, export_expert, files, import_expert
from tests.adapters._models import EXPERTS, gated_model, make_batch, randomise
from tests.train._support import VOCABULARY, make_model

# float64: the same products, summed in another order
CLOSE = {"rtol": 0, "atol": 1e-10}


def gpt2():
    """Its linear layers are Conv1D, whose weights lie the other way."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=64)
    return GPT2LMHeadModel(config)


BASES = [make_model, gpt2]


def one_expert(make=make_model, **settings):
    """(model, gated) in which the task's expert has gate 1 and others 0."""
    return gated_model("one_hot", "task", model=make(), **{"memory_rank": 0, **settings})


def logits(model):
    with torch.no_grad():
        return model.eval()(make_batch()[0]).logits


def loaded(make, folder):
    return PeftModel.from_pretrained(make().double(), folder)


# there


@pytest.mark.parametrize("make", BASES)
def test_peft_computes_what_the_expert_did(tmp_path, make):
    model, gated = one_expert(make)
    for name in EXPERTS:
        folder = export_expert(gated, name, tmp_path / name)
        gated.set_task(name)
        assert (logits(model) - logits(make().double())).abs().max() > 0.01
        torch.testing.assert_close(logits(loaded(make, folder)), logits(model), **CLOSE)


# a whole lora_alpha, one that isn't, one below 1
@pytest.mark.parametrize("alpha", [None, 3.0, 2.7, 0.2])
@pytest.mark.parametrize("memory", [False, True])
def test_every_scale_is_kept(tmp_path, alpha, memory):
    model, gated = one_expert(rank=3, alpha=alpha, memory_rank=2 if memory else 0)
    folder = export_expert(gated, "code", tmp_path, memory=memory)
    torch.testing.assert_close(logits(loaded(make_model, folder)), logits(model), **CLOSE)


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("held", [False, True])
def test_expert_and_memory_are_one_lora(tmp_path, make, held):
    model, gated = one_expert(make, memory_rank=3)
    if held:
        gated.select_memory({name: torch.arange(3.0) for name in gated.adapters}, 0.5)
    folder = export_expert(gated, "code", tmp_path, memory=True)
    other = loaded(make, folder)
    assert other.peft_config["default"].r == 2 + 3
    torch.testing.assert_close(logits(other), logits(model), **CLOSE)


def test_an_expert_without_the_memory_is_what_it_adds_itself(tmp_path):
    _, gated = one_expert(memory_rank=3)
    folder = export_expert(gated, "code", tmp_path)
    alone, only = one_expert(memory_rank=3)
    with torch.no_grad():
        for adapter in only.adapters.values():
            adapter.memory.B.weight.zero_()
    torch.testing.assert_close(logits(loaded(make_model, folder)), logits(alone), **CLOSE)


def adapted_by(peft_model):
    layers = {name.rpartition(".lora_")[0] for name, _ in peft_model.named_parameters() if ".lora_" in name}
    return {name.removeprefix("base_model.model.") for name in layers}


def test_peft_adapts_the_same_layers_and_no_others(tmp_path):
    _, gated = one_expert(targets=["0.self_attn.q_proj", "mlp.up_proj"])
    folder = export_expert(gated, "code", tmp_path)
    assert adapted_by(loaded(make_model, folder)) == set(gated.adapters)


class Ends(nn.Module):
    """A layer's whole name is the end of another module's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(4, 4)
        self.outer = nn.ModuleDict({"proj": nn.Embedding(5, 4)})

    def forward(self, input_ids):
        return self.proj(self.outer["proj"](input_ids))


def test_a_module_whose_name_ends_like_a_layers_is_left_alone(tmp_path):
    gated = attach_gated(
        Ends().double(), GatedConfig(experts=["a"], rank=2, gate="one_hot", granularity="task", sharing="linear")
    )
    randomise(gated)
    gated.set_task("a")
    other = PeftModel.from_pretrained(Ends().double(), export_expert(gated, "a", tmp_path))
    assert adapted_by(other) == {"proj"}
    ids = torch.arange(5)[None]
    torch.testing.assert_close(other(ids), gated.model(ids), **CLOSE)


@pytest.mark.parametrize(("make", "turned"), [(make_model, False), (gpt2, True)])
def test_the_directory_is_the_one_that_peft_writes(tmp_path, make, turned):
    _, gated = one_expert(make, double=False)
    export_expert(gated, "code", tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (told["r"], told["lora_alpha"], told["task_type"]) == (2, 4, "CAUSAL_LM")
    assert told["fan_in_fan_out"] is turned
    loaded_again = PeftModel.from_pretrained(make(), tmp_path)
    loaded_again.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    model, gated = one_expert()
    export_expert(gated, "code", tmp_path)

    def fail(path):
        raise OSError("no space left")

    monkeypatch.setattr(files, "_sync", fail)
    with pytest.raises(OSError, match="no space left"):
        export_expert(gated, "maths", tmp_path)
    torch.testing.assert_close(logits(loaded(make_model, tmp_path)), logits(model), **CLOSE)


def test_what_is_not_there_is_not_exported(tmp_path):
    _, gated = one_expert()
    with pytest.raises(GatedError, match="there is no expert 'latin'"):
        export_expert(gated, "latin", tmp_path / "out")
    with pytest.raises(GatedError, match="`memory` was asked for, and these adapters have none"):
        export_expert(gated, "code", tmp_path / "out", memory=True)
    assert not (tmp_path / "out").exists()


# and back


def make_lora(folder, make=make_model, **settings):
    """Train-like LoRA of PEFT, saved; its logits."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(make().double(), LoraConfig(**given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (make_model, {}),
        (gpt2, {"fan_in_fan_out": True}),
        (make_model, {"use_rslora": True, "lora_alpha": 3}),
        (make_model, {"r": 3}),
        (make_model, {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [1]}),
        (
            make_model,
            {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp.*": 1}, "alpha_pattern": {"model.layers.0.mlp.up_proj": 5}},
        ),
        (make_model, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}, "use_rslora": True}),
        (make_model, {"init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    ],
    ids=["plain", "gpt2", "rslora", "lower-rank", "some-layers", "patterns", "patterns-rslora", "dropout"],
)
def test_the_imported_expert_computes_what_the_lora_did(tmp_path, make, settings):
    expected = make_lora(tmp_path, make, **settings)
    model, gated = one_expert(make, rank=4, alpha=3.0)
    import_expert(gated, tmp_path, "guest")
    gated.set_task("guest")
    assert (expected - logits(make().double())).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_there_and_back_adds_the_same(tmp_path, make, alpha):
    model, gated = one_expert(make, alpha=alpha)
    export_expert(gated, "code", tmp_path)
    expected = logits(model)
    import_expert(gated, tmp_path, "copy")
    gated.set_task("copy")
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_ranks_that_the_lora_lacks_can_learn(tmp_path):
    make_lora(tmp_path, r=3)
    model, gated = one_expert(rank=5)
    import_expert(gated, tmp_path, "guest")
    gated.set_task("guest")
    ids, labels = make_batch()
    model(ids, labels=labels).loss.backward()
    for adapter in gated.adapters.values():
        grad = adapter.experts["guest"].B.weight.grad
        assert (grad[:, 3:].abs().amax(0) > 0).all()


def test_the_guest_takes_its_gate_and_disturbs_no_one(tmp_path):
    make_lora(tmp_path)
    model, gated = gated_model(rank=4)
    before = logits(model)
    import_expert(gated, tmp_path, "guest", gate_bias=-40.0)
    assert all(gating.experts["guest"].bias.item() == -40.0 for gating in gated.gatings)
    # sigmoid(-40) is 4e-18: the other experts speak as they did
    torch.testing.assert_close(logits(model), before, **CLOSE)
    assert gated.experts == [*EXPERTS, "guest"]


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# what PEFT itself writes where a LoRA is more than one
BEYOND = {
    "dora": ({"use_dora": True}, "use_dora=True: DoRA rescales the base weights"),
    "bias": ({"bias": "all"}, "bias='all': an expert has no bias"),
    "lora bias": ({"lora_bias": True}, "lora_bias=True: an expert has no bias"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*holds whole modules"),
    "a higher rank": ({"r": 6}, r"has rank 6 in .*, and experts have rank 4: .*GatedConfig\(rank=6\)"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices=.*embeddings of tokens"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "embed_tokens.* is no A or B of a linear layer's LoRA"),
    "the output layer": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.* is no A or B of a linear layer's LoRA"),
}


def state_of(gated):
    return gated.config, list(gated.experts), list(gated.tasks), [name for name, _ in gated.named_parameters()]


def refused(gated, folder, match, name="guest"):
    before, computed = state_of(gated), logits(gated.model)
    with pytest.raises(GatedError, match=match):
        import_expert(gated, folder, name)
    assert state_of(gated) == before
    assert torch.equal(logits(gated.model), computed)


@pytest.mark.parametrize("what", BEYOND)
def test_what_an_expert_cannot_do_is_refused(tmp_path, what):
    settings, match = BEYOND[what]
    make_lora(tmp_path, **settings)
    refused(one_expert(rank=4)[1], tmp_path, match)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGES = {
    "no folder": (lambda f: shutil.rmtree(f), "lora is no LoRA directory of PEFT: it has no adapter_config.json"),
    "gated adapters": (
        lambda f: (f / "adapter_config.json").rename(f / "gated.json"),
        "holds gated adapters: read it with `load_gated`",
    ),
    "json cut off": (
        lambda f: (f / "adapter_config.json").write_text('{"r":'),
        "adapter_config.json is damaged, it can't be read as JSON",
    ),
    "another kind": (lambda f: edit(f, peft_type="IA3"), "of the PEFT type IA3, and only LORA becomes an expert"),
    "part of the base": (
        lambda f: edit(f, init_lora_weights="pissa_niter_4"),
        "init_lora_weights='pissa_niter_4', which moved part of the base weights into the LoRA",
    ),
    "no rank": (lambda f: edit(f, r=None), "adapter_config.json must have a 'r' over 0"),
    "a setting of tomorrow": (lambda f: edit(f, use_zeal=0.5), "has use_zeal=0.5: .*not known to this fastsft"),
    "no safetensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors: save"),
    "no tensors": (lambda f: change_tensors(f, lambda t: t.clear()), "adapter_model.safetensors holds no LoRA at all"),
    "weights cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:900]),
        "adapter_model.safetensors is no whole safetensors file",
    ),
    "a third tensor of a layer": (
        lambda f: change_tensors(f, lambda t: t.update({QUERY + ".lora_magnitude_vector.weight": torch.ones(32, 1)})),
        r"holds 'base_model.*lora_magnitude_vector.weight' \[32, 1\], which is no A or B of a linear layer's LoRA",
    ),
    "a convolution": (
        lambda f: change_tensors(f, lambda t: t.update({QUERY + ".lora_A.weight": torch.ones(4, 32, 1, 1)})),
        r"holds 'base_model.*lora_A.weight' \[4, 32, 1, 1\], which is no A or B of a linear layer's LoRA",
    ),
    "half a LoRA": (
        lambda f: change_tensors(f, lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")),
        "has only lora_A of model.layers.0.mlp.up_proj",
    ),
    "another rank": (lambda f: edit(f, r=3), r"has lora_A \[4, \d+\] and lora_B .* their rank is 3"),
    "another model": (
        lambda f: change_tensors(
            f, lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.zeros(9, 4)})
        ),
        "is of another model: its model.layers.0.mlp.up_proj has 32 inputs and 9 outputs, and here it has 32 and 48",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_lora_is_refused_with_a_sentence(tmp_path, damage):
    make_lora(tmp_path / "lora")
    spoil, match = DAMAGES[damage]
    spoil(tmp_path / "lora")
    refused(one_expert(rank=4)[1], tmp_path / "lora", match)


def test_a_layer_that_the_adapters_leave_out_is_refused(tmp_path):
    make_lora(tmp_path)
    gated = one_expert(rank=4, targets=["q_proj"])[1]
    refused(gated, tmp_path, "has a LoRA of model.layers.0.mlp.down_proj, which these adapters leave out")


def test_a_name_that_is_taken_or_can_not_be_is_refused(tmp_path):
    make_lora(tmp_path)
    gated = one_expert(rank=4)[1]
    refused(gated, tmp_path, "there is, or was, an expert 'code': choose another name", name="code")
    refused(gated, tmp_path, "an expert's name must be letters", name="a.b")
