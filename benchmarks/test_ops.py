"""One case an operator for pytest-benchmark: `pytest benchmarks --benchmark-only`. The races are in benchmarks/ops/.

Each runs as the machine would choose; `-k reference` races the plain torch that defines the answer.
"""

import time

import pytest
import torch

from fastsft import ops

pytestmark = pytest.mark.benchmark(timer=time.process_time, min_rounds=5, max_time=0.5, warmup=True)

TOKENS, DOCUMENTS, INPUTS, OUTPUTS, SIZE = 2048, 8, 512, 16, 4096
BACKENDS = ["chosen", "reference"]


@pytest.fixture(params=BACKENDS)
def run(request, benchmark):
    """Time a call on the backend that is chosen here, or on the reference."""

    def timed(call):
        if request.param == "chosen":
            return benchmark(call)
        with ops.backend("reference"):
            return benchmark(call)

    return timed


@pytest.fixture
def layer():
    """x [T, I], dy [T, O] and the offsets of 8 documents."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(TOKENS, width, generator=generator) for width in (INPUTS, OUTPUTS))
    return x, dy, torch.arange(DOCUMENTS + 1) * (TOKENS // DOCUMENTS)


def test_influence_dot(run, layer):
    targets = torch.randn(3, OUTPUTS, INPUTS)
    assert run(lambda: ops.influence_dot(*layer, targets)).scores.shape == (DOCUMENTS, 3)


def test_sketch_matrix(run):
    matrices = torch.randn(4, 1, 2**18)
    assert run(lambda: ops.sketch_matrix(matrices, SIZE, 0)).shape == (4, SIZE)


def test_sample_grad_project(run, layer):
    assert run(lambda: ops.sample_grad_project(*layer, SIZE)).shape == (DOCUMENTS, SIZE)


@pytest.mark.parametrize("format", ops.FORMATS)
def test_store_topk(run, format):
    rows, queries = ops.encode_rows(torch.randn(8192, 1024), format), torch.randn(4, 1024)
    assert run(lambda: ops.store_topk(queries, rows, 10)).largest.shape == (4, 10)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_gated_adapter(run, per):
    """Forward and backward of a frozen layer with 8 experts of rank 16, [512, 512]."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, a, b = draw(TOKENS, INPUTS), draw(8 * 16 + 8, INPUTS), draw(INPUTS, 8 * 16)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    base = torch.nn.Linear(INPUTS, INPUTS, bias=False).requires_grad_(False)
    prompt = torch.ones(DOCUMENTS, TOKENS // DOCUMENTS, dtype=torch.bool)
    sequences = ops.Sequences.of_rows(prompt) if per == "sequence" else None

    def step():
        y = ops.gated_adapter(x, a, b, num_experts=8, rank=16, base=base, per=per, sequences=sequences)
        return torch.autograd.grad(y.sum(), leaves)

    run(step)
