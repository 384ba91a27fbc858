"""attach_gated: the model with gated adapters is the loop over experts, in every way that a model is run."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fastsft.adapters import GatedConfig, GatedError, attach_gated, block
from fastsft.data import told_labels
from fastsft.ops import gated_adapter
from tests.adapters._models import EXPERTS, KINDS, Loops, gated_model, make_batch, randomise
from tests.train._support import make_model

# float64, two layers of width 32: a few hundred roundings
CLOSE = {"rtol": 0, "atol": 1e-12}


def grads_of(gated):
    return {name: p.grad.clone() for name, p in gated.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sharing", ["block", "linear"])
@pytest.mark.parametrize(("gate", "granularity"), KINDS)
def test_equals_the_loop_over_experts(gate, granularity, sharing):
    model, gated = gated_model(gate, granularity, sharing=sharing)
    ids, labels = make_batch(prompt=4)
    ours = model(ids, labels=labels)
    ours.loss.backward()
    found = grads_of(gated)
    model.zero_grad()
    truth = Loops(gated, 4)(ids, labels)
    truth.loss.backward()
    torch.testing.assert_close(ours.logits, truth.logits, **CLOSE)
    expected = grads_of(gated)
    assert set(found) >= set(expected)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected.get(name, torch.zeros_like(grad)), **CLOSE)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_outputs_begin_as_the_base_models(gate):
    model = make_model().eval()
    ids, labels = make_batch()
    before, names = model(ids).logits, set(model.state_dict())
    gated = attach_gated(model, GatedConfig(experts=EXPERTS, gate=gate, memory_rank=2))
    assert torch.equal(model(ids, labels=labels).logits, before)
    assert names < set(model.state_dict())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n, _ in gated.named_parameters()}


def test_layers_that_read_the_same_tensor_read_it_once(monkeypatch):
    calls = []
    own = gated_adapter.__globals__["shrink"]
    monkeypatch.setattr(block, "shrink", lambda *args, **named: calls.append(1) or own(*args, **named))
    model, _ = gated_model()
    ids, labels = make_batch()
    model(ids, labels=labels)
    # q k v, o, gate up, down, in each of two layers
    assert len(calls) == 8


@pytest.mark.parametrize("sharing", ["block", "linear"])
@pytest.mark.parametrize(("gate", "granularity"), KINDS)
def test_generation_with_a_cache_is_teacher_forcing(gate, granularity, sharing):
    model, _ = gated_model(gate, granularity, sharing=sharing)
    ids, labels = make_batch(length=9, prompt=4)
    whole = model(ids, labels=labels).logits
    out = model(ids[:, :4], use_cache=True)
    logits = [out.logits]
    for at in range(4, 9):
        logits.append(model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, **CLOSE)


@pytest.mark.parametrize(("gate", "granularity"), [("sigmoid", "sequence"), ("topk", "token"), ("one_hot", "task")])
def test_generate_gives_what_greedy_teacher_forcing_gives(gate, granularity):
    model, _ = gated_model(gate, granularity)
    model.config.use_cache, model.generation_config.eos_token_id = True, None
    ids, _ = make_batch(length=5)
    made = model.generate(ids, max_new_tokens=5, do_sample=False)
    labels = made.clone()
    labels[:, :5] = -100
    wanted = model(made, labels=labels).logits.argmax(-1)
    assert torch.equal(made[:, 5:], wanted[:, 4:-1])
    # padded on the left, and by beams
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    left = model.generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=5, do_sample=False)
    assert torch.equal(left[:, 3:], made)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, num_beams=2).shape == (2, 8)


@pytest.mark.parametrize(("gate", "granularity"), [("sigmoid", "sequence"), ("topk", "sequence"), ("softmax", "token")])
def test_packed_documents_are_as_rows_of_their_own(gate, granularity):
    model, _ = gated_model(gate, granularity)
    ids, labels = make_batch(rows=1, length=14, prompt=3)
    labels[0, 6:9] = -100  # the second document's prompt
    positions = torch.tensor([[*range(6), *range(8)]])
    packed = model(ids, labels=labels, position_ids=positions).logits[0]
    alone = [model(ids[:, s], labels=labels[:, s]).logits[0] for s in (slice(0, 6), slice(6, 14))]
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)


def test_answers_do_not_change_the_gates_of_a_sequence():
    model, _ = gated_model("sigmoid", "sequence")
    ids, labels = make_batch(prompt=4)
    other = ids.clone()
    other[:, 7:] = 3
    before, after = (model(each, labels=labels).logits[:, :7] for each in (ids, other))
    torch.testing.assert_close(before, after, **CLOSE)
    assert not torch.allclose(model(ids).logits[:, :7], model(other).logits[:, :7])  # all of it a prompt


@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_changes_nothing(granularity):
    model, gated = gated_model(granularity=granularity)
    model.train()
    ids, labels = make_batch()
    other, other_labels = make_batch(rows=3, length=7, prompt=2, seed=1)

    def grads():
        model.zero_grad()
        loss = model(ids, labels=labels).loss
        # another pass before the backward one: what is run again must find its own prompts
        (loss + model(other, labels=other_labels).loss).backward()
        return grads_of(gated)

    plain = grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(4):  # memory is used again, and with it the addresses of earlier inputs
        again = grads()
        assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_torch_compile_gives_the_same():
    torch._dynamo.reset()
    model, gated = gated_model("sigmoid", "sequence")
    model.model.layers = model.model.layers[:1]
    model.train()
    ids, labels = make_batch()
    model(ids, labels=labels).loss.backward()
    plain = grads_of(gated)
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(ids, labels=labels).loss.backward()
    compiled = grads_of(gated)
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], **CLOSE)


def test_autocast_stays_near_float32():
    model, _ = gated_model(double=False)
    ids, labels = make_batch()
    plain = model(ids, labels=labels).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, labels=labels).logits.float()
        loops = Loops(model.gated_adapters, 4)(ids, labels).logits.float()
    # twice what the loop over experts loses to bfloat16
    assert (rounded - plain).abs().max() <= 2 * (loops - plain).abs().max()


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_who_watches_a_base_layer_keeps_what_was_seen(kind):
    """Outputs are added to in place, and gradients of inputs, only where nobody else holds them."""
    base = make_model()
    watched, seen = base.model.layers[1].self_attn.q_proj, []
    if kind == "forward":
        watched.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    model, gated = gated_model(model=base)
    if kind == "backward":
        watched.register_full_backward_hook(lambda module, grads, _: seen.append((grads[0], grads[0].clone())))
    model.train()
    ids, labels = make_batch()
    model(ids, labels=labels).loss.backward()
    found = grads_of(gated)
    assert seen
    assert all(torch.equal(held, then) for held, then in seen)
    model.zero_grad()
    Loops(gated, 4)(ids, labels).loss.backward()
    for name, grad in grads_of(gated).items():
        torch.testing.assert_close(found[name], grad, **CLOSE)


def test_told_labels_are_as_labels():
    model, _ = gated_model()
    ids, labels = make_batch()
    with told_labels(labels):
        told = model(ids).logits
    assert torch.equal(told, model(ids, labels=labels).logits)


def test_a_copy_has_adapters_of_its_own():
    model, gated = gated_model()
    ids, labels = make_batch()
    before, other = model(ids, labels=labels).logits, copy.deepcopy(model)
    assert torch.equal(other(ids, labels=labels).logits, before)
    randomise(other.gated_adapters, seed=6)
    assert other.gated_adapters is not gated
    assert torch.equal(model(ids, labels=labels).logits, before)
    assert not torch.equal(other(ids, labels=labels).logits, before)


class Eighths(nn.Module):
    """A linear layer that keeps its weight as int8, as quantised ones do."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = float(base.weight.detach().abs().max() / 127)
        self.register_buffer("stored", (base.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.stored.to(x) * self.scale).T


def test_a_quantised_base_is_called_and_added_to():
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Eighths(layer.self_attn.q_proj)
    ids, labels = make_batch()
    before = model.eval()(ids).logits
    model, gated = gated_model("softmax", "sequence", model=model, double=False)
    ours = model(ids, labels=labels)
    # float32
    torch.testing.assert_close(ours.logits, Loops(gated, 4)(ids, labels).logits, rtol=0, atol=2e-5)
    assert not torch.allclose(ours.logits, before)
    ours.loss.backward()
    assert all(p.grad is not None for _, p in gated.named_parameters())
    with pytest.raises(GatedError, match="no plain linear layer, and its weights can't be added to"):
        gated.merge({"maths": 1.0})


def test_conv1d_layers_of_gpt2_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    model, gated = gated_model("sigmoid", "sequence", model=model)
    ids, labels = make_batch()
    assert any("c_attn" in name for name in gated.adapters)
    torch.testing.assert_close(model(ids, labels=labels).logits, Loops(gated, 4)(ids, labels).logits, **CLOSE)


# tasks and experts


def test_tasks_one_a_sequence_or_for_all():
    model, gated = gated_model("one_hot", "task")
    ids, labels = make_batch()
    alone = []
    for row, task in enumerate(("maths", "general")):
        gated.set_task(task)
        alone.append(model(ids[row : row + 1], labels=labels[row : row + 1]).logits)
    gated.set_task(["maths", "general"])
    torch.testing.assert_close(model(ids, labels=labels).logits, torch.cat(alone), **CLOSE)
    gated.set_task(None)
    numbers = torch.tensor([gated.tasks.index("maths"), gated.tasks.index("general")])
    torch.testing.assert_close(model(ids, labels=labels, task_ids=numbers).logits, torch.cat(alone), **CLOSE)
    with pytest.raises(GatedError, match="gates per task need to know it"):
        model(ids)
    with pytest.raises(GatedError, match=r"unknown task .'poetry'.: the tasks are maths, code, general"):
        gated.set_task("poetry")
    gated.set_task(["maths", "code", "general"])
    with pytest.raises(GatedError, match="3 tasks were set for 2 sequences"):
        model(ids)


def test_a_new_expert_changes_no_output_and_trains():
    model, gated = gated_model("sigmoid", "sequence")
    ids, labels = make_batch()
    before = model(ids, labels=labels).logits
    gated.add_expert("law", gate_bias=-2.0)
    torch.testing.assert_close(model(ids, labels=labels).logits, before, **CLOSE)
    model(ids, labels=labels).loss.backward()
    grads = {name: grad for name, grad in grads_of(gated).items() if ".law." in name}
    assert any(name.endswith("B.weight") and grad.any() for name, grad in grads.items())
    with pytest.raises(GatedError, match="there is, or was, an expert 'law'"):
        gated.add_expert("law")


@pytest.mark.parametrize("granularity", ["sequence", "task"])
def test_frozen_experts_stay_and_the_others_train_as_before(granularity):
    model, gated = gated_model("softmax", granularity)
    ids, labels = make_batch()
    model(ids, labels=labels).loss.backward()
    whole = grads_of(gated)
    model.zero_grad()
    gated.freeze_expert("maths")
    assert gated.is_frozen("maths")
    assert not gated.is_frozen("code")
    model(ids, labels=labels).loss.backward()
    rest = grads_of(gated)
    assert not any(".maths." in name for name in rest)
    assert {name for name in whole if ".maths." not in name} == set(rest)
    for name, grad in rest.items():
        torch.testing.assert_close(grad, whole[name], **CLOSE)
    gated.freeze_expert("maths", frozen=False)
    assert not gated.is_frozen("maths")


def test_removing_an_expert_leaves_its_name_as_a_task():
    model, gated = gated_model("one_hot", "task")
    ids, labels = make_batch()
    gated.set_task("general")
    before = model(ids, labels=labels).logits
    gated.remove_expert("maths")
    torch.testing.assert_close(model(ids, labels=labels).logits, before, **CLOSE)
    gated.set_task("maths")
    memory_alone = model(ids, labels=labels).logits
    gated.remove_expert("code")
    gated.remove_expert("general")
    torch.testing.assert_close(model(ids, labels=labels).logits, memory_alone, **CLOSE)


def test_the_memory_has_its_own_learning_rate():
    _, gated = gated_model(memory_lr=0.25)
    own, memory = gated.parameter_groups(1e-2, weight_decay=0.1)
    assert (own["lr"], memory["lr"], memory["weight_decay"]) == (1e-2, 2.5e-3, 0.1)
    assert len(memory["params"]) == 2 * len(gated.adapters)
    assert len(own["params"]) + len(memory["params"]) == len(list(gated.named_parameters()))


# leaving


def test_merged_weights_are_the_adapters_at_those_gates():
    model, gated = gated_model("softmax", "task")
    ids, labels = make_batch()
    gated.set_task("general")
    before = model(ids, labels=labels).logits
    merged = gated.merge(task="general")
    assert merged is model
    torch.testing.assert_close(model(ids).logits, before, **CLOSE)
    assert not any("gated" in name or "gating" in name for name in model.state_dict())
    with pytest.raises(GatedError, match="gates per sequence depend on the input"):
        gated_model()[1].merge()


def test_detaching_gives_the_base_back():
    base, (ids, _) = make_model().double().eval(), make_batch()
    before, names = base(ids).logits, list(base.state_dict())
    model, gated = gated_model(model=base)
    assert gated.detach() is model
    assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == names
    attach_gated(model, GatedConfig(experts=EXPERTS))


def test_nothing_is_held_after_a_pass():
    model, gated = gated_model()
    ids, labels = make_batch()
    with torch.no_grad():
        model(ids, labels=labels)
    assert all(each.gates is None for each in gated.blocks)
    assert all(group.x is None and not group.waiting for each in gated.blocks for group in each.groups)


# bad input


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"experts": []}, "name at least one of `experts`"),
        ({"experts": "maths"}, "name at least one of `experts`, as a list"),
        ({"experts": ["a", "a"]}, "distinct names"),
        ({"experts": ["two words"]}, "letters, digits, - and _"),
        ({"experts": ["a"], "gate": "hard"}, "`gate` must be one of sigmoid, softmax, topk, one_hot: got 'hard'"),
        ({"experts": ["a"], "granularity": "batch"}, "`granularity` must be one of"),
        ({"experts": ["a"], "gate": "one_hot"}, "`granularity` must be 'task': got 'sequence'"),
        ({"experts": ["a"], "rank": 0}, "`rank` must be at least 1"),
        ({"experts": ["a"], "rank": 2.5}, "`rank` must be a whole number: got 2.5"),
        ({"experts": ["a"], "alpha": 0}, "`alpha` must be positive: got 0"),
        ({"experts": ["a"], "memory_lr": 0.0}, "`memory_lr` must be positive"),
        ({"experts": ["a"], "orthogonal": True, "granularity": "task"}, "gates per task have none"),
        ({"experts": ["a"], "orthogonal_energy": 1.5}, "at most 1: got 1.5"),
    ],
)
def test_settings_that_can_not_be(settings, sentence):
    with pytest.raises(GatedError, match=sentence):
        GatedConfig(**settings)


def test_experts_may_be_called_anything_torch_uses_itself():
    model, gated = gated_model(experts=["train", "weight", "keys"])
    ids, labels = make_batch()
    model(ids, labels=labels).loss.backward()
    assert any(".experts.train.A.weight" in name for name in grads_of(gated))


def test_models_that_can_not_be_adapted():
    with pytest.raises(GatedError, match="'c_attn' names no linear layer of the model: its layers are down_proj, gate"):
        attach_gated(make_model(), GatedConfig(experts=["a"], targets="c_attn"))
    model, _ = gated_model()
    with pytest.raises(GatedError, match="take them off first"):
        attach_gated(model, GatedConfig(experts=["a"]))


def test_training_without_labels_is_refused_where_prompts_matter():
    model, _ = gated_model()
    model.train()
    ids, labels = make_batch()
    with pytest.raises(GatedError, match="got no labels that say where prompts end"):
        model(ids)
    with told_labels(labels):
        model(ids)
    with torch.no_grad():
        model(ids)


def test_a_cache_that_others_filled_is_refused():
    model, _ = gated_model()
    ids, _ = make_batch()
    cache = make_model().double().eval()(ids, use_cache=True).past_key_values
    with pytest.raises(GatedError, match="this cache was filled without these adapters' gates"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_an_unknown_expert_is_refused():
    _, gated = gated_model()
    with pytest.raises(GatedError, match="there is no expert 'poetry': the experts are maths, code, general"):
        gated.freeze_expert("poetry")
