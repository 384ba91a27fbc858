"""fastsft/ops/sample_grad_project.py against sketches of autograd's gradients, document by document, in float64."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsft import ops
from fastsft.ops import _cuda, _project_cuda, _project_sides, _project_sjlt
from fastsft.ops._sjlt import derived_seed
from fastsft.ops.sketch_matrix import run_cpp

KINDS = ("sjlt", "factored", "kronecker")
# Sums of T products round to about sqrt(T) * 6e-8 of their norm; T < 1000 here.
FLOAT32 = 1e-5
SIZE = 64

# (document lengths, inputs, outputs): tails in both directions, thin sides, sides above the 256 that factored leaves.
CASES = {
    "lora_a": ([5, 9, 2], 80, 16),
    "lora_b": ([5, 9, 2], 16, 80),
    "one_wide": ([3, 1, 4], 100, 1),
    "one_high": ([3, 1, 4], 1, 100),
    "one_token_documents": ([1, 1, 1, 1], 17, 13),
    "empty_documents": ([0, 4, 0, 0, 3, 0], 17, 33),
    "no_tokens": ([0, 0], 15, 16),
    "no_documents": ([], 15, 16),
    "wide_inputs": ([7, 30], 300, 20),
    "wide_outputs": ([30, 7], 20, 300),
    "wide": ([11, 12, 40], 300, 270),
    "even": ([6, 6, 6], 37, 50),
}
EMPTY = {"no_inputs": ([2, 3], 0, 4), "no_outputs": ([2, 3], 4, 0)}


class Problem:
    """Inputs and what autograd makes of them. `before` and `after` tokens belong to no document."""

    def __init__(self, lengths, inputs, outputs, dtype=torch.float32, device="cpu", before=2, after=3, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        tokens = before + sum(lengths) + after
        self.x, self.dy = draw(tokens, inputs), draw(tokens, outputs)
        self.offsets = torch.tensor([before, *lengths], device=device).cumsum(0)
        self.precondition = draw(outputs, inputs).abs()

    def grads(self):
        """Gradients [D, O, I] of a linear layer's weight by autograd, in float64."""
        grads = []
        for begin, end in pairwise(self.offsets.tolist()):
            weight = self.precondition.new_zeros(self.precondition.shape, dtype=torch.float64).requires_grad_()
            y = torch.nn.functional.linear(self.x[begin:end].double(), weight)
            (y * self.dy[begin:end].double()).sum().backward()
            grads.append(weight.grad)
        return torch.stack(grads) if grads else self.precondition.double().new_zeros(0, *self.precondition.shape)

    def run(self, kind="sjlt", size=SIZE, **options):
        return ops.sample_grad_project(self.x, self.dy, self.offsets, size, kind=kind, **options)


def sketch(grads, size, seed):
    """Sketch gradients [D, O, I] entry by entry."""
    index, sign = ops.sjlt_table(tuple(grads.shape[1:]), size, seed)
    flat = grads.cpu().flatten(1)
    return torch.zeros(flat.shape[0], size, dtype=torch.float64).index_add_(1, index, flat * sign)


def count_sketch(width, seed):
    """Return the matrix [256, width] of a count-sketch, or the identity where it is not needed."""
    if width <= 256:
        return torch.eye(width, dtype=torch.float64)
    index, sign = ops.sjlt_table((1, width), 256, seed)
    matrix = torch.zeros(256, width, dtype=torch.float64)
    matrix[index, torch.arange(width)] = sign.double()
    return matrix


def mix(v):
    v ^= v >> 16
    v = v * 0x7FEB352D % 2**32
    v ^= v >> 15
    v = v * 0x846CA68B % 2**32
    return v ^ (v >> 16)


def sign(i, c, seed):
    word = mix((mix(i ^ seed) + 0x9E3779B9 * (c // 32 + 1)) % 2**32)
    return -1.0 if word >> (c % 32) & 1 else 1.0


def dense(width, size, seed):
    """Return the matrix [size, width] of random signs / sqrt(size), or the identity where it is square."""
    if width == size:
        return torch.eye(width, dtype=torch.float64)
    entries = [[sign(i, c, seed) for i in range(width)] for c in range(size)]
    return torch.tensor(entries, dtype=torch.float64) / size**0.5


def truth(grads, kind, size, seed):
    """What each kind makes of gradients [D, O, I], by whole matrices in float64."""
    grads, (O, I) = grads.cpu(), grads.shape[1:]
    if kind == "sjlt":
        return sketch(grads, size, seed)
    if kind == "factored":
        left, right = count_sketch(O, derived_seed(seed, 2)), count_sketch(I, derived_seed(seed, 1))
        return sketch(left @ grads @ right.T, size, seed)
    k_o, k_i = _project_sides.kronecker_sides(size, O, I)
    left, right = dense(O, k_o, derived_seed(seed, 4)), dense(I, k_i, derived_seed(seed, 3))
    return (left @ grads @ right.T).flatten(1)


def size_of(case):
    """A size that every kind can make of the case."""
    _, inputs, outputs = CASES[case]
    return SIZE if inputs * outputs > 100 else 16


def assert_near(actual, expected, tolerance=FLOAT32):
    """Compare in the norm of the whole: single entries may cancel to anything."""
    assert actual.shape == expected.shape
    actual, expected = actual.double().cpu(), expected.double().cpu()
    error = (actual - expected).norm()
    assert error <= tolerance * expected.norm() + 1e-30, f"off by {error / expected.norm():.1e} of the norm"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_chunks(monkeypatch):
    """Bounds that cut small shapes into several chunks of rows and groups of documents."""
    monkeypatch.setattr(_project_sjlt, "WORKSPACE", 4096)
    monkeypatch.setattr(_project_sjlt, "CHUNK", 1024)
    monkeypatch.setattr(_project_cuda, "WORKSPACE_BYTES", 16384)
    monkeypatch.setattr(_project_cuda, "MIN_ROWS", 5)
    monkeypatch.setattr(_project_sjlt, "MIN_ROWS", 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_autograd(case, kind, device):
    problem = Problem(*CASES[case], torch.float64, device)
    weight_grad = torch.zeros_like(problem.precondition)
    actual = problem.run(kind, size_of(case), seed=3, weight_grad=weight_grad)
    torch.testing.assert_close(actual.cpu(), truth(problem.grads(), kind, size_of(case), 3), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weight_grad, problem.grads().sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_default_backend_equals_autograd(case, kind, device):
    problem = Problem(*CASES[case], torch.float32, device)
    weight_grad = torch.ones_like(problem.precondition)
    actual = problem.run(kind, size_of(case), seed=2**32 - 5, weight_grad=weight_grad)
    assert actual.dtype == torch.float32
    assert_near(actual, truth(problem.grads(), kind, size_of(case), 2**32 - 5))
    assert_near(weight_grad, 1 + problem.grads().sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_default_backend_takes_half_widths(kind, dtype, device):
    # Products are exact in float32, so the tolerance is float32's own; on CUDA those of bfloat16 are rounded to it.
    tolerance = 2**-7 if device.type == "cuda" and dtype == torch.bfloat16 else FLOAT32
    for case in ("wide", "even"):
        problem = Problem(*CASES[case], dtype, device)
        weight_grad = torch.zeros(problem.precondition.shape, device=device)
        actual = problem.run(kind, weight_grad=weight_grad)
        assert_near(actual, truth(problem.grads(), kind, SIZE, 0), tolerance)
        assert_near(weight_grad, problem.grads().sum(0), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES | EMPTY)
def test_native_sjlt_equals_autograd(case, isa, dtype):
    problem = Problem(*(CASES | EMPTY)[case], dtype)
    weight_grad = torch.ones(problem.precondition.shape)
    actual = problem.run(seed=3, precondition=problem.precondition, weight_grad=weight_grad)
    assert_near(actual, sketch(problem.grads() * problem.precondition.double(), SIZE, 3))
    assert_near(weight_grad, 1 + problem.grads().sum(0))
    assert_near(problem.run(seed=3), sketch(problem.grads(), SIZE, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_native_factored_equals_autograd(case, isa, dtype):
    problem = Problem(*CASES[case], dtype)
    assert_near(problem.run("factored", seed=1), truth(problem.grads(), "factored", SIZE, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_chunks_equal_autograd(case, small_chunks, dtype, device):
    problem = Problem(*CASES[case], dtype, device)
    weight_grad = torch.ones(problem.precondition.shape, device=device)
    out = torch.zeros(problem.offsets.shape[0] - 1, SIZE, device=device)
    factor = problem.precondition.float()
    job = _project_sjlt.Job(problem.x, problem.dy, problem.offsets, "sjlt", factor, weight_grad, out, 3)
    if device.type == "cuda":
        _project_cuda.add_sjlt(job)
    else:
        _project_sjlt._add_in_chunks(job)
    # On CUDA products of bfloat16 are rounded to it: 2^-9 of each, so of the norm.
    tolerance = 2**-8 if device.type == "cuda" and dtype == torch.bfloat16 else FLOAT32
    assert_near(out, sketch(problem.grads() * factor.double(), SIZE, 3), tolerance)
    assert_near(weight_grad, 1 + problem.grads().sum(0), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["wide", "even", "empty_documents"])
def test_chunks_of_cuda_equal_autograd_with_the_sketch_of_the_cpu(case, dtype, small_chunks, monkeypatch):
    # All but the kernel runs anywhere.
    monkeypatch.setattr(_project_cuda, "sketch", run_cpp)
    problem = Problem(*CASES[case], dtype)
    weight_grad, out = torch.zeros(problem.precondition.shape), torch.zeros(problem.offsets.shape[0] - 1, SIZE)
    factor = problem.precondition.float()
    _project_cuda.add_sjlt(
        _project_sjlt.Job(problem.x, problem.dy, problem.offsets, "sjlt", factor, weight_grad, out, 3)
    )
    tolerance = 2**-8 if dtype == torch.bfloat16 else FLOAT32
    assert_near(out, sketch(problem.grads() * factor.double(), SIZE, 3), tolerance)
    assert_near(weight_grad, problem.grads().sum(0), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_count_sketches_on_cuda_are_products_with_their_signs(dtype):
    if _cuda.why_no_library():
        pytest.skip(_cuda.why_no_library())
    rows = torch.randn(9, 300, device="cuda", dtype=dtype)
    by_gemm = rows.double() @ _cuda.count_sketch_signs(rows, 256, 5).double()
    assert_near(by_gemm, _project_sides.count_sketch_by_table(rows.double(), 256, 5))


def test_a_weight_gradient_in_bfloat16_on_cuda(device):
    problem = Problem(*CASES["wide"], torch.bfloat16, device)
    total = torch.zeros(problem.precondition.shape, dtype=torch.bfloat16, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"`weight_grad` is added to in place.*torch\.float32"):
            problem.run(weight_grad=total)
        return
    problem.run(weight_grad=total)
    assert_near(total, problem.grads().sum(0), 2**-7)  # rounded as a document's gradient, and as a sum


def test_offsets_are_read_once_and_again_when_they_change():
    offsets = torch.tensor([0, 2, 5])
    assert _project_cuda.bounds_of(offsets) is _project_cuda.bounds_of(offsets)
    offsets[1] = 3
    assert _project_cuda.bounds_of(offsets) == [0, 3, 5]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that torch made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_chunks_stay_within_the_workspace(small_chunks):
    problem = Problem([3] * 20, 40, 50)  # gradients of 40000 numbers
    job = _project_sjlt.Job(*(problem.x, problem.dy, problem.offsets), "sjlt", None, None, torch.zeros(20, SIZE), 3)
    with Largest() as largest:
        _project_sjlt._add_in_chunks(job)
    assert 2048 < largest.elements <= 4096
    assert_near(job.out, sketch(problem.grads(), SIZE, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_out_and_weight_grad_are_added_to_and_returned(kind, dtype, device):
    problem = Problem(*CASES["wide"], dtype, device)
    out = torch.full((3, SIZE), 2.0, dtype=dtype, device=device)
    weight_grad = torch.full((270, 300), 5.0, dtype=dtype, device=device)
    # The size is that of `out`.
    result = ops.sample_grad_project(
        problem.x, problem.dy, problem.offsets, kind=kind, out=out, weight_grad=weight_grad, seed=9
    )
    assert result is out
    assert_near(out, truth(problem.grads(), kind, SIZE, 9) + 2)
    assert_near(weight_grad, problem.grads().sum(0) + 5)


def test_reference_preconditions(device):
    problem = Problem(*CASES["empty_documents"], torch.float64, device)
    actual, expected = problem.run(precondition=problem.precondition), problem.grads() * problem.precondition
    torch.testing.assert_close(actual.cpu(), sketch(expected, SIZE, 0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_strided_inputs(kind, device):
    plain, strided = Problem([6, 11], 300, 21, device=device), Problem([6, 11], 300, 21, device=device)
    strided.x = torch.cat([plain.x, plain.x], 1)[:, :300]
    strided.dy = plain.dy.T.contiguous().T
    strided.offsets = torch.stack([plain.offsets, plain.offsets], 1)[:, 0]
    options = {}
    if kind == "sjlt":
        options["precondition"] = plain.precondition.T.contiguous().T
    expected = plain.run(kind, precondition=plain.precondition if options else None)
    # Not the same bits: a GEMM may add up in another order.
    assert_near(strided.run(kind, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_inner_products_in_the_mean(kind):
    # Wide enough that factored narrows both sides, correlated enough that the inner product counts.
    problem = Problem([2, 3], 272, 260)
    problem.x += 0.5 * torch.randn(272)
    problem.dy += 0.5 * torch.randn(260)
    a, b = problem.grads()
    dots = torch.tensor([(s[0] @ s[1]).item() for s in (problem.run(kind, seed=seed) for seed in range(300))])
    deviation = dots.std() / 300**0.5
    assert (dots.mean() - (a * b).sum()).abs() < 4 * deviation
    # A test of the mean says something only where the mean stands out.
    assert (a * b).sum() > 8 * deviation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 512), (512, 16), (100, 37)])
def test_weights_of_every_shape_weigh_alike(kind, shape):
    problem = Problem([20], shape[1], shape[0])
    true = problem.grads().square().sum()
    norms = torch.tensor([problem.run(kind, 256, seed=seed).square().sum() / true for seed in range(200)])
    assert (norms.mean() - 1).abs() < 4 * norms.std() / 200**0.5
    assert norms.std() < 0.5


@pytest.mark.parametrize("tokens", [1, 3, 30])
@pytest.mark.parametrize("size", [256, 1024])
def test_sjlt_errs_by_one_over_the_root_of_its_size_whatever_the_rank(tokens, size):
    # One token makes a gradient of rank one.
    problem = Problem([tokens] * 30, 120, 70)
    problem.x += 0.3 * torch.randn(120)
    exact = torch.nn.functional.normalize(problem.grads().flatten(1))
    off = ~torch.eye(30, dtype=torch.bool)
    errors = []
    for seed in range(8):
        sketches = torch.nn.functional.normalize(problem.run(size=size, seed=seed).double())
        errors.append((sketches @ sketches.T - exact @ exact.T)[off])
    root = torch.cat(errors).square().mean().sqrt() * size**0.5
    # Cosines nearer to one err less.
    assert 0.7 < root < 1.15


def test_native_gives_the_same_bits_with_any_number_of_threads(isa, threads):
    problem = Problem([150, 40, 90], 300, 270)
    for kind in ("sjlt", "factored"):
        results = []
        for number in (1, 2, 3):
            threads(number)
            weight_grad = torch.zeros(270, 300) if kind == "sjlt" else None
            results.append((problem.run(kind, 256, weight_grad=weight_grad), weight_grad))
        for result, weight_grad in results[1:]:
            if isa == "base":  # torch's GEMM, which promises no order of its sums
                assert_near(result, results[0][0], 1e-6)
            else:
                assert torch.equal(result, results[0][0])
                assert weight_grad is None or torch.equal(weight_grad, results[0][1])


@pytest.mark.parametrize("kind", ["sjlt", "factored"])
def test_native_gives_each_document_the_same_bits_in_any_company(isa, kind):
    lengths, order = [3, 8, 1, 5], [2, 0, 3, 1]
    problem = Problem(lengths, 300, 18, before=0, after=0)
    together = problem.run(kind)
    bounds = problem.offsets.tolist()
    index = torch.cat([torch.arange(bounds[d], bounds[d + 1]) for d in order])
    other = Problem([lengths[d] for d in order], 300, 18, before=0, after=0)
    other.x, other.dy = problem.x[index], problem.dy[index]
    alone = Problem([lengths[1]], 300, 18, before=0, after=0)
    alone.x, alone.dy = problem.x[3:11], problem.dy[3:11]
    if isa == "base":  # torch's GEMM, which may add up by where the operands lie in memory
        assert_near(other.run(kind), together[order], 1e-6)
        assert_near(alone.run(kind)[0], together[1], 1e-6)
    else:
        assert torch.equal(other.run(kind), together[order])
        assert torch.equal(alone.run(kind)[0], together[1])


def test_sjlt_is_the_sketch_of_influence_dot(device):
    problem = Problem(*CASES["even"], device=device)
    tokens = (problem.x, problem.dy, problem.offsets)
    other = ops.influence_dot(*tokens, precondition=problem.precondition, sketch=SIZE, seed=6).sketch
    assert_near(problem.run(seed=6, precondition=problem.precondition), other)


def test_factored_is_sjlt_where_no_side_is_wide(device):
    problem = Problem([4, 7], 256, 100, device=device)
    assert_near(problem.run("factored", seed=8), problem.run("sjlt", seed=8), 1e-6)


def test_random_signs_are_their_definition_and_balanced():
    signs = _project_sides.random_signs(50, 70, 2**31 + 9)
    assert signs.tolist() == [[sign(i, c, 2**31 + 9) for c in range(70)] for i in range(50)]
    # A narrower side is a part of a wider one, and a smaller size of a larger.
    assert torch.equal(_project_sides.random_signs(20, 30, 2**31 + 9), signs[:20, :30])
    many = _project_sides.random_signs(1024, 64, 1)
    assert many.mean().abs() < 4 / (1024 * 64) ** 0.5
    products = (many.T @ many / 1024**0.5)[~torch.eye(64, dtype=torch.bool)]
    assert 0.9 < products.std() < 1.1
    assert products.abs().max() < 6


@pytest.mark.parametrize(
    ("size", "outputs", "inputs", "sides"),
    [
        (4096, 512, 512, (64, 64)),
        (2048, 512, 512, (32, 64)),
        (4096, 16, 2048, (16, 256)),
        (4096, 2048, 16, (256, 16)),
        (4096, 12, 2048, (8, 512)),
        (4096, 64, 64, (64, 64)),
        (4096, 1, 5000, (1, 4096)),
        (1, 3, 3, (1, 1)),
    ],
)
def test_kronecker_sides(size, outputs, inputs, sides):
    assert _project_sides.kronecker_sides(size, outputs, inputs) == sides


def test_carries_no_gradient_and_ignores_autocast(device):
    for kind in KINDS:
        problem = Problem(*CASES["wide"], device=device)
        expected = problem.run(kind)
        problem.x.requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            actual = problem.run(kind)
        assert not actual.requires_grad
        assert_near(actual, expected, 1e-6)


def bad(**change):
    tokens = {"x": torch.ones(6, 40), "dy": torch.ones(6, 30), "offsets": torch.tensor([0, 2, 6]), "size": 32}
    return tokens | change


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (bad(x=torch.ones(1, 6, 40)), ValueError, "Flatten batch and length first"),
        (bad(dy=torch.ones(6, 30).double()), TypeError, "both be float64 or neither"),
        (bad(offsets=torch.tensor([0, 7])), ValueError, "T=6 at most"),
        (bad(offsets=torch.tensor([0, 4, 2])), ValueError, "must not decrease"),
        (bad(kind="srht"), ValueError, "must be one of sjlt, factored, kronecker: got 'srht'"),
        (bad(size=20), ValueError, "multiple of 16"),
        (bad(size=20, kind="factored"), ValueError, "multiple of 16"),
        (bad(size=48, kind="kronecker"), ValueError, "power of two: got K=48"),
        (bad(size=0, kind="kronecker"), ValueError, "power of two: got K=0"),
        (bad(size=1024, kind="kronecker"), ValueError, r"K=1024 numbers of a weight \[30, 40\]: 16 x 32 is the most"),
        (bad(x=torch.ones(6, 0), kind="kronecker"), ValueError, "16 x 0 is the most"),
        (bad(precondition=torch.ones(40, 30)), ValueError, r"`precondition` must be \[30, 40\]"),
        (bad(precondition=torch.ones(30, 40), kind="factored"), ValueError, "use kind='sjlt'"),
        (bad(precondition=torch.ones(30, 40), kind="kronecker"), ValueError, "use kind='sjlt'"),
        (bad(precondition=torch.ones(30, 40, device="meta")), ValueError, "on the device of `x`"),
        (bad(out=torch.ones(3, 32)), ValueError, r"`out` is added to in place.*\[2, 32\]"),
        (bad(out=torch.ones(2, 32).double()), ValueError, "`out` is added to in place"),
        (bad(weight_grad=torch.ones(40, 30)), ValueError, r"`weight_grad` is added to in place.*\[30, 40\]"),
        (bad(weight_grad=torch.ones(40, 30).T), ValueError, "`weight_grad` is added to in place"),
    ],
)
def test_bad_input_is_a_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        ops.sample_grad_project(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_registered_op_passes_opcheck(kind, device):
    problem = Problem([4, 6], 300, 18, device=device)
    weight_grad, out = torch.zeros(18, 300, device=device), torch.zeros(2, SIZE, device=device)
    factor = problem.precondition if kind == "sjlt" else None
    args = (problem.x, problem.dy, problem.offsets, kind, factor, weight_grad, out, 0)
    torch.library.opcheck(torch.ops.fastsft.sample_grad_project.default, args)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind, device):
    problem = Problem([4, 6], 300, 18, device=device)

    def run():
        weight_grad = torch.zeros(18, 300, device=device)
        return problem.run(kind, weight_grad=weight_grad, seed=4), weight_grad

    for actual, expected in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(), run(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_each_backend_runs_by_name_or_says_why(device):
    problem = Problem(*CASES["even"], device=device)
    fast = {"cpu": "cpp", "cuda": "cuda"}[device.type]
    expected = sketch(problem.grads(), SIZE, 0)
    for backend in ("reference", fast):
        with ops.backend(backend):
            assert_near(problem.run(), expected)
    with ops.backend("triton"), pytest.raises(RuntimeError, match="there is none"):
        problem.run()
