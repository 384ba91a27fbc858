"""fastsft/ops/gated_adapter.py against a loop over experts that autograd differentiates, in float64."""

from itertools import pairwise, product

import pytest
import torch
from torch import nn

from fastsft import ops
from fastsft.ops import _gated_chosen
from fastsft.ops.gated_adapter import Chosen, expand, gates, may_skip, pool, shrink

# T tokens, D sequences, I inputs, O outputs, E experts, R = E * rank, M memory rank, N tasks

GATES = [
    *product(("sigmoid", "softmax", "topk"), ("token", "sequence", "task")),
    ("one_hot", "task"),
]
# of which a sequence uses some experts alone, so that products of the others can be skipped
SPARSE = [("topk", "sequence"), ("topk", "task"), ("one_hot", "task")]
NUM_TASKS = 4


class Sine(nn.Module):
    """A base that begins with it has gradients that depend on x; one that ends with nn.Tanh keeps its own output."""

    def forward(self, x):
        return x.sin()


class Int8Linear(nn.Module):
    """A frozen layer with int8 weights and a scale a row, turned into numbers again at every call."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(outputs, 1, dtype=torch.float64) / 127)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scales.to(x.dtype))


def make_base(kind, inputs, outputs):
    if kind is None:
        return None
    linear = nn.Linear(inputs, outputs)
    if kind == "curved":
        return nn.Sequential(Sine(), linear, nn.Tanh())
    return Int8Linear(inputs, outputs) if kind == "int8" else linear


class Problem:
    """Random arguments, and what a loop over the experts makes of them. Sequences that are rows make a 3-D x."""

    def __init__(
        self,
        gate="sigmoid",
        per="token",
        *,
        lengths=(4, 0, 3),
        rows=False,
        prompts=None,
        inputs=5,
        outputs=4,
        experts=3,
        rank=2,
        memory=3,
        bias=True,
        base="linear",
        top_k=2,
        one_task=False,
        scale=0.7,
        dtype=torch.float64,
        device="cpu",
    ):
        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_()

        self.gate, self.per, self.top_k, self.rank, self.scale = gate, per, top_k, rank, scale
        self.experts, self.memory, self.width = experts, memory, experts * rank
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
        T, D = self.bounds[-1], len(lengths)
        self.prompt = self._prompts([length // 2 for length in lengths] if prompts is None else prompts).to(device)
        offsets = torch.tensor(self.bounds, device=device)
        row = (D, lengths[0] if D else 3)
        self.x = draw(*(row if rows else (T,)), inputs)
        if rows:
            self.sequences = ops.Sequences.of_rows(self.prompt.view(row))
        else:
            self.sequences = ops.Sequences.packed(offsets, self.prompt)
        self.a = draw(self.width + memory + (0 if per == "task" else experts), inputs)
        self.b = draw(outputs, self.width + memory)
        self.bias = draw(experts) if bias and gate != "one_hot" else None
        self.table = draw(NUM_TASKS, experts) if per == "task" and gate != "one_hot" else None
        tasks = torch.arange(1 if one_task else D, device=device)
        self.task = (2 - tasks) % min(experts, NUM_TASKS) if per == "task" else None
        self.base = make_base(base, inputs, outputs)
        if self.base is not None:
            self.base = self.base.to(device, dtype)

    def _prompts(self, counts):
        prompt = torch.zeros(self.bounds[-1], dtype=torch.bool)
        for begin, count in zip(self.bounds, counts):
            prompt[begin : begin + count] = True
        return prompt

    @property
    def leaves(self):
        named = {"x": self.x, "a": self.a, "b": self.b, "bias": self.bias, "table": self.table}
        found = {name: leaf for name, leaf in named.items() if leaf is not None}
        return found | ({} if self.base is None else {f"base.{n}": p for n, p in self.base.named_parameters()})

    def run(self, **change):
        told = {
            "num_experts": self.experts,
            "rank": self.rank,
            "base": self.base,
            "gate": self.gate,
            "per": self.per,
            "top_k": self.top_k,
            "bias": self.bias,
            "sequences": None if self.per == "token" else self.sequences,
            "task": self.task,
            "table": self.table,
            "scale": self.scale,
        } | change
        x, a, b = (told.pop(name, getattr(self, name)) for name in "xab")
        return ops.gated_adapter(x, a, b, **told)

    def gates(self):
        """Gates of every token [T, E], sequence by sequence."""
        x, router = self.x.flatten(0, -2), self.a[self.width + self.memory :]
        logits = (x @ router.T).to(torch.promote_types(x.dtype, torch.float32))
        if self.per != "token":
            none = logits.new_zeros(0, self.experts)
            logits = torch.cat([none, *(self._logits_of_sequence(logits, d) for d in range(len(self.bounds) - 1))])
        logits = logits if self.bias is None else logits + self.bias
        if self.gate == "one_hot":
            return logits
        if self.gate == "sigmoid":
            return 1 / (1 + torch.exp(-logits))
        if self.gate == "topk":
            least = logits.sort(-1, descending=True).values[:, self.top_k - 1 : self.top_k]
            logits = torch.where(logits < least, -torch.inf, logits)
        powers = torch.exp(logits)
        return powers / powers.sum(-1, keepdim=True)

    def _logits_of_sequence(self, logits, d):
        begin, end = self.bounds[d], self.bounds[d + 1]
        if self.per == "task":
            task = self.task[d if len(self.task) > 1 else 0]
            rows = torch.eye(self.experts, device=logits.device) if self.table is None else self.table
            return rows[task].expand(end - begin, self.experts)
        looked_at = logits[begin:end][self.prompt[begin:end]]
        return (looked_at.sum(0) / max(len(looked_at), 1)).expand(end - begin, self.experts)

    def loop(self):
        """One expert after another, at full width."""
        x, g = self.x, self.gates().view(*self.x.shape[:-1], self.experts)
        y = x.new_zeros(*x.shape[:-1], len(self.b)) if self.base is None else self.base(x)
        for e in range(self.experts):
            own = slice(e * self.rank, (e + 1) * self.rank)
            y = y + self.scale * g[..., e : e + 1].to(y.dtype) * ((x @ self.a[own].T) @ self.b[:, own].T)
        always = slice(self.width, self.width + self.memory)
        return y + self.scale * (x @ self.a[always].T) @ self.b[:, always].T


def slope(y):
    return torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)


def outputs_and_gradients(problem, y):
    """{"y" or a leaf's name: y, or the leaf's gradient of a fixed function of y}; zeros where there is none."""
    leaves = {name: leaf for name, leaf in problem.leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(y, leaves.values(), slope(y), allow_unused=True, materialize_grads=True)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def assert_equal_within(actual, expected, tolerance=1e-12):
    """1e-12: float64 sums of some tens of products of a few units each."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_like_the_loop(problem, **change):
    expected = outputs_and_gradients(problem, problem.loop())
    assert_equal_within(outputs_and_gradients(problem, problem.run(**change)), expected)


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


# errors


def bad(**change):
    told = {"x": torch.ones(6, 4), "a": torch.ones(11, 4), "b": torch.ones(5, 8), "num_experts": 3, "rank": 2}
    return told | change


def of_tasks(**change):
    sequences = ops.Sequences.packed(torch.tensor([0, 2, 6]), torch.ones(6, dtype=torch.bool))
    told = {"a": torch.ones(8, 4), "per": "task", "task": torch.tensor([0, 1]), "table": torch.ones(2, 3)}
    return bad(**(told | {"sequences": sequences} | change))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (bad(num_experts=0), "`num_experts` and `rank` must be at least 1: got 0 and 2"),
        (bad(rank=0), "`num_experts` and `rank` must be at least 1: got 3 and 0"),
        (bad(a=torch.ones(44)), r"`x` \[.., I\] and `a` \[P, I\] must have the same I.*and \[44\]"),
        (bad(x=torch.ones(4)), r"must have the same I: got \[4\] and"),
        (bad(x=torch.ones(6, 5)), r"must have the same I: got \[6, 5\] and \[11, 4\]"),
        (bad(b=torch.ones(40)), r"`b` \[O, E \* rank \+ M\] must have 3 x 2 columns.*got \[40\]"),
        (bad(b=torch.ones(5, 5)), r"must have 3 x 2 columns.*got \[5, 5\]"),
        (bad(num_frozen=4), "`num_frozen` must be between 0 and the 3 experts: got 4"),
        (bad(num_frozen=-1), "`num_frozen` must be between 0 and the 3 experts: got -1"),
        (bad(a=torch.ones(8, 4)), r"3 x 2 rows of experts \+ 2 of the memory.* \+ 3 of the router, 11 in all: got 8"),
        (of_tasks(a=torch.ones(11, 4)), r"beyond its experts\), 8 in all: got 11"),
        (bad(gate="hard"), "`gate` must be one of sigmoid, softmax, topk, one_hot: got 'hard'"),
        (bad(per="layer"), "`per` must be 'token', 'sequence' or 'task': got 'layer'"),
        (bad(gate="one_hot"), "gate 'one_hot' is the task's own expert, so `per` must be 'task': got 'token'"),
        (bad(gate="topk", top_k=0), "`top_k` must be between 1 and the 3 experts: got 0"),
        (bad(gate="topk", top_k=4), "`top_k` must be between 1 and the 3 experts: got 4"),
        (bad(bias=torch.ones(2)), r"`bias` must be \[3\], a number an expert: got \[2\]"),
        (of_tasks(gate="one_hot", table=None, bias=torch.ones(3)), "gate 'one_hot' has no logits, so `bias` would do"),
        (of_tasks(task=torch.tensor(0)), r"`task` must be a vector of numbers, \[D\] or \[1\]: got the shape \[\]"),
        (bad(per="sequence"), "gates per sequence need `sequences`"),
        (of_tasks(x=torch.ones(7, 4)), "`sequences` must cover the 7 tokens of `x`: they cover 6"),
        (of_tasks(task=None), "gates per task need `task`"),
        (of_tasks(table=None), "and `table`.*unless the gate is 'one_hot'"),
        (of_tasks(task=torch.tensor([0, 1, 1])), "one a sequence with `sequences` given: got 3 tasks for 2 sequences"),
        (of_tasks(sequences=None), "with `sequences` given: got 2 tasks for 0 sequences"),
        (of_tasks(table=torch.ones(2, 4)), r"`table` must be \[N, 3\], a logit an expert of each task: got \[2, 4\]"),
        (of_tasks(table=torch.ones(3)), r"`table` must be \[N, 3\].*got \[3\]"),
    ],
)
def test_bad_input_is_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.gated_adapter(**arguments)


def test_the_arguments_that_are_made_bad_are_good():
    assert ops.gated_adapter(**bad()).shape == (6, 5)
    assert ops.gated_adapter(**of_tasks()).shape == (6, 5)
