"""The memory: experts folded into it, the ranks that matter to a task, and training those alone."""

import math

import pytest
import torch
from torch import nn

from fastsft.adapters import GatedConfig, GatedError, attach_gated, memory_importance
from tests.adapters._models import KINDS, gated_model, make_batch
from tests.train._support import VOCABULARY

# M memory rank, r an expert's rank

MEMORY, RANK = 5, 2
# float64; sums and decompositions of at most 64 terms of size 1 to 10
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make_gated(gate="one_hot", granularity="task", **settings):
    """Adapters away from zero on the tiny Llama, in float64; its task is "code"."""
    settings = {"experts": ["maths", "code"], "rank": RANK, "alpha": 3.0, "memory_rank": MEMORY, **settings}
    return gated_model(gate, granularity, **settings)[1]


def make_plain(inputs=3, outputs=2, *, fill=True, **settings):
    """Adapters on one linear layer, named "0"."""
    model = nn.Sequential(nn.Linear(inputs, outputs)).double()
    settings = {"experts": ["code"], "rank": RANK, "memory_rank": MEMORY, **settings}
    gated = attach_gated(model, GatedConfig(gate="one_hot", granularity="task", **settings))
    gated.set_task("code")
    if fill:
        for parameter in gated.adapters["0"].parameters():
            parameter.data.normal_()
    return gated


def run(gated, seed=0):
    ids, labels = make_batch(seed=seed)
    with torch.no_grad():
        return gated.model(ids, labels=labels).logits


def train(gated, optimizer, *, steps=3, seed=0):
    ids, labels = make_batch(seed=seed)
    for _ in range(steps):
        optimizer.zero_grad()
        gated.model(ids, labels=labels).loss.backward()
        optimizer.step()


def product(pair, weight=1.0):
    return weight * (pair.B.weight.detach() @ pair.A.weight.detach())


def bits(gated):
    return {name: p.detach().clone() for name, p in gated.named_parameters()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def preferring(gated, ranks):
    """An importance in which `ranks` come first, the first of them foremost."""
    values = torch.zeros(MEMORY)
    values[list(ranks)] = torch.arange(len(ranks), 0.0, -1.0)
    return dict.fromkeys(gated.adapters, values)


# folding an expert in


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_with_ranks_enough_the_memory_says_all_that_it_and_the_expert_said(weight):
    gated = make_gated()
    for adapter in gated.adapters.values():
        adapter.memory.B.weight.data[:, MEMORY - RANK :] = 0
        adapter.experts["code"].B.weight.data *= weight
    before = run(gated)
    for adapter in gated.adapters.values():
        adapter.experts["code"].B.weight.data /= weight
    result = gated.consolidate("code", weight=weight)
    assert gated.experts == ["maths"]
    assert "code" in gated.tasks
    torch.testing.assert_close(run(gated), before, **CLOSE)
    assert result.total < 1e-20
    assert set(result.kept.values()) == {MEMORY}


def test_without_removal_the_expert_stays_as_it_was():
    gated = make_gated()
    before = bits(gated)
    gated.consolidate("code", remove=False)
    after = bits(gated)
    assert gated.experts == ["maths", "code"]
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        n for n in before if "memory" in n
    }


def test_what_is_cut_off_is_the_tail_of_the_dense_svd():
    gated = make_gated()
    sums = {
        name: product(adapter.memory) + product(adapter.experts["code"], 0.4)
        for name, adapter in gated.adapters.items()
    }
    parameters = {id(p) for adapter in gated.adapters.values() for p in adapter.memory.parameters()}
    result = gated.consolidate("code", weight=0.4)
    lost = energy = 0.0
    for name, adapter in gated.adapters.items():
        u, values, vt = torch.linalg.svd(sums[name], full_matrices=False)
        best = (u[:, :MEMORY] * values[:MEMORY]) @ vt[:MEMORY]
        torch.testing.assert_close(product(adapter.memory), best, **CLOSE)
        tail = values[MEMORY:].square().sum() / values.square().sum()
        assert tail > 1e-3  # there is something to cut off
        assert result.discarded[name] == pytest.approx(float(tail), rel=1e-9)
        assert result.energy[name] == pytest.approx(float(values.square().sum()), rel=1e-9)
        lost, energy = lost + float(values[MEMORY:].square().sum()), energy + float(values.square().sum())
        # split evenly: both sides have the singular values as squared norms
        a, b = adapter.memory.A.weight, adapter.memory.B.weight
        torch.testing.assert_close(a @ a.T, values[:MEMORY].diag(), **CLOSE)
        torch.testing.assert_close(b.T @ b, values[:MEMORY].diag(), **CLOSE)
    assert result.expert == "code"
    assert result.total == pytest.approx(lost / energy, rel=1e-9)
    assert parameters == {id(p) for adapter in gated.adapters.values() for p in adapter.memory.parameters()}


@pytest.mark.parametrize(
    ("inputs", "outputs", "memory", "rank"), [(3, 2, 5, 2), (1, 7, 1, 3), (6, 1, 2, 9), (4, 4, 4, 1)]
)
def test_ranks_and_widths_of_any_size(inputs, outputs, memory, rank):
    gated = make_plain(inputs, outputs, rank=rank, memory_rank=memory)
    adapter = gated.adapters["0"]
    whole = product(adapter.memory) + product(adapter.experts["code"])
    u, values, vt = torch.linalg.svd(whole, full_matrices=False)
    result = gated.consolidate("code")
    torch.testing.assert_close(product(adapter.memory), (u[:, :memory] * values[:memory]) @ vt[:memory], **CLOSE)
    assert result.kept == {"0": min(inputs, outputs, memory)}
    assert adapter.memory.A.weight.shape == (memory, inputs)


def test_ranks_that_are_left_over_can_learn():
    """A rank with both sides at zero never would: each side's gradient is a product with the other."""
    gated = make_plain(8, 6)
    adapter = gated.adapters["0"]
    adapter.memory.B.weight.data.zero_()  # as the memory begins
    result = gated.consolidate("code")
    assert result.kept == {"0": RANK}
    assert not adapter.memory.B.weight[:, RANK:].any()
    gated.model(torch.randn(20, 8).double()).square().sum().backward()
    assert (adapter.memory.B.weight.grad.norm(dim=0) > 1e-3).all()


def test_an_expert_that_said_nothing_leaves_an_empty_memory_as_it_was():
    gated = make_plain(fill=False)
    before = gated.adapters["0"].memory.A.weight.detach().clone()
    result = gated.consolidate("code")
    assert (result.total, result.discarded, result.kept) == (0.0, {"0": 0.0}, {"0": 0})
    assert torch.equal(gated.adapters["0"].memory.A.weight, before)


@pytest.mark.parametrize("sharing", ["block", "linear"])
@pytest.mark.parametrize(("gate", "granularity"), KINDS)
def test_when_the_last_expert_has_gone_the_memory_speaks_alone(gate, granularity, sharing):
    gated = make_gated(gate, granularity, experts=["code"], sharing=sharing)
    gated.consolidate("code")
    expected = run(gated)
    gated.merge({})
    torch.testing.assert_close(gated.model(make_batch()[0]).logits, expected, **CLOSE)


def test_a_memory_alone_trains():
    gated = make_gated("sigmoid", "sequence", experts=["code"])
    gated.consolidate("code")
    before = bits(gated)
    gated.model.train()
    train(gated, torch.optim.SGD(gated.parameter_groups(1.0)))
    assert all(not torch.equal(p, before[name]) for name, p in gated.named_parameters())


def test_nothing_is_changed_where_one_layer_can_not_be_folded():
    gated = make_gated()
    last = list(gated.adapters.values())[-1]
    last.experts["code"].B.weight.data[0, 0] = math.inf
    before = bits(gated)
    with pytest.raises(GatedError, match=r"layers\.1.* expert 'code' holds numbers that aren't finite"):
        gated.consolidate("code")
    assert gated.experts == ["maths", "code"]
    assert_same_bits(bits(gated), before)


def test_what_can_not_be_folded_is_refused():
    gated = make_gated()
    with pytest.raises(GatedError, match="there is no expert 'history'"):
        gated.consolidate("history")
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(GatedError, match=r"`weight` must be the gate at which 'code' spoke, over 0: got"):
            gated.consolidate("code", weight=weight)
    gated.select_memory(preferring(gated, [0]), 0.2)
    with pytest.raises(GatedError, match=r"release_memory\(\)"):
        gated.consolidate("code")
    gated.release_memory()
    gated.consolidate("code")
    with pytest.raises(GatedError, match="no memory"):
        make_gated(memory_rank=0).consolidate("code")


# which ranks matter


def padded(seed=3):
    """Two rows, of which the second ends in padding and the first begins with it."""
    ids, labels = make_batch(seed=seed)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, -3:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def whole(seed=4):
    ids, labels = make_batch(seed=seed)
    return {"input_ids": ids, "labels": labels}


def energies_by_loops(gated, batches):
    """What rank j adds to a layer's output, squared, token by token and output by output."""
    inputs = {name: [] for name in gated.adapters}
    handles = [
        gated.model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: inputs[name].append(args[0])
        )
        for name in gated.adapters
    ]
    for batch in batches:
        gated.model(**batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name, adapter in gated.adapters.items():
        a, b = adapter.memory.A.weight, adapter.memory.B.weight
        energies = []
        for batch, x in zip(batches, inputs[name]):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            for row, place in mask.nonzero().tolist():
                added = [gated.config.scale * (a[j] @ x[row, place]) * b[:, j] for j in range(len(a))]
                energies.append(torch.stack([each.square().sum() for each in added]))
        found[name] = torch.stack(energies).mean(0).detach()
    return found


def assert_close_by_layer(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


@pytest.mark.parametrize(("gate", "granularity"), [("one_hot", "task"), ("sigmoid", "sequence"), ("topk", "token")])
def test_importance_is_the_energy_of_what_a_rank_adds(gate, granularity):
    gated = make_gated(gate, granularity)
    batches = [padded(), whole()]
    assert_close_by_layer(memory_importance(gated, batches), energies_by_loops(gated, batches))


def test_with_a_background_it_is_the_ratio_of_shares():
    gated = make_gated()
    task, other = energies_by_loops(gated, [whole(1)]), energies_by_loops(gated, [padded(2), whole(5)])
    expected = {name: (task[name] / task[name].sum()) / (other[name] / other[name].sum()) for name in task}
    assert_close_by_layer(memory_importance(gated, [whole(1)], background=[padded(2), whole(5)]), expected)


def test_a_rank_that_neither_uses_comes_last():
    gated = make_gated()
    for adapter in gated.adapters.values():
        adapter.memory.A.weight.data[3] = 0
    for values in memory_importance(gated, [whole(1)], background=[whole(2)]).values():
        assert values.isfinite().all()
        assert values.argmin() == 3


def test_a_memory_that_has_not_learnt_is_ranked_by_its_inputs_and_says_so():
    gated = make_gated()
    for adapter in gated.adapters.values():
        adapter.memory.B.weight.data.zero_()
    with pytest.warns(RuntimeWarning, match="14 of 14 layers"):
        found = memory_importance(gated, [whole()])
    for adapter in gated.adapters.values():
        adapter.memory.B.weight.data[0] = 1.0  # norms of 1, which change what layers behind see
    first = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(found[first], energies_by_loops(gated, [whole()])[first], **CLOSE)


def test_the_rank_planted_for_a_task_is_found():
    """Rank 0 always speaks, and loudest; rank 2 speaks of the task's one word."""
    gated = make_gated()
    name = "model.layers.0.self_attn.q_proj"
    memory = gated.adapters[name].memory
    word = gated.model.model.embed_tokens.weight[5]
    with torch.no_grad():
        memory.B.weight.copy_(torch.ones_like(memory.B.weight))
        memory.A.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        memory.A.weight[0] = 10 * torch.randn(32, generator=torch.Generator().manual_seed(2))
        memory.A.weight[2] = word / word.norm()
    task = [{"input_ids": torch.full((1, 6), 5)}]
    other = [{"input_ids": torch.arange(6, VOCABULARY)[None]}]
    assert memory_importance(gated, task)[name].argmax() == 0
    assert memory_importance(gated, task, background=other)[name].argmax() == 2


def test_modes_and_hooks_are_put_back_even_after_an_error():
    gated = make_gated()
    gated.model.train()
    gated.model.model.layers[1].eval()
    modes = {name: module.training for name, module in gated.model.named_modules()}
    seen = []
    handle = gated.model.register_forward_hook(
        lambda module, args, output: seen.append((module.training, torch.is_grad_enabled()))
    )
    memory_importance(gated, [whole()])
    handle.remove()
    assert seen == [(False, False)]
    with pytest.raises(IndexError):
        memory_importance(gated, [{"input_ids": torch.full((1, 2), VOCABULARY)}])
    assert {name: module.training for name, module in gated.model.named_modules()} == modes
    assert not any(pair.A.is_followed for adapter in gated.adapters.values() for pair in adapter.pairs)


def test_importance_keeps_the_order_of_ranks_while_some_are_held():
    gated = make_gated()
    before = memory_importance(gated, [padded()])
    gated.select_memory(preferring(gated, [1, 4]), 0.4)
    assert_close_by_layer(memory_importance(gated, [padded()]), before)


def test_batches_that_say_nothing_are_refused():
    gated = make_gated()
    nothing = {**whole(), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}
    for batches in ([], [nothing]):
        with pytest.raises(GatedError, match="`batches` must hold a token that counts"):
            memory_importance(gated, batches)
    with pytest.raises(GatedError, match="`background` must hold a token that counts"):
        memory_importance(gated, [whole()], background=[])
    with pytest.raises(GatedError, match="`batches` must be a list of batches, each a dict"):
        memory_importance(gated, whole())
    with pytest.raises(GatedError, match="no memory"):
        memory_importance(make_gated(memory_rank=0), [whole()])


# training some ranks alone


@pytest.mark.parametrize(
    ("optimizer", "settings"), [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})], ids=["adamw", "sgd"]
)
def test_held_ranks_keep_their_bits_under_momentum_and_weight_decay(optimizer, settings):
    gated = make_gated()
    train(gated, optimizer(gated.parameter_groups(0.05), weight_decay=0.1, **settings), steps=2)
    before, wholes = run(gated), {name: (a.memory.A.weight, a.memory.B.weight) for name, a in gated.adapters.items()}
    gated.select_memory(preferring(gated, [3, 1]), 0.4)
    # the same sum in another order
    torch.testing.assert_close(run(gated), before, **CLOSE)
    # an optimizer that is given everything, too
    groups = [
        *gated.parameter_groups(0.05),
        {"params": [p for a in gated.adapters.values() for p in a.held.parameters()]},
    ]
    train(gated, optimizer(groups, weight_decay=0.1, **settings))
    held, chosen = [0, 2, 4], [1, 3]
    gated.release_memory()
    for name, adapter in gated.adapters.items():
        (a, b), memory = wholes[name], adapter.memory
        assert torch.equal(memory.A.weight[held], a[held])
        assert torch.equal(memory.B.weight[:, held], b[:, held])
        assert (memory.A.weight[chosen] != a[chosen]).all()
        assert (memory.B.weight[:, chosen] != b[:, chosen]).all()


def test_releasing_gives_the_memory_back_bit_by_bit():
    gated = make_gated()
    before = bits(gated)
    gated.select_memory(preferring(gated, [3, 1]), 0.4)
    assert all(len(adapter.held.A.weight) == 3 for adapter in gated.adapters.values())
    gated.release_memory()
    assert all(adapter.held is None for adapter in gated.adapters.values())
    assert_same_bits(bits(gated), before)
    assert all(p.requires_grad for _, p in gated.named_parameters())
    gated.release_memory()  # nothing is held: nothing happens
    assert_same_bits(bits(gated), before)


def test_selecting_again_is_of_the_whole_memory():
    gated = make_gated()
    before = {name: adapter.memory.A.weight.detach() for name, adapter in gated.adapters.items()}
    gated.select_memory(preferring(gated, [3, 1]), 0.4)
    gated.select_memory(preferring(gated, [0, 4]), 0.4)
    for name, adapter in gated.adapters.items():
        assert torch.equal(adapter.memory.A.weight, before[name][[0, 4]])
        assert torch.equal(adapter.held.A.weight, before[name][[1, 2, 3]])
    gated.select_memory(preferring(gated, [0]), 1.0)
    assert all(adapter.held is None for adapter in gated.adapters.values())


@pytest.mark.parametrize(
    ("rank", "share", "count"), [(5, 0.2, 1), (5, 0.21, 2), (100, 0.07, 7), (3, 1e-6, 1), (4, 1.0, 4)]
)
def test_the_first_of_equals_are_taken_and_shares_round_up(rank, share, count):
    gated = make_plain(memory_rank=rank)
    before = gated.adapters["0"].memory.A.weight.detach()
    gated.select_memory({"0": torch.ones(rank)}, share)
    assert torch.equal(gated.adapters["0"].memory.A.weight, before[:count])


def test_chosen_ranks_train_at_the_memorys_rate_and_held_ones_not_at_all():
    gated = make_gated(memory_lr=0.2)
    gated.select_memory(preferring(gated, [2]), 0.2)
    own, memory = gated.parameter_groups(1e-2)
    assert memory["lr"] == pytest.approx(2e-3)
    expected = [p for adapter in gated.adapters.values() for p in adapter.memory.parameters()]
    assert {id(p) for p in memory["params"]} == {id(p) for p in expected}
    experts = [p for a in gated.adapters.values() for pair in a.experts.values() for p in pair.parameters()]
    assert {id(p) for p in own["params"]} == {id(p) for p in experts}


def test_selections_that_can_not_be_are_refused_and_change_nothing():
    gated = make_gated()
    good = preferring(gated, [0, 1])
    first = next(iter(gated.adapters))
    gated.select_memory(good, 0.4)
    before = bits(gated)
    for share in (0.0, 1.1, -0.5, math.nan):
        with pytest.raises(GatedError, match="`share` must be over 0 and at most 1"):
            gated.select_memory(good, share)
    for importance, sentence in (
        ({name: values for name, values in good.items() if name != first}, f"{first} is missing"),
        ({**good, "elsewhere": good[first]}, "elsewhere has no adapter"),
        ({**good, first: torch.ones(2)}, rf"each of the 5 memory ranks of {first}: got the shape \[2\]"),
        ({**good, first: torch.full((MEMORY,), math.nan)}, f"{first} has NaN"),
    ):
        with pytest.raises(GatedError, match=sentence):
            gated.select_memory(importance, 0.2)
    assert_same_bits(bits(gated), before)
    with pytest.raises(GatedError, match="no memory"):
        make_gated(memory_rank=0).select_memory({}, 0.5)


def test_a_memory_that_is_followed_is_not_split_behind_the_followers_back():
    gated = make_plain()
    handle = gated.adapters["0"].memory.B.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(GatedError, match="followed by a capture"):
        gated.select_memory({"0": torch.ones(MEMORY)}, 0.2)
    handle.remove()
    gated.select_memory({"0": torch.ones(MEMORY)}, 0.2)
    gated.adapters["0"].held.A.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(GatedError, match="followed by a capture"):
        gated.release_memory()
