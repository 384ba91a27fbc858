"""fastsft/ops/gated_adapter.py against a loop over experts that autograd differentiates, in float64."""

from itertools import pairwise, product

import pytest
import torch
from torch import nn

from fastsft import ops
from fastsft.ops import _gated_chosen
from fastsft.ops.gated_adapter import Chosen, expand, gates, may_skip, pool, shrink
from tests.ops._gated_problem import (
    GATES,
    SPARSE,
    Problem,
    assert_equal_within,
    assert_like_the_loop,
    outputs_and_gradients,
    slope,
)

# T tokens, D sequences, I inputs, O outputs, E experts, R = E * rank, M memory rank, N tasks

# equals the slow truth


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rows", [False, True], ids=["packed", "rows"])
@pytest.mark.parametrize(("gate", "per"), GATES)
def test_outputs_and_gradients_equal_a_loop_over_experts(gate, per, rows, skip, device):
    lengths = (3, 3) if rows else (4, 0, 3)
    for memory, bias, base in product((0, 3), (False, True), ("linear", "curved")):
        problem = Problem(gate, per, lengths=lengths, rows=rows, memory=memory, bias=bias, base=base, device=device)
        assert_like_the_loop(problem, skip=skip)


CASES = {
    "odd": {"lengths": (13, 1, 7), "inputs": 7, "outputs": 11, "experts": 5, "rank": 3, "memory": 1},
    "one_row": {"lengths": (1,), "prompts": (1,)},
    "no_tokens": {"lengths": (0, 0)},
    "no_sequences": {"lengths": ()},
    "no_rows": {"lengths": (), "rows": True},
    "rows_of_no_tokens": {"lengths": (0, 0), "rows": True},
    "one_expert": {"experts": 1, "top_k": 1},
    "rank_1": {"rank": 1, "memory": 1},
    "experts_alone": {"memory": 0, "bias": False, "base": None},
    "no_prompts": {"prompts": (0, 0, 0)},
    "prompts_alone": {"prompts": (4, 0, 3)},
    "one_output": {"outputs": 1, "inputs": 1},
    "top_1": {"top_k": 1},
    "top_all": {"top_k": 3},
    "one_sequence": {"lengths": (5,)},
    "one_task_for_all": {"one_task": True},
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_shapes_of_every_kind_equal_the_loop(case, skip, device):
    for gate, per in GATES:
        problem = Problem(gate, per, **CASES[case], device=device)
        assert_like_the_loop(problem, skip=skip)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("gate", "per"), [("softmax", "token"), ("sigmoid", "sequence"), *SPARSE])
def test_strided_inputs_equal_the_loop(gate, per, skip, device):
    problem = Problem(gate, per, lengths=(4, 4), rows=True, device=device)

    def strided(leaf):
        return leaf.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_()

    problem.x, problem.a, problem.b = strided(problem.x), strided(problem.a), strided(problem.b)
    assert not any(leaf.is_contiguous() for leaf in (problem.x, problem.a, problem.b))
    assert_like_the_loop(problem, skip=skip)


def test_a_strided_output_of_the_base_equals_the_loop(device):
    problem = Problem("sigmoid", "token", lengths=(4, 4), rows=True, device=device)
    problem.base = nn.Sequential(problem.base, Transposed())
    assert not problem.base(problem.x).is_contiguous()
    assert_like_the_loop(problem)


class Transposed(nn.Module):
    """The same numbers, laid out token before row."""

    def forward(self, y):
        return y.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("base", ["linear", "curved"])
@pytest.mark.parametrize("dressed", [False, True], ids=["bare", "memory_and_bias"])
@pytest.mark.parametrize("rows", [False, True], ids=["packed", "rows"])
@pytest.mark.parametrize(
    ("gate", "per", "skip"), [(*each, False) for each in GATES] + [(*each, True) for each in SPARSE]
)
def test_gradients_equal_finite_differences(gate, per, skip, rows, dressed, base, device):
    problem = Problem(
        gate,
        per,
        lengths=(2, 2) if rows else (2, 0, 1),
        rows=rows,
        prompts=(1, 2) if rows else (1, 0, 1),
        inputs=3,
        outputs=2,
        memory=1 if dressed else 0,
        bias=dressed,
        base=base,
        device=device,
    )
    told = {name: leaf for name, leaf in problem.leaves.items() if name in ("x", "a", "b", "bias", "table")}

    def run(*leaves):
        return problem.run(skip=skip, **dict(zip(told, leaves)))

    assert torch.autograd.gradcheck(run, tuple(told.values()))


def test_stages_shared_by_layers_equal_layers_of_their_own(device):
    """Two layers that read one x share its product with both layers' rows, and one router."""
    problems = [Problem("softmax", "sequence", outputs=outputs, device=device) for outputs in (4, 6)]
    first, second = problems
    second.x, second.bias = first.x, first.bias
    with torch.no_grad():
        second.a[-second.experts :] = first.a[-first.experts :]
    width, E = first.width + first.memory, first.experts

    def apart():
        return torch.cat([problem.run() for problem in problems], -1)

    def together():
        stack = torch.cat([first.a[:width], second.a[:width], first.a[width:]])
        x, *zs, logits = shrink(first.x, stack, (width, width, E), owned=True)
        g = gates(pool(logits, first.sequences, first.bias), "softmax")
        told = {"rank": first.rank, "sequences": first.sequences, "scale": first.scale}
        return torch.cat([expand(p.base(x), z, g, p.b, **told) for p, z in zip(problems, zs)], -1)

    expected, actual = (outputs_and_gradients(first, run()) for run in (apart, together))
    # apart, each of the two layers has the router's rows for itself
    y = apart()
    (of_second,) = torch.autograd.grad(y, second.a, slope(y))
    expected["a"][width:] += of_second[width:]
    assert_equal_within(actual, expected)


def test_packed_logits_are_pooled_alike_where_kernels_are_asked_for_by_name(device):
    problem = Problem("topk", "sequence", device=device)
    logits = torch.randn(7, 3, device=device, requires_grad=True)
    expected = pool(logits, problem.sequences)
    with ops.backend("triton"):
        found = pool(logits, problem.sequences)
    torch.testing.assert_close(found, expected)
    (slope_found,), (slope_expected,) = (torch.autograd.grad(each, logits, slope(each)) for each in (found, expected))
    assert torch.equal(slope_found, slope_expected)


@pytest.mark.parametrize("lengths", [(4, 0, 3, 1), (0, 0), ()], ids=str)
def test_one_product_with_zeros_between_equals_a_sum_over_sequences(lengths, device):
    P, n, T = 7, 3, sum(lengths)
    columns = torch.rand(len(lengths), P, device=device).argsort(1)[:, :n]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    sequences = ops.Sequences.packed(offsets, torch.ones(T, dtype=torch.bool, device=device))
    z, x = (torch.randn(T, size, dtype=torch.float64, device=device) for size in (n, 5))
    expected = x.new_zeros(P, 5)
    for t in range(T):
        for row, number in zip(columns[sequences.document[t]], z[t]):
            expected[row] += number * x[t]
    dense = _gated_chosen._outer_dense(z, x, P, columns, sequences.document)
    summed = _gated_chosen.outer_chosen(z, x, P, Chosen(columns, columns, sequences))
    torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(summed, expected, rtol=1e-12, atol=1e-12)


def test_a_gpu_does_not_wait_for_where_packed_sequences_begin():
    # tensors without numbers, which cannot be asked for
    with torch.device("meta"):
        offsets, document, columns = (torch.zeros(*shape, dtype=torch.int64) for shape in ((3,), (7,), (2, 3)))
        sequences = ops.Sequences(offsets, document, document > 0, offsets[1:])
        z, x = torch.zeros(7, 3), torch.zeros(7, 5)
    assert _gated_chosen.outer_chosen(z, x, 9, Chosen(columns, columns, sequences)).shape == (9, 5)


@pytest.mark.parametrize(("gate", "per"), SPARSE)
def test_kernels_asked_for_by_name_are_as_near_to_the_truth_as_the_loop_is(gate, per, device):
    if device.type != "cuda":
        pytest.skip("these kernels need a GPU: test_gated_adapter_triton.py runs them without one")
    sizes = {"lengths": (70, 0, 41, 200), "inputs": 48, "outputs": 200, "experts": 4, "rank": 4, "device": device}
    problem = Problem(gate, per, dtype=torch.bfloat16, **sizes)
    with ops.backend("triton"):
        actual = outputs_and_gradients(problem, problem.run())
    rough = outputs_and_gradients(problem, problem.loop())
    for leaf in problem.leaves.values():
        leaf.data = leaf.data.double()
    exact = outputs_and_gradients(problem, problem.loop())
    for name, truth in exact.items():
        error, allowed = ((found[name].double() - truth).norm() for found in (actual, rough))
        assert error <= 2 * allowed + 1e-6 * truth.norm(), name


# keeps a law


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("gate", "per"), [each for each in GATES if each[1] != "token"])
def test_permuting_sequences_permutes_outputs(gate, per, skip, device):
    problem = Problem(gate, per, lengths=(3, 5, 1, 4), device=device)
    order = [2, 0, 3, 1]
    tokens = torch.cat([torch.arange(*pair) for pair in (tuple(pairwise(problem.bounds))[d] for d in order)]).to(device)
    lengths = torch.tensor([0, 1, 3, 4, 5], device=device).cumsum(0)
    change = {"sequences": ops.Sequences.packed(lengths, problem.prompt[tokens]), "x": problem.x[tokens]}
    if per == "task":
        change["task"] = problem.task[order]
    torch.testing.assert_close(problem.run(skip=skip, **change), problem.run(skip=skip)[tokens], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [False, True], ids=["packed", "rows"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "topk"])
def test_gates_of_a_sequence_look_at_its_prompt_alone(gate, rows, device):
    problem = Problem(gate, "sequence", lengths=(5, 5), rows=rows, prompts=(3, 2), device=device)
    prompt = problem.prompt.view(problem.x.shape[:-1])

    def outputs(where):
        x = problem.x.detach().clone()
        x[where] = 3 - x[where]
        return problem.run(x=x)

    before = problem.run()
    assert torch.equal(outputs(~prompt)[prompt], before[prompt])
    # the other way round they do move
    assert not torch.isclose(outputs(prompt)[~prompt], before[~prompt]).any(-1).any()


def test_rows_equal_the_same_sequences_packed(device):
    problem = Problem("topk", "sequence", lengths=(6, 6, 6), rows=True, prompts=(1, 4, 6), device=device)
    offsets = torch.arange(4, device=device) * 6
    packed = ops.Sequences.packed(offsets, problem.prompt)
    for name, field in packed._asdict().items():
        if name != "length":
            assert torch.equal(field, getattr(problem.sequences, name))
    expected = outputs_and_gradients(problem, problem.run())
    assert_equal_within(outputs_and_gradients(problem, problem.run(sequences=packed)), expected)


@pytest.mark.parametrize("frozen", [1, 2, 3])
@pytest.mark.parametrize(
    ("gate", "per", "skip"),
    [("softmax", "token", False), ("sigmoid", "sequence", False)]
    + [(*each, skip) for each in SPARSE for skip in (False, True)],
)
def test_frozen_experts_get_zeros_and_the_rest_the_same_gradients(gate, per, skip, frozen, device):
    problem = Problem(gate, per, lengths=(4, 3, 2), device=device)
    expected = outputs_and_gradients(problem, problem.run(skip=skip))
    actual = outputs_and_gradients(problem, problem.run(skip=skip, num_frozen=frozen))
    count = frozen * problem.rank
    assert expected["a"][:count].norm() > 0
    expected["a"][:count] = 0
    expected["b"][:, :count] = 0
    assert_equal_within(actual, expected)


@pytest.mark.parametrize("rows", [False, True], ids=["packed", "rows"])
@pytest.mark.parametrize(("gate", "per"), SPARSE)
def test_skipping_is_chosen_where_it_pays_and_gives_the_same(gate, per, rows, device, monkeypatch):
    formed = []
    original = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: formed.append(b.shape) or original(a, b))
    problem = Problem(gate, per, lengths=(40, 40), rows=rows, experts=4, device=device)
    dense = (problem.x.shape[-1], len(problem.a))
    expected = outputs_and_gradients(problem, problem.run(skip=False))
    assert dense in formed
    formed.clear()
    by_length = rows or device.type == "cpu"
    assert_equal_within(outputs_and_gradients(problem, problem.run()), expected)
    assert (dense in formed) != by_length


@pytest.mark.parametrize("where", ["cpu", "cuda", "meta"])
def test_a_gpu_skips_in_packed_sequences_only_where_kernels_are_asked_for(where):
    def found(sequences):
        return may_skip("topk", 2, 4, sequences, 100, None)

    # no device is needed: nothing but its name is looked at
    with torch._subclasses.FakeTensorMode():
        offsets, prompt = torch.tensor([0, 40, 100], device=where), torch.ones(100, dtype=torch.bool, device=where)
        packed, rows = ops.Sequences(offsets, prompt, prompt, offsets), ops.Sequences.of_rows(prompt.view(2, 50))
    assert found(packed) == (where == "cpu")
    assert found(rows)
    for backend in ops._op.BACKENDS:
        with ops.backend(backend):
            assert found(packed) == (where == "cpu" or (where == "cuda" and backend == "triton"))
            assert found(rows)
    assert found(packed) == (where == "cpu")


def test_an_int8_base_is_adapted_without_being_known(device):
    for gate, per in GATES:
        assert_like_the_loop(Problem(gate, per, base="int8", device=device))


def test_no_gradient_is_formed_for_an_input_that_needs_none(device):
    problem = Problem("softmax", "token", device=device)
    problem.x.requires_grad_(False)
    seen = []
    linear = problem.base.requires_grad_(False)
    problem.base = lambda x: seen.append(x.requires_grad) or linear(x)
    y = problem.run()
    assert seen == [False]
    grads = torch.autograd.grad(y.sum(), (problem.a, problem.b, problem.bias))
    expected = torch.autograd.grad(problem.loop().sum(), (problem.a, problem.b, problem.bias))
    for actual, wanted in zip(grads, expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_outputs_lie_in_the_memory_of_a_linear_base_and_may_be_changed_in_place(device, monkeypatch):
    problem = Problem("sigmoid", "sequence", device=device)
    made = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: made.append(linear(*args)) or made[-1])
    y = problem.run()
    assert y.data_ptr() == made[0].data_ptr()
    y *= 2
    expected = outputs_and_gradients(problem, problem.loop() * 2)
    assert_equal_within(outputs_and_gradients(problem, y), expected)


@pytest.mark.parametrize("kept", [nn.Identity, nn.Tanh, nn.Flatten])
def test_what_a_base_keeps_of_its_own_is_not_written_to(kept, device):
    problem = Problem("sigmoid", "token", inputs=4, outputs=4, base=None, device=device)
    problem.base = kept()
    before = problem.x.detach().clone()
    assert_like_the_loop(problem)
    with torch.no_grad():
        problem.run()
    assert torch.equal(problem.x, before)


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize(("gate", "per"), [("sigmoid", "token"), *SPARSE])
def test_hooks_of_the_base_see_what_they_would_without_the_adapter(gate, per, shape, device):
    problem = Problem(gate, per, lengths=(6,), device=device)
    x = problem.x.detach().view(*shape, -1).requires_grad_()
    outputs, grads = [], []
    problem.base.register_forward_hook(lambda module, inputs, y: outputs.append(y.detach().clone()))
    problem.base.register_full_backward_hook(lambda module, dx, dy: grads.append((*dx, *dy)))
    y = problem.run(x=x, skip=True)
    dy = torch.randn_like(y)
    dx, *_ = torch.autograd.grad(y, (x, problem.a, problem.b), dy)
    weight = problem.base.weight
    torch.testing.assert_close(outputs[0], x @ weight.T + problem.base.bias, rtol=1e-12, atol=1e-12)
    ((seen_dx, seen_dy),) = grads
    assert torch.equal(seen_dy, dy)
    # kept by the hook, and not added to afterwards
    torch.testing.assert_close(seen_dx, dy @ weight, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dx, seen_dx)
