"""Routers, gates by task, and what a forward pass is told of its sequences."""

import random
from itertools import pairwise

import pytest
import torch

from fastsft.adapters import GatedConfig, GatedError, attach_gated
from fastsft.adapters.context import find_sequences, make_context
from fastsft.adapters.router import Router
from fastsft.data import told_labels
from fastsft.ops.gated_adapter import gates, pool
from tests.adapters._models import gated_model, make_batch
from tests.train._support import make_model

# B rows, L length, I inputs, E experts, k protected directions

# float64, two layers of width 32: a few hundred roundings
CLOSE = {"rtol": 0, "atol": 1e-12}
# Gates of protected inputs move by less. float32: sums of x x^T lose directions of under sqrt(32 eps) = 2e-3 of the
# loudest, which inputs that shift a little from step to step have; found: 2e-14 and 5e-4.
KEPT = {torch.float64: 1e-12, torch.float32: 2e-3}


def make_gated(gate="sigmoid", granularity="sequence", **settings):
    return gated_model(gate, granularity, **{"experts": ["maths", "code"], "memory_rank": 0, **settings})[1]


def make_orthogonal(granularity="sequence", *, energy=1.0, **settings):
    gated = make_gated(granularity=granularity, orthogonal=True, orthogonal_energy=energy, **settings)
    gated.model.train()
    return gated


class Looking:
    """Inside, what each block's gates look at and turn out to be is written down: {number: [(x, sequences, gates)]}."""

    def __init__(self, gated):
        self.blocks, self.seen = gated.blocks, {}

    def __enter__(self):
        for block in self.blocks:
            block._find_gates = self._writing(block, block._find_gates)
        return self.seen

    def _writing(self, block, own):
        def find_gates(x, logits):
            own(x, logits)
            entry = (x.detach().flatten(0, -2), block._sequences, block.gates.detach())
            self.seen.setdefault(block.number, []).append(entry)

        return find_gates

    def __exit__(self, *failure):
        for block in self.blocks:
            del block._find_gates


def look(gated, seed):
    """{block: (x, sequences, gates)} of one pass over data that depend on the seed."""
    ids, labels = make_batch(length=5, prompt=3, seed=seed)
    with Looking(gated) as seen, torch.no_grad():
        gated.model(ids, labels=labels)
    return {number: entries[0] for number, entries in seen.items()}


def gates_of(block, x, sequences, expert=None):
    """What the block's router makes of x [T, I] now."""
    router = block.gating
    logits = x @ router.rows().T
    logits = logits + router.bias() if sequences is None else pool(logits, sequences, router.bias())
    found = gates(logits, "sigmoid").detach()
    return found if expert is None else found[:, list(router.experts).index(expert)]


def train(gated, optimizer, seed, *, steps=2):
    ids, labels = make_batch(length=5, prompt=3, seed=seed)
    for _ in range(steps):
        optimizer.zero_grad()
        gated.model(ids, labels=labels).loss.backward()
        optimizer.step()


def adamw(gated, rate=0.02):
    return torch.optim.AdamW(gated.parameter_groups(rate, weight_decay=0.1))


def differ(one, other):
    return float((one - other).abs().max())


# routers that keep old gates


@pytest.mark.parametrize("dtype", KEPT)
@pytest.mark.parametrize("sharing", ["block", "linear"])
@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_a_protected_router_keeps_old_gates_and_learns_new_ones(granularity, sharing, dtype):
    """Under one optimizer for both tasks, with momentum from the first and weight decay."""
    gated = make_orthogonal(granularity, sharing=sharing, double=dtype == torch.float64)
    optimizer = adamw(gated)
    train(gated, optimizer, seed=1)
    old = look(gated, seed=1)
    gated.protect_router()
    new = look(gated, seed=2)
    before = {block.number: gates_of(block, *new[block.number][:2]) for block in gated.blocks}
    was = {block.number: gates_of(block, *old[block.number][:2]) for block in gated.blocks}
    train(gated, optimizer, seed=2, steps=10)
    for block in gated.blocks:
        x, sequences, found = old[block.number]
        if not block._inner:  # there they are logits until they are used
            assert differ(was[block.number], found) < KEPT[dtype]
        assert differ(gates_of(block, x, sequences), was[block.number]) < KEPT[dtype]
        assert differ(gates_of(block, *new[block.number][:2]), before[block.number]) > 5e-3


def test_the_models_own_pass_gives_the_old_gates():
    gated = make_orthogonal()
    train(gated, adamw(gated), seed=1)
    old = look(gated, seed=1)[0][2]
    gated.protect_router()
    gated.add_expert("history")
    new = look(gated, seed=2)[0][2]
    train(gated, adamw(gated), seed=2, steps=4)
    # of the first block, whose inputs no adapter changes
    assert differ(look(gated, seed=1)[0][2][:, :2], old) < KEPT[torch.float64]
    assert differ(look(gated, seed=2)[0][2], new) > 1e-2


def test_a_new_experts_gate_on_old_inputs_is_its_bias():
    gated = make_orthogonal()
    train(gated, adamw(gated), seed=1)
    old = look(gated, seed=1)
    gated.protect_router()
    gated.add_expert("history", gate_bias=-1.5)
    train(gated, adamw(gated), seed=2, steps=4)
    new = look(gated, seed=2)
    bias = torch.sigmoid(torch.tensor(-1.5, dtype=torch.float64))
    for block in gated.blocks:
        assert differ(gates_of(block, *old[block.number][:2], "history"), bias) < KEPT[torch.float64]
        assert differ(gates_of(block, *new[block.number][:2], "history"), bias) > 1e-2


def test_protecting_twice_extends_the_basis():
    gated = make_orthogonal()
    olds, bases, counts = [], [], []
    optimizer = adamw(gated)
    for seed in (1, 2):
        train(gated, optimizer, seed=seed)
        olds.append(look(gated, seed=seed))
        counts.append(gated.protect_router())
        bases.append({block.number: block.gating.protected for block in gated.blocks})
    was = [{b.number: gates_of(b, *old[b.number][:2]) for b in gated.blocks} for old in olds]
    train(gated, optimizer, seed=3, steps=4)
    for block in gated.blocks:
        first, second = (basis[block.number] for basis in bases)
        assert 2 <= first.shape[1] < second.shape[1]
        assert [count[block.gating.name] for count in counts] == [first.shape[1], second.shape[1]]
        torch.testing.assert_close(second.T @ second, torch.eye(second.shape[1]).double(), **CLOSE)
        torch.testing.assert_close(second @ (second.T @ first), first, **CLOSE)
        for old, before in zip(olds, was):
            assert differ(gates_of(block, *old[block.number][:2]), before[block.number]) < KEPT[torch.float64]


@pytest.mark.parametrize("energy", [0.5, 0.7, 0.9])
def test_as_few_directions_are_protected_as_have_the_energy(energy):
    gated, whole = make_orthogonal("token", energy=energy), make_orthogonal("token")
    for each in (gated, whole):
        look(each, seed=1)
        seen = {block.number: block.gating.seen.clone() for block in each.blocks}
        each.protect_router()
        assert not any(block.gating.seen.any() for block in each.blocks)
    for block, all_of_it in zip(gated.blocks, whole.blocks):
        values = torch.linalg.eigvalsh(seen[block.number]).flip(0)
        share = values.cumsum(0) / values.sum()
        expected = int((share < energy).sum()) + 1
        assert block.gating.protected.shape[1] == expected < all_of_it.gating.protected.shape[1]


@pytest.mark.parametrize("energy", [0.9, 1.0])
@pytest.mark.parametrize("double", [True, False])
def test_what_was_protected_before_is_not_protected_again(energy, double):
    gated = make_orthogonal("token", energy=energy, double=double)
    counts = []
    for _ in range(2):
        look(gated, seed=1)
        counts.append(gated.protect_router())
    assert counts[0] == counts[1]


def test_a_loud_direction_hides_no_others():
    """Beside one of 40 000 times their energy, the others of a float32 model still get the share that was asked for."""
    config = GatedConfig(experts=["maths"], orthogonal=True, orthogonal_energy=0.999)
    router = Router("router", 256, config, torch.device("cpu"), torch.float32).train()
    spread = torch.ones(256)
    spread[0] = 200
    router.remember(torch.randn(1024, 256) * spread, None)
    seen = router.seen.double()
    router.protect()
    basis = router.protected.double()
    assert (basis.T @ seen @ basis).trace() / seen.trace() >= 0.999
    assert basis.shape[1] < 256


def test_only_training_is_remembered_and_only_where_it_was_asked_for():
    gated = make_orthogonal()
    gated.model.eval()
    look(gated, seed=1)
    assert set(gated.protect_router().values()) == {0}
    with pytest.raises(GatedError, match=r"GatedConfig\(orthogonal=True\)"):
        make_gated().protect_router()


def test_gates_per_token_remember_tokens_where_batches_name_their_tasks():
    """Tasks a sequence tell sequences apart, and gates per token don't look at sequences."""
    gated, untold = make_orthogonal("token"), make_orthogonal("token")
    gated.set_task(["maths", "code"])
    look(gated, seed=1)
    look(untold, seed=1)
    for block, other in zip(gated.blocks, untold.blocks):
        assert torch.equal(block.gating.seen, other.gating.seen)


def test_with_nothing_protected_rows_are_the_weights():
    for orthogonal in (False, True):
        for block in make_gated(orthogonal=orthogonal).blocks:
            weights = [row.weight.weight for row in block.gating.experts.values()]
            assert torch.equal(block.gating.rows(), torch.cat(weights))


# experts that come, go and rest


@pytest.mark.parametrize("orthogonal", [False, True])
def test_freezing_an_expert_freezes_its_row_and_bias(orthogonal):
    gated = make_gated(orthogonal=orthogonal)
    optimizer = adamw(gated)  # made before, so that it holds what is frozen
    train(gated, optimizer, seed=1)
    gated.freeze_expert("maths")
    before = {name: p.detach().clone() for name, p in gated.named_parameters()}
    train(gated, optimizer, seed=2)
    moved = {name for name, p in gated.named_parameters() if not torch.equal(p, before[name])}
    code = {name for name in before if ".code." in name}
    # biases of an orthogonal router stay as they begin
    assert moved == {name for name in code if not (orthogonal and name.endswith("bias"))}
    assert any("gating" in name for name in moved)
    gated.freeze_expert("maths", frozen=False)
    for block in gated.blocks:
        row = block.gating.experts["maths"]
        assert (row.weight.weight.requires_grad, row.bias.requires_grad) == (True, not orthogonal)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.parametrize("sharing", ["block", "linear"])
def test_experts_that_come_and_go_leave_the_gates_of_others_as_they_are(granularity, sharing):
    gated = make_gated(granularity=granularity, sharing=sharing)
    before = look(gated, seed=1)
    was = {block.number: gates_of(block, *before[block.number][:2], "code") for block in gated.blocks}
    gated.add_expert("history")
    gated.remove_expert("maths")
    for block in gated.blocks:
        assert list(block.gating.experts) == ["code", "history"]
        x, sequences, _ = before[block.number]
        torch.testing.assert_close(gates_of(block, x, sequences, "code"), was[block.number], **CLOSE)
    # a new expert adds nothing yet, and so the first block's pass gives the same too
    if granularity == "sequence":
        torch.testing.assert_close(look(gated, seed=1)[0][2][:, 0], before[0][2][:, 1], **CLOSE)


@pytest.mark.parametrize("sharing", ["block", "linear"])
@pytest.mark.parametrize("granularity", ["token", "sequence", "task"])
def test_top_k_is_at_most_the_experts_that_are_left(granularity, sharing):
    gated = make_gated("topk", granularity, experts=["maths", "code", "general"], top_k=2, sharing=sharing)
    gated.remove_expert("maths")
    gated.remove_expert("general")
    ids, labels = make_batch()
    found = gated.model(ids, labels=labels).logits
    # the softmax of one is 1
    gated.merge({"code": 1.0})
    torch.testing.assert_close(gated.model(ids).logits, found, **CLOSE)


# gates by task


def of_task(gated, task):
    gated.set_task(task)
    return look(gated, seed=1)[0][2][0]


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "one_hot"])
def test_a_task_begins_with_its_own_expert_louder(gate):
    config = GatedConfig(experts=["maths", "code"], rank=2, gate=gate, granularity="task")
    gated = attach_gated(make_model().double(), config)
    gated.add_expert("history")
    for number, task in enumerate(gated.tasks):
        found = of_task(gated, task)
        others = torch.cat([found[:number], found[number + 1 :]])
        assert found[number] > 0.8 > 0.2 > others.max()
        if gate == "one_hot":
            assert found[number] == 1
            assert not others.any()


def test_a_task_learns_its_own_row_of_the_table():
    gated = make_gated(granularity="task")
    before = {task: of_task(gated, task) for task in gated.tasks}
    gated.set_task("maths")
    train(gated, torch.optim.SGD(gated.parameter_groups(0.1), momentum=0.9), seed=1)
    assert differ(of_task(gated, "maths"), before["maths"]) > 1e-4
    assert torch.equal(of_task(gated, "code"), before["code"])


@pytest.mark.parametrize("gate", ["sigmoid", "one_hot"])
def test_tasks_keep_their_gates_when_experts_come_and_go(gate):
    gated = make_gated(gate, "task", experts=["maths", "code", "general"])
    before = {task: of_task(gated, task) for task in gated.tasks}
    gated.remove_expert("code")
    gated.add_expert("history")
    assert gated.experts == ["maths", "general", "history"]
    for task in before:
        assert torch.equal(of_task(gated, task)[:2], before[task][[0, 2]])
        assert of_task(gated, task)[2] < 0.2
    assert of_task(gated, "history")[2] > 0.8
    if gate == "one_hot":
        assert not of_task(gated, "code").any()  # its expert has gone


def test_a_frozen_table_stays_frozen_through_changes():
    gated = make_gated(granularity="task")
    for block in gated.blocks:
        block.gating.table.requires_grad_(False)
    gated.add_expert("history")
    gated.remove_expert("maths")
    assert not any(block.gating.table.requires_grad for block in gated.blocks)


# sequences and their prompts


def sequences_by_loops(shape, mask, positions, labels):
    """(offsets, prompt [B * L], how many tokens of it a sequence has), token by token."""
    begins, prompt, counts, flat = [], [], [], 0
    packed = False
    for row in range(shape[0]):
        for place in range(shape[1]):
            anew = place == 0
            if positions is not None and place and mask[row][place] and mask[row][place - 1]:
                anew = positions[row][place] != positions[row][place - 1] + 1
                packed = packed or anew
            if anew:
                begins.append(flat)
                counts.append(0)
                answered = attended = False
            answered = answered or (labels is not None and labels[row][place] != -100)
            inside = bool(mask[row][place]) and (not answered or not attended)
            attended = attended or bool(mask[row][place])
            prompt.append(inside)
            counts[-1] += inside
            flat += 1
    return [*begins, flat], prompt, [max(1, count) for count in counts], packed


def assert_sequences(found, expected):
    offsets, prompt, counts, packed = expected
    assert found.offsets.tolist() == offsets
    assert found.prompt.tolist() == prompt
    assert found.num_prompt.tolist() == counts
    assert found.document.tolist() == [d for d, (begin, end) in enumerate(pairwise(offsets)) for _ in range(begin, end)]
    assert (found.length is None) == packed


def find(ids_shape, *, mask=None, positions=None, labels=None, device="cpu"):
    def tensor(values):
        return None if values is None else torch.tensor(values).to(device)

    # told labels are where the data loader left them
    told = None if labels is None else torch.tensor(labels)
    return find_sequences(ids_shape, torch.device(device), tensor(mask), tensor(positions), told)


def prompts(found):
    """The prompt's tokens of each sequence, by their places in the batch."""
    places = found.prompt.nonzero().flatten()
    return [
        [place for place in places.tolist() if begin <= place < end] for begin, end in pairwise(found.offsets.tolist())
    ]


def test_rows_are_sequences_and_without_labels_all_prompt(device):
    found = find((2, 3), device=device)
    assert found.offsets.tolist() == [0, 3, 6]
    assert found.length == 3
    assert prompts(found) == [[0, 1, 2], [3, 4, 5]]


def test_padding_on_either_side_is_no_prompt():
    mask = [[0, 0, 1, 1], [1, 1, 1, 0]]
    assert prompts(find((2, 4), mask=mask)) == [[2, 3], [4, 5, 6]]
    # as `generate` numbers them: padding is at 1, and begins no sequence
    positions = [[1, 1, 0, 1], [0, 1, 2, 1]]
    found = find((2, 4), mask=mask, positions=positions)
    assert found.offsets.tolist() == [0, 4, 8]
    assert found.length == 4
    assert prompts(found) == [[2, 3], [4, 5, 6]]


def test_a_cache_long_mask_counts_its_end():
    assert prompts(find((1, 2), mask=[[1, 1, 0, 1]])) == [[1]]


def test_a_prompt_ends_at_the_first_label(device):
    labels = [[-100, -100, 7, -100, 7], [-100, 7, 7, 7, -100]]
    assert prompts(find((2, 5), labels=labels, device=device)) == [[0, 1], [5]]


def test_the_first_attended_token_is_always_prompt():
    labels = [[7, 7, 7], [-100, 7, 7]]
    found = find((2, 3), mask=[[1, 1, 1], [0, 1, 1]], labels=labels)
    assert prompts(found) == [[0], [4]]
    assert prompts(find((1, 5), positions=[[0, 1, 0, 1, 2]], labels=[[7, 7, 7, -100, 7]])) == [[0], [2]]


def test_a_row_that_is_all_padding_divides_by_nothing():
    found = find((2, 2), mask=[[0, 0], [1, 1]])
    assert prompts(found) == [[], [2, 3]]
    assert found.num_prompt.tolist() == [1, 2]


def test_positions_that_begin_anew_are_packed_sequences():
    labels = [[-100, -100, 7, -100, 7, -100, -100]]
    found = find((1, 7), positions=[[0, 1, 2, 0, 1, 0, 1]], labels=labels)
    assert found.offsets.tolist() == [0, 3, 5, 7]
    assert found.length is None
    assert prompts(found) == [[0, 1], [3], [5, 6]]


def test_the_padding_behind_packed_sequences_begins_none_of_its_own():
    positions = [[0, 1, 2, 0, 1, 0, 0]]
    found = find((1, 7), positions=positions, mask=[[1, 1, 1, 1, 1, 0, 0]])
    assert found.offsets.tolist() == [0, 3, 7]
    assert prompts(found) == [[0, 1, 2], [3, 4]]
    # nobody says that it is padding: then it is two sequences of one token, which others don't look at
    assert find((1, 7), positions=positions).offsets.tolist() == [0, 3, 5, 6, 7]


def test_rows_that_are_packed_and_rows_that_are_not():
    found = find((2, 4), positions=[[0, 1, 0, 1], [0, 1, 2, 3]])
    assert found.offsets.tolist() == [0, 2, 4, 8]
    # one row of positions for all, and the three axes of multimodal models
    assert find((2, 3), positions=[[0, 1, 2]]).length == 3
    axes = [[[0, 1, 0, 1]], [[0, 1, 2, 3]], [[0, 1, 2, 3]]]
    assert find((1, 4), positions=axes).offsets.tolist() == [0, 2, 4]


@pytest.mark.parametrize("seed", range(30))
def test_any_batch_is_read_as_token_by_token(seed):
    draw = random.Random(seed)
    rows, length = draw.randint(1, 3), draw.randint(1, 9)
    mask, positions, labels = [], [], []
    for _ in range(rows):
        left, right = draw.choice([(0, 0), (0, 1), (1, 0)])
        left, right = left * draw.randint(0, length), right * draw.randint(0, length)
        mask.append([int(left <= place < length - right) for place in range(length)])
        row = [0]
        for _ in range(length - 1):
            row.append(0 if draw.random() < 0.3 else row[-1] + 1)
        positions.append(row)
        labels.append([draw.choice([-100, -100, 7]) if seen else -100 for seen in mask[-1]])
    given = [draw.choice([None, each]) for each in (positions, labels)]
    expected = sequences_by_loops((rows, length), mask, *given)
    assert_sequences(find((rows, length), mask=mask, positions=given[0], labels=given[1]), expected)


# what the model is told


def test_training_must_know_where_prompts_end():
    gated = make_gated()
    gated.model.train()
    ids, labels = make_batch()
    with pytest.raises(GatedError, match=r"got no labels .*told_labels\(labels\)"):
        gated.model(ids)
    gated.model(ids, labels=labels)
    expected = dict(gated.context.gates)
    with told_labels(labels):
        gated.model(ids)
    assert len(expected) == len(gated.blocks)
    assert all(torch.equal(gated.context.gates[number], found) for number, found in expected.items())
    # what isn't trained on may be all prompt
    with torch.no_grad():
        gated.model(ids)
    assert all(differ(gated.context.gates[number], found) > 1e-4 for number, found in expected.items())
    gated.model.eval()(ids)


def test_gates_look_at_prompts_alone():
    gated = make_gated()
    ids, labels = make_batch(prompt=4)
    gated.model(ids, labels=labels)
    before = gated.context.gates[0]
    ids[:, 4:] = make_batch(seed=9)[0][:, 4:]
    gated.model(ids, labels=labels)
    # sums of prompts and of zeros
    torch.testing.assert_close(gated.context.gates[0], before, **CLOSE)
    ids[:, 3] = 2 + (ids[:, 3] - 1) % 60
    gated.model(ids, labels=labels)
    assert differ(gated.context.gates[0], before) > 1e-4


def test_what_a_pass_can_not_be_told_is_refused():
    config = GatedConfig(experts=["maths"], granularity="sequence")
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(GatedError, match=r"labels must have the shape of the batch, \[2, 3\]: got \[2, 2\]"):
        make_context(config, {"input_ids": ids, "labels": ids[:, :2]}, None, None, strict=True)
    with pytest.raises(GatedError, match="`input_ids` or `inputs_embeds`: the model got neither"):
        make_context(config, {}, None, None, strict=False)
    embeds = torch.ones(2, 3, 8)
    assert make_context(config, {"inputs_embeds": embeds}, None, None, strict=False).sequences.length == 3


def test_tasks_are_one_a_sequence():
    config = GatedConfig(experts=["maths", "code"], gate="one_hot", granularity="task")
    ids, tasks = torch.ones(4, 3, dtype=torch.long), torch.tensor([1, 0])
    # beams, or several answers to a prompt, as `generate` lays them
    assert make_context(config, {"input_ids": ids}, tasks, None, strict=False).task.tolist() == [1, 1, 0, 0]
    for rows, strict in ((4, True), (3, False)):
        with pytest.raises(GatedError, match=f"2 tasks were set for {rows} sequences"):
            make_context(config, {"input_ids": ids[:rows]}, tasks, None, strict=strict)
    packed = {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 0]])}
    assert make_context(config, packed, tasks, None, strict=True).task.tolist() == [1, 0]
    # one for all needs no sequences
    assert make_context(config, {}, tasks[:1], None, strict=True).sequences is None


def test_a_pass_without_a_task_is_refused():
    gated = make_gated("one_hot", "task")
    gated.set_task(None)
    with pytest.raises(GatedError, match=r"gated.set_task\(name\)"):
        gated.model(make_batch()[0])
