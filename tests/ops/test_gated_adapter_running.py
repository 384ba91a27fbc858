"""gated_adapter in narrow types, checkpointed and compiled, and what it keeps for the backward pass."""

import pytest
import torch
from torch import nn

from tests.ops._gated_problem import GATES, SPARSE, Problem, assert_equal_within, outputs_and_gradients


@pytest.mark.parametrize(("gate", "per"), GATES)
def test_autocast_is_as_near_to_float32_as_the_loop_is(gate, per, device):
    problem = Problem(
        *(gate, per), lengths=(40, 24), inputs=48, outputs=32, experts=4, rank=4, dtype=torch.float32, device=device
    )
    exact = outputs_and_gradients(problem, problem.loop())
    with torch.autocast(device.type, torch.bfloat16):
        ours, plain = problem.run(), problem.loop()
    assert ours.dtype == torch.bfloat16
    actual, rough = outputs_and_gradients(problem, ours), outputs_and_gradients(problem, plain)
    for name, truth in exact.items():
        if name != "y":
            assert actual[name].dtype == torch.float32
        error, allowed = ((found[name].float() - truth).norm() for found in (actual, rough))
        # both round every product's operands and result, in places that are not the same
        assert error <= 2 * allowed + 1e-6 * truth.norm(), name


@pytest.mark.parametrize(("gate", "per"), GATES)
def test_bfloat16_tensors_are_as_near_to_the_truth_as_the_loop_is(gate, per, device):
    sizes = {"lengths": (40, 24), "inputs": 48, "outputs": 32, "experts": 4, "rank": 4, "device": device}
    problem = Problem(gate, per, dtype=torch.bfloat16, **sizes)
    actual, rough = (outputs_and_gradients(problem, y) for y in (problem.run(), problem.loop()))
    for name, leaf in problem.leaves.items():
        assert actual[name].dtype == leaf.dtype == torch.bfloat16
        leaf.data = leaf.data.double()
    exact = outputs_and_gradients(problem, problem.loop())
    for name, truth in exact.items():
        error, allowed = ((found[name].double() - truth).norm() for found in (actual, rough))
        assert error <= 2 * allowed + 1e-6 * truth.norm(), name


@pytest.mark.parametrize(("gate", "per"), GATES)
def test_a_base_that_returns_another_type_keeps_it(gate, per, device):
    problem = Problem(gate, per, dtype=torch.float32, base="int8", device=device)
    problem.base = nn.Sequential(problem.base, Double())
    for y in (problem.run(), problem.run(skip=True)):
        assert y.dtype == torch.float64
        # what is added to it is made in float32: its epsilon, 1e-7, times some tens of products of a few units
        assert_equal_within(outputs_and_gradients(problem, y), outputs_and_gradients(problem, problem.loop()), 1e-5)


class Double(nn.Module):
    def forward(self, y):
        return y.double()


def saved_storages(run, beside=()):
    """{address: bytes} of all memory that is kept for the backward pass of what `run` does, but that of `beside`."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    for tensor in beside:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return found


def num_bytes(tensor):
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("gate", "per"), GATES)
def test_only_x_z_and_gates_are_saved(gate, per, skip, device):
    problem = Problem(gate, per, lengths=(32, 32), inputs=40, outputs=48, dtype=torch.float32, device=device)
    problem.base.requires_grad_(False)
    weights = [leaf for name, leaf in problem.leaves.items() if name != "x"]
    T, D, E = 64, 2, problem.experts
    found = saved_storages(lambda: problem.run(skip=skip), weights)
    z = 4 * T * len(problem.a)
    g = 4 * (T if per == "token" else D) * E
    # of sequences alone: gates of the chosen experts, and their numbers
    chosen = 2 * 8 * D * E
    assert sum(found.values()) <= num_bytes(problem.x) + z + g + chosen
    assert num_bytes(problem.x) not in [
        size for address, size in found.items() if address != problem.x.untyped_storage().data_ptr()
    ]
    if skip and (gate, per) in SPARSE:
        k = 1 if gate == "one_hot" else problem.top_k
        z = 4 * T * (k * problem.rank + problem.memory)
        assert sum(found.values()) <= num_bytes(problem.x) + z + g + chosen


def test_autocast_halves_what_is_saved(device):
    problem = Problem("softmax", "token", lengths=(64,), inputs=40, outputs=48, dtype=torch.float32, device=device)
    problem.base.requires_grad_(False)
    with torch.autocast(device.type, torch.bfloat16):
        found = saved_storages(problem.run, problem.leaves.values())
    T = 64
    assert 2 * T * len(problem.a) in found.values()
    # x, z and the weights rounded, each once; gates stay in float32
    halves = problem.x.numel() + T * len(problem.a) + problem.a.numel() + problem.base.weight.numel()
    assert sum(found.values()) <= 2 * halves + 4 * T * problem.experts


def test_nothing_is_saved_where_no_gradient_is_asked_for(device):
    problem = Problem("topk", "sequence", device=device)
    expected = problem.loop()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = problem.run()
        assert not y.requires_grad
        torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)


def test_checkpointing_gives_the_same_gradients(device):
    problem = Problem("softmax", "sequence", device=device)
    expected = outputs_and_gradients(problem, problem.run())
    y = torch.utils.checkpoint.checkpoint(problem.run, use_reentrant=False)
    assert_equal_within(outputs_and_gradients(problem, y), expected)


@pytest.mark.parametrize(
    ("gate", "per", "rows"),
    [
        ("topk", "token", True),
        ("softmax", "sequence", True),
        ("topk", "sequence", False),
        ("sigmoid", "task", False),
        ("one_hot", "task", True),
    ],
)
def test_compiled_whole_it_gives_the_same(gate, per, rows, device):
    # as long as where products would be skipped, which a graph of fixed shapes can't
    problem = Problem(gate, per, lengths=(40, 40), rows=rows, experts=4, device=device)
    expected = outputs_and_gradients(problem, problem.run(num_frozen=1, skip=False))
    torch._dynamo.reset()
    compiled = torch.compile(problem.run, backend="aot_eager", fullgraph=True)
    assert_equal_within(outputs_and_gradients(problem, compiled(num_frozen=1)), expected)
