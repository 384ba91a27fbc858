"""save_gated and load_gated: what comes back computes and trains as before, and a fault leaves the model alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastsft.adapters import GatedConfig, GatedError, attach_gated, files, load_gated
from fastsft.adapters.files import save_gated
from fastsft.data import file_digest
from tests.adapters._models import EXPERTS, KINDS, gated_model, make_batch
from tests.train._support import VOCABULARY, make_model


def outputs(model, gated, task="code"):
    ids, labels = make_batch()
    if gated.config.granularity == "task":
        gated.set_task(task)
    with torch.no_grad():
        return model(ids, labels=labels).logits


def fresh(double=True):
    return make_model().double().eval() if double else make_model().eval()


def names(gated):
    return {name for name, _ in gated.named_parameters()}


def retell(folder, change):
    """Change what gated.json says."""
    path = folder / "gated.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


def reseal(folder, change):
    """Change the tensors, and let gated.json vouch for them."""
    path = folder / "gated.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    retell(folder, lambda told: told.update(sha256=file_digest(path)))


# what comes back


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("gate", "granularity"), KINDS)
def test_loaded_adapters_give_the_same_bits(tmp_path, gate, granularity, double):
    model, gated = gated_model(gate, granularity, double=double)
    assert gated.save(tmp_path / "saved") == tmp_path / "saved"
    other = fresh(double)
    again = load_gated(other, tmp_path / "saved")
    assert torch.equal(outputs(other, again), outputs(model, gated))
    assert again.config == gated.config
    assert (again.experts, again.tasks) == (gated.experts, gated.tasks)


def test_loaded_adapters_of_gpt2_give_the_same_bits(tmp_path):
    def base():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=64)
        return GPT2LMHeadModel(config).double().eval()

    model, gated = gated_model(model=base(), sharing="linear")
    gated.save(tmp_path)
    other = base()
    assert torch.equal(outputs(other, load_gated(other, tmp_path)), outputs(model, gated))


def test_the_file_holds_each_tensor_under_its_name_in_the_model(tmp_path):
    _, gated = gated_model(orthogonal=True)
    gated.save(tmp_path)
    kept = {name for name in gated.model.state_dict() if ".gated." in name or ".gating." in name}
    assert load_file(tmp_path / "gated.safetensors").keys() == kept
    assert names(gated) < kept
    told = json.loads((tmp_path / "gated.json").read_text())
    assert told["schema"] == files.SCHEMA
    assert told["layers"]["model.layers.1.mlp.down_proj"] == [48, 32]
    assert told["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("gate", "granularity"), [("one_hot", "task"), ("softmax", "task"), ("topk", "sequence")])
def test_experts_that_came_and_went_come_back_as_they_are(tmp_path, gate, granularity):
    model, gated = gated_model(gate, granularity)
    gated.consolidate("code")
    gated.add_expert("late", gate_bias=-1.0)
    gated.freeze_expert("general")
    gated.save(tmp_path)
    other = fresh()
    again = load_gated(other, tmp_path)
    assert again.experts == ["maths", "general", "late"]
    assert again.tasks == ["maths", "code", "general", "late"]
    for task in again.tasks:
        assert torch.equal(outputs(other, again, task), outputs(model, gated, task))
    assert [name for name in again.experts if again.is_frozen(name)] == ["general"]
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in gated.named_parameters() if p.requires_grad
    }
    with pytest.raises(GatedError, match="there is, or was"):
        again.add_expert("code")
    again.add_expert("later")
    assert outputs(other, again, "later").isfinite().all()


@pytest.mark.parametrize(("gate", "granularity"), [("one_hot", "task"), ("sigmoid", "token"), ("sigmoid", "sequence")])
def test_a_memory_alone_comes_back(tmp_path, gate, granularity):
    model, gated = gated_model(gate, granularity)
    for name in EXPERTS:
        gated.consolidate(name)
    gated.save(tmp_path)
    other = fresh()
    again = load_gated(other, tmp_path)
    assert again.experts == []
    assert torch.equal(outputs(other, again), outputs(model, gated))


def test_held_memory_is_saved_with_the_rest(tmp_path):
    model, gated = gated_model(memory_rank=4)
    generator = torch.Generator().manual_seed(0)
    gated.select_memory({name: torch.rand(4, generator=generator) for name in gated.adapters}, 0.5)
    assert any("held" in name for name in names(gated))
    gated.save(tmp_path)
    other = fresh()
    again = load_gated(other, tmp_path)
    assert torch.equal(outputs(other, again), outputs(model, gated))
    for name, adapter in again.adapters.items():
        assert adapter.held is None
        assert adapter.memory.A.weight.requires_grad
        # where sums are in the order of the ranks, another one would round otherwise
        assert torch.equal(adapter.stacked("A"), gated.adapters[name].stacked("A"))
        assert torch.equal(adapter.stacked("B"), gated.adapters[name].stacked("B"))


def step(model, gated):
    """One step of training; gates per sequence look at it, and routers remember what they saw."""
    ids, labels = make_batch(seed=3)
    optimizer = torch.optim.SGD(gated.parameter_groups(0.1))
    model.train()
    model(ids, labels=labels).loss.backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


def test_training_goes_on_as_if_it_had_never_been_saved(tmp_path):
    model, gated = gated_model(orthogonal=True)
    step(model, gated)
    gated.protect_router()
    step(model, gated)
    gated.save(tmp_path)
    other = fresh()
    again = load_gated(other, tmp_path)
    for one, each in ((model, gated), (other, again)):
        each.protect_router()
        each.freeze_expert("maths")
        step(one, each)
    assert again.gatings[0].protected.shape[1] > 1
    theirs = other.state_dict()
    for name, mine in model.state_dict().items():
        assert torch.equal(mine, theirs[name]), name


def test_beside_a_model_in_eval_mode_routers_remember_nothing(tmp_path):
    _, gated = gated_model(orthogonal=True)
    assert not any(gating.training for gating in gated.gatings)
    gated.save(tmp_path)
    other = fresh()
    again = load_gated(other, tmp_path)
    outputs(other, again)
    assert not any(gating.seen.any() for gating in again.gatings)


def test_loaded_for_use_nothing_trains(tmp_path):
    _, gated = gated_model()
    gated.save(tmp_path)
    again = load_gated(fresh(), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in again.model.parameters())


def test_weights_take_the_type_that_adapters_of_the_model_have(tmp_path):
    _, gated = gated_model(double=True)
    gated.save(tmp_path)
    again = load_gated(fresh(double=False), tmp_path)
    for (name, mine), (_, theirs) in zip(gated.named_parameters(), again.named_parameters(), strict=True):
        assert theirs.dtype == torch.float32
        assert torch.equal(mine.float(), theirs), name


# writing


def test_a_new_save_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    model, gated = gated_model()
    save_gated(gated, tmp_path)
    gated.remove_expert("general")
    save_gated(gated, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gated.json", "gated.safetensors"}
    other = fresh()
    assert torch.equal(outputs(other, load_gated(other, tmp_path)), outputs(model, gated))


@pytest.mark.parametrize("broken", ["versions", "_sync"])
def test_a_save_that_fails_leaves_the_old_one(tmp_path, monkeypatch, broken):
    model, gated = gated_model()
    save_gated(gated, tmp_path)
    before = outputs(model, gated)
    gated.remove_expert("general")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(files, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        save_gated(gated, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gated.json", "gated.safetensors"}
    other = fresh()
    assert torch.equal(outputs(other, load_gated(other, tmp_path)), before)


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    _, gated = gated_model()
    (tmp_path / "saved").write_text("")
    with pytest.raises(GatedError, match="saved is a file"):
        gated.save(tmp_path / "saved")


# faults


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated")
    gated_model()[1].save(folder)
    return folder


def refused(model, folder, match):
    """Loading fails with the sentence, and the model computes and trains as before."""
    first = next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    modules, hooks = set(dict(model.named_modules())), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(GatedError, match=match):
        load_gated(model, folder)
    assert set(dict(model.named_modules())) == modules
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not first.requires_grad
    assert not hasattr(model, "gated_adapters")


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


A = "model.layers.1.self_attn.q_proj.gated.experts.code.A.weight"
FAULTS = {
    "no folder": (lambda f: shutil.rmtree(f), "there is no folder .*copy: give"),
    "no gated.json": (lambda f: (f / "gated.json").unlink(), "copy is not a folder of gated adapters"),
    "a LoRA of PEFT": (
        lambda f: (f / "gated.json").rename(f / "adapter_config.json"),
        "is a LoRA of PEFT: read it with `import_expert`",
    ),
    "json cut off": (lambda f: cut(f / "gated.json"), "gated.json is damaged, it can't be read as JSON"),
    "not text": (lambda f: (f / "gated.json").write_bytes(b"\xff\xfe\x00"), "gated.json is damaged, it can't be read"),
    "another json": (lambda f: (f / "gated.json").write_text("[1]"), "gated.json .* names no schema"),
    "another schema": (
        lambda f: retell(f, lambda told: told.update(schema=2, versions={"fastsft": "9.1"})),
        r"gated.json has schema 2, this fastsft reads schema 1.* wrote it \(9.1\)",
    ),
    "a key lacks": (lambda f: retell(f, lambda told: told.pop("sha256")), "gated.json lacks 'sha256'"),
    "a key more": (lambda f: retell(f, lambda told: told.update(zeal=1)), "gated.json says 'zeal', which .* not know"),
    "a setting more": (
        lambda f: retell(f, lambda told: told["config"].update(zeal=1)),
        "gated.json has the settings 'zeal', which this fastsft does not know",
    ),
    "experts twice": (
        lambda f: retell(f, lambda told: told["config"].update(experts=["a"])),
        "gated.json has the settings 'experts'",
    ),
    "settings of a list": (lambda f: retell(f, lambda told: told.update(config=[])), "'config' must hold settings"),
    "a setting wrong": (
        lambda f: retell(f, lambda told: told["config"].update(gate="door")),
        "gated.json has settings that can't be: `gate` must be one of",
    ),
    "a setting of another type": (
        lambda f: retell(f, lambda told: told["config"].update(rank="two")),
        "gated.json has settings that can't be",
    ),
    "names that are none": (lambda f: retell(f, lambda told: told.update(tasks=[1, 2])), "'tasks' must be a list"),
    "a frozen stranger": (
        lambda f: retell(f, lambda told: told.update(frozen=["latin"])),
        r"gated.json is damaged: .*\['latin'\]",
    ),
    "layers without widths": (
        lambda f: retell(f, lambda told: told["layers"].update({"model.layers.0.mlp.up_proj": [32]})),
        "gated.json is damaged: 'layers' must give two widths",
    ),
    "no weights": (lambda f: (f / "gated.safetensors").unlink(), "gated.safetensors is missing"),
    "weights cut off": (lambda f: cut(f / "gated.safetensors", 0.9), "gated.safetensors is not the file .*sha256"),
    "weights exchanged": (
        lambda f: save_file({"x": torch.ones(1)}, f / "gated.safetensors"),
        "gated.safetensors is not the file .*sha256",
    ),
    "weights of no kind": (
        lambda f: (
            (f / "gated.safetensors").write_text("no tensors"),
            retell(f, lambda told: told.update(sha256=file_digest(f / "gated.safetensors"))),
        ),
        "gated.safetensors is no whole safetensors file",
    ),
    "an expert lacks": (
        lambda f: reseal(f, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".code." in name]),
        r"gated.safetensors lacks 'model.layers.0.self_attn.q_proj.gated.experts.code.A.weight' and \d+ more",
    ),
    "an expert told of": (
        lambda f: retell(
            f, lambda told: told.update(experts=[*told["experts"], "latin"], tasks=[*told["tasks"], "latin"])
        ),
        r"gated.safetensors lacks '.*experts.latin.* more",
    ),
    "an expert not told of": (
        lambda f: retell(f, lambda told: told["experts"].remove("code")),
        r"gated.safetensors holds '.*experts.code.*' and \d+ more, of which gated.json says nothing",
    ),
    "a wrong shape": (
        lambda f: reseal(f, lambda tensors: tensors.update({A: torch.zeros(5, 32)})),
        rf"gated.safetensors has {A} with the shape \[5, 32\], and by gated.json it must be \[2, 32\]",
    ),
    "directions of another width": (
        lambda f: reseal(f, lambda tensors: tensors.update({"model.layers.0.gating.protected": torch.zeros(7, 2)})),
        r"gating.protected with the shape \[7, 2\], and by gated.json it must be \[32, 2\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_with_a_sentence(saved, tmp_path, fault):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    damage, match = FAULTS[fault]
    damage(folder)
    refused(fresh(), folder, match)


def llama(**changes):
    settings = make_model().config.to_dict() | changes
    return LlamaForCausalLM(LlamaConfig(**settings))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"num_hidden_layers": 1},
            "gated.json is of another model: .* no linear layer 'model.layers.1.self_attn.q_proj'",
        ),
        ({"num_hidden_layers": 3}, "they differ by the layers 'model.layers.2.mlp.down_proj' and 6 more"),
        ({"intermediate_size": 64}, "mlp.gate_proj had 32 inputs and 48 outputs, and here it has 32 and 64"),
    ],
)
def test_another_model_is_refused(saved, changes, match):
    refused(llama(**changes), saved, match)


def test_a_model_that_has_adapters_keeps_its_own(saved):
    model, gated = gated_model()
    before = outputs(model, gated)
    with pytest.raises(GatedError, match="the model has gated adapters"):
        load_gated(model, saved)
    assert model.gated_adapters is gated
    assert all(p.requires_grad for _, p in gated.named_parameters())
    assert torch.equal(outputs(model, gated), before)


def test_a_layer_that_is_no_linear_one_here_is_refused(tmp_path):
    attach_gated(torch.nn.Sequential(torch.nn.Linear(3, 3)), GatedConfig(experts=["a"])).save(tmp_path)
    refused(torch.nn.Sequential(torch.nn.LayerNorm(3)), tmp_path, "this one has no linear layer '0'")
