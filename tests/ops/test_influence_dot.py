"""fastsft/ops/influence_dot.py against autograd, document by document, in float64."""

from itertools import pairwise

import pytest
import torch

from fastsft import _native, ops

# Sums of T products round to about sqrt(T) * 6e-8 of their norm; T < 1000 here.
FLOAT32 = 1e-5

# (document lengths, inputs, outputs): one and several tokens, empty documents, sides below, at and above a tile of 16.
CASES = {
    "lora_a": ([5, 9, 2], 64, 16),
    "lora_b": ([5, 9, 2], 16, 64),
    "one_token_documents": ([1, 1, 1, 1], 7, 3),
    "empty_documents": ([0, 4, 0, 0, 3, 0], 17, 33),
    "no_tokens": ([0, 0], 5, 6),
    "no_documents": ([], 5, 6),
    "no_inputs": ([2, 3], 0, 4),
    "one_by_one": ([3, 4], 1, 1),
    "rank_8": ([12, 31], 100, 8),
    "many_units": ([40, 70], 300, 150),
}


class Problem:
    """Inputs and what autograd makes of them. `before` and `after` tokens belong to no document."""

    def __init__(self, lengths, inputs, outputs, dtype, device, before=2, after=3, targets=3, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        tokens = before + sum(lengths) + after
        self.x, self.dy = draw(tokens, inputs), draw(tokens, outputs)
        self.offsets = torch.tensor([before, *lengths], device=device).cumsum(0)
        wide = torch.promote_types(dtype, torch.float32)
        self.targets, self.precondition = draw(targets, outputs, inputs).to(wide), draw(outputs, inputs).to(wide).abs()
        self.groups = torch.tensor([(7 * d) % 3 for d in range(len(lengths))], dtype=torch.int64, device=device)

    def grads(self):
        """Gradients [D, O, I] of a linear layer's weight by autograd, in float64."""
        grads = []
        for begin, end in pairwise(self.offsets.tolist()):
            weight = self.targets.new_zeros(self.targets.shape[1:], dtype=torch.float64).requires_grad_()
            y = torch.nn.functional.linear(self.x[begin:end].double(), weight)
            (y * self.dy[begin:end].double()).sum().backward()
            grads.append(weight.grad)
        return torch.stack(grads) if grads else self.targets.double().new_zeros(0, *self.targets.shape[1:])

    def truth(self, sketch_size, seed):
        raw = self.grads()
        grads = raw * self.precondition
        scores = torch.einsum("doi,aoi->da", grads, self.targets.double())
        sums = raw.new_zeros(3, *raw.shape[1:]).index_add_(0, self.groups, raw)
        with ops.backend("reference"):
            return ops.InfluenceDot(scores, sums, ops.sketch_matrix(grads, sketch_size, seed))

    def run(self, sketch_size, seed):
        return ops.influence_dot(
            *(self.x, self.dy, self.offsets, self.targets),
            precondition=self.precondition,
            groups=self.groups,
            num_groups=3,
            sketch=sketch_size,
            seed=seed,
        )


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_near(actual, expected, tolerance):
    """Compare in the norm of the whole: single entries may cancel to anything."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm()
    assert error <= tolerance * expected.norm() + 1e-30, f"off by {error / expected.norm():.1e} of the norm"


@pytest.mark.parametrize("case", CASES)
def test_reference_equals_autograd(case, device):
    problem = Problem(*CASES[case], torch.float64, device)
    for actual, expected in zip(problem.run(64, 3), problem.truth(64, 3), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_default_backend_equals_autograd(case, device):
    problem = Problem(*CASES[case], torch.float32, device)
    for actual, expected in zip(problem.run(64, 3), problem.truth(64, 3), strict=True):
        assert_near(actual, expected, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_native_equals_autograd(case, isa, dtype):
    # Half-width inputs are exact in float32, so the tolerance is float32's own.
    problem = Problem(*CASES[case], dtype, "cpu")
    for actual, expected in zip(problem.run(64, 3), problem.truth(64, 3), strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, expected, FLOAT32)


def test_native_gives_the_same_bits_with_any_number_of_threads(isa, threads):
    problem = Problem([150, 40, 90], 300, 150, torch.float32, "cpu")
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(problem.run(256, 1))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_native_sketches_more_documents_than_fit_one_pass(isa):
    # A pass holds 2^20 sketch entries per slot: 64 documents of 16384.
    problem = Problem([1] * 70, 20, 3, torch.float32, "cpu")
    size = 16384
    for actual, expected in zip(problem.run(size, 5), problem.truth(size, 5), strict=True):
        assert_near(actual, expected, FLOAT32)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_reads_strided_inputs(backend):
    if backend == "cpp" and _native.why_absent():
        pytest.skip(_native.why_absent())
    plain = Problem([6, 11], 19, 21, torch.float32, "cpu")
    strided = Problem([6, 11], 19, 21, torch.float32, "cpu")
    strided.x = torch.cat([plain.x, plain.x], 1)[:, :19]
    strided.dy = plain.dy.T.contiguous().T
    strided.targets = plain.targets.mT.contiguous().mT
    strided.precondition = plain.precondition.T.contiguous().T
    strided.offsets = torch.stack([plain.offsets, plain.offsets], 1)[:, 0]
    assert not any(t.is_contiguous() for t in (strided.x, strided.dy, strided.targets, strided.offsets))
    with ops.backend(backend):
        for actual, expected in zip(strided.run(32, 0), plain.run(32, 0), strict=True):
            assert torch.equal(actual, expected)


def test_outputs_are_given_singly(device):
    problem = Problem(*CASES["many_units"], torch.float32, device)
    x, dy, offsets = problem.x, problem.dy, problem.offsets
    raw = problem.grads()
    only_scores = ops.influence_dot(x, dy, offsets, problem.targets)
    assert only_scores.sums is None
    assert only_scores.sketch is None
    assert_near(only_scores.scores, torch.einsum("doi,aoi->da", raw, problem.targets.double()), FLOAT32)
    only_sketch = ops.influence_dot(x, dy, offsets, sketch=64, seed=2)
    assert only_sketch.scores is None
    assert_near(only_sketch.sketch, ops.sketch_matrix(raw, 64, 2), FLOAT32)


def test_one_group_sums_to_the_weight_gradient(device):
    problem = Problem(*CASES["many_units"], torch.float32, device, before=0, after=0)
    groups = torch.zeros_like(problem.groups)
    sums = ops.influence_dot(problem.x, problem.dy, problem.offsets, groups=groups, num_groups=1).sums
    assert_near(sums[0], problem.dy.double().T @ problem.x.double(), FLOAT32)


def test_buffers_are_added_to(device):
    problem = Problem(*CASES["lora_a"], torch.float32, device)
    sums = torch.ones(3, 16, 64, device=device)
    sketch = torch.full((3, 32), 2.0, device=device)
    result = ops.influence_dot(
        problem.x, problem.dy, problem.offsets, groups=problem.groups, sums=sums, sketch=sketch, seed=9
    )
    assert result.sums is sums
    assert result.sketch is sketch
    problem.precondition.fill_(1)
    fresh = problem.truth(32, 9)
    assert_near(sums, fresh.sums + 1, FLOAT32)
    assert_near(sketch, fresh.sketch + 2, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_token_scores_equal_one_token_documents(case, dtype, device):
    problem = Problem(*CASES[case], dtype, device)
    x, dy, offsets = problem.x.double(), problem.dy.double(), problem.offsets
    tokens = ops.influence_dot(
        problem.x, problem.dy, offsets, problem.targets, precondition=problem.precondition, per="token"
    ).scores
    target = problem.targets.double() * problem.precondition.double()
    expected = torch.einsum("to,aoi,ti->ta", dy, target, x)
    expected[: offsets[0]] = 0
    expected[offsets[-1] :] = 0
    assert_near(tokens, expected, 1e-12 if dtype == torch.float64 else FLOAT32)


def test_token_scores_sum_to_document_scores(device):
    problem = Problem(*CASES["many_units"], torch.float32, device)
    args = (problem.x, problem.dy, problem.offsets, problem.targets)
    tokens = ops.influence_dot(*args, per="token").scores
    documents = ops.influence_dot(*args).scores
    for d, (begin, end) in enumerate(pairwise(problem.offsets.tolist())):
        assert_near(documents[d], tokens[begin:end].double().sum(0), FLOAT32)


@pytest.mark.parametrize("per", ["document", "token"])
@pytest.mark.parametrize("case", CASES)
def test_factored_targets_equal_dense(case, per, device):
    problem = Problem(*CASES[case], torch.float64, device)
    inputs, outputs = problem.x.shape[1], problem.dy.shape[1]
    u, v = problem.x.new_empty(3, outputs, 4).normal_(), problem.x.new_empty(3, inputs, 4).normal_()
    args = (problem.x, problem.dy, problem.offsets)
    factored = ops.influence_dot(*args, (u, v), per=per, sketch=16)
    dense = ops.influence_dot(*args, u @ v.mT, per=per)
    torch.testing.assert_close(factored.scores, dense.scores, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factored.sketch, ops.sketch_matrix(problem.grads(), 16, 0), rtol=1e-10, atol=1e-10)


def test_factored_targets_in_float32(device):
    problem = Problem(*CASES["many_units"], torch.float32, device)
    u, v = torch.randn(2, 150, 4).to(device), torch.randn(2, 300, 4).to(device)
    scores = ops.influence_dot(problem.x, problem.dy, problem.offsets, (u, v)).scores
    expected = torch.einsum("doi,aoi->da", problem.grads(), u.double() @ v.double().mT)
    assert_near(scores, expected, FLOAT32)


def test_permuting_documents_permutes_scores(device):
    lengths, order = [3, 8, 1, 5], [2, 0, 3, 1]
    problem = Problem(lengths, 20, 18, torch.float32, device, before=0, after=0)
    bounds = problem.offsets.tolist()
    index = torch.cat([torch.arange(bounds[d], bounds[d + 1]) for d in order]).to(device)
    offsets = torch.tensor([0] + [lengths[d] for d in order], device=device).cumsum(0)
    scores = problem.run(32, 0).scores
    permuted = ops.influence_dot(
        problem.x[index], problem.dy[index], offsets, problem.targets, precondition=problem.precondition
    ).scores
    assert torch.equal(permuted, scores[order])


@pytest.mark.parametrize("case", CASES)
def test_document_grads_equal_autograd(case, device):
    problem = Problem(*CASES[case], torch.float64, device)
    grads = ops.document_grads(problem.x, problem.dy, problem.offsets)
    torch.testing.assert_close(grads, problem.grads(), rtol=1e-12, atol=1e-12)


def test_document_grads_of_equal_lengths(device):
    problem = Problem([6, 6, 6], 9, 11, torch.float64, device)
    grads = ops.document_grads(problem.x, problem.dy, problem.offsets)
    torch.testing.assert_close(grads, problem.grads(), rtol=1e-12, atol=1e-12)


def test_takes_no_part_in_autograd_and_ignores_autocast(device):
    problem = Problem(*CASES["many_units"], torch.float32, device)
    expected = problem.run(32, 0)
    tokens = ops.influence_dot(problem.x, problem.dy, problem.offsets, problem.targets, per="token").scores
    problem.x.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        actual = problem.run(32, 0)
        tokens_inside = ops.influence_dot(problem.x, problem.dy, problem.offsets, problem.targets, per="token").scores
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(tokens_inside, tokens)
    assert not actual.scores.requires_grad


def bad(**change):
    tokens = {"x": torch.ones(6, 4), "dy": torch.ones(6, 3), "offsets": torch.tensor([0, 2, 6])}
    return tokens | {"targets": torch.ones(2, 3, 4)} | change


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (bad(x=torch.ones(1, 6, 4)), ValueError, "Flatten batch and length first"),
        (bad(dy=torch.ones(5, 3)), ValueError, r"got \[6, 4\] and \[5, 3\]"),
        (bad(x=torch.ones(6, 4, dtype=torch.int64)), TypeError, "must be floating point"),
        (bad(x=torch.ones(6, 4, dtype=torch.float64)), TypeError, "both be float64 or neither"),
        (bad(offsets=torch.tensor([0.0, 6.0])), ValueError, "must be int64"),
        (bad(offsets=torch.tensor([0, 4, 2])), ValueError, r"must not decrease.*got \[0, 4, 2\]"),
        (bad(offsets=torch.tensor([0, 7])), ValueError, "T=6 at most"),
        (bad(offsets=torch.tensor([-1, 6])), ValueError, "from 0 at least"),
        (bad(targets=torch.ones(2, 4, 3)), ValueError, r"must be \[A, 3, 4\].*got \[2, 4, 3\]"),
        (bad(targets=(torch.ones(2, 3, 5), torch.ones(2, 4, 6))), ValueError, "as factors must be"),
        (
            bad(targets=(torch.ones(2, 3, 5), torch.ones(2, 4, 5)), precondition=torch.ones(3, 4)),
            ValueError,
            "cannot be applied to factored",
        ),
        (bad(precondition=torch.ones(4, 3)), ValueError, r"`precondition` must be \[3, 4\]"),
        (bad(groups=torch.tensor([0])), ValueError, r"`groups` must be int64 \[2\]"),
        (bad(groups=torch.tensor([0, 1])), ValueError, "needs `num_groups`"),
        (bad(groups=torch.tensor([0, 2]), num_groups=2), ValueError, "0 <= g < num_groups=2"),
        (bad(num_groups=2), ValueError, "need `groups`"),
        (bad(groups=torch.tensor([0, 1]), sums=torch.ones(2, 4, 3)), ValueError, "`sums` is added to in place"),
        (bad(targets=torch.ones(2, 3, 4, device="meta")), ValueError, "`targets` must be on the device of `x`, cpu"),
        (bad(sketch=20), ValueError, "multiple of 16"),
        (bad(sketch=torch.ones(3, 16)), ValueError, r"`sketch` is added to in place.*\[2, 16\]"),
        (bad(per="sample"), ValueError, "'document' or 'token': got 'sample'"),
    ],
)
def test_bad_input_is_a_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        ops.influence_dot(**arguments)


@pytest.mark.parametrize("full", [True, False])
def test_registered_op_passes_opcheck(full, device):
    problem = Problem([4, 6], 20, 18, torch.float32, device)
    extra = (problem.targets, problem.precondition, problem.groups) if full else (None, None, None)
    sums = torch.zeros(3, 18, 20, device=device) if full else None
    sketch = torch.zeros(2, 16, device=device)
    args = (problem.x, problem.dy, problem.offsets, *extra, sums, sketch, 0)
    torch.library.opcheck(torch.ops.fastsft.influence_dot.default, args)


def test_other_registered_ops_pass_opcheck(device):
    problem = Problem([4, 6], 20, 18, torch.float32, device)
    tokens = (problem.x, problem.dy, problem.offsets)
    u, v = torch.randn(2, 18, 3).to(device), torch.randn(2, 20, 3).to(device)
    torch.library.opcheck(torch.ops.fastsft.influence_dot_tokens.default, (*tokens, problem.targets))
    torch.library.opcheck(torch.ops.fastsft.influence_dot_factored.default, (*tokens, u, v))
    torch.library.opcheck(torch.ops.fastsft.segment_sum.default, (problem.x, problem.offsets))


def test_runs_on_fake_tensors(device):
    with torch._subclasses.FakeTensorMode():
        problem = Problem([4, 6], 20, 18, torch.float32, device)
        offsets = torch.empty(3, dtype=torch.int64, device=device)
        result = ops.influence_dot(problem.x, problem.dy, offsets, problem.targets, sketch=32)
        assert result.scores.shape == (2, 3)
        assert result.sketch.shape == (2, 32)


def test_direct_and_registered_calls_agree(device):
    problem = Problem([4, 6], 20, 18, torch.float32, device)
    args = (problem.x, problem.dy, problem.offsets, problem.targets)
    registered = torch.ops.fastsft.influence_dot(*args, None, None, None, None, 0)
    assert torch.equal(ops.influence_dot(*args).scores, registered)


def test_compiles_in_one_graph(device):
    problem = Problem([4, 6], 20, 18, torch.float32, device)
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(32, 4), problem.run(32, 4), strict=True):
        torch.testing.assert_close(actual, expected)
