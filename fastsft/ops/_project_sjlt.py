"""Kind "sjlt" of sample_grad_project: the sketch of whole gradients, a bounded part of which exists at a time."""

# T tokens, D documents, I inputs, O outputs, K sketch size

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastsft import _native
from fastsft.ops import _influence_fused
from fastsft.ops._sjlt import sketch_by_table
from fastsft.ops.sketch_matrix import Job as SketchJob
from fastsft.ops.sketch_matrix import run_cpp as sketch_cpp

# Floats of all gradients that exist at a time (64 MiB), and of one document's.
WORKSPACE = 1 << 24
CHUNK = 1 << 20
# A chunk has this many rows even where that is more than CHUNK: a GEMM packs all of x anew for each chunk.
MIN_ROWS = 256


class Job(NamedTuple):
    """One call. `weight_grad` and `out` are added to."""

    x: Tensor  # [T, I]
    dy: Tensor  # [T, O]
    offsets: Tensor  # [D + 1]
    kind: str
    precondition: Tensor | None  # [O, I]
    weight_grad: Tensor | None  # [O, I]
    out: Tensor  # [D, K]
    seed: int


def add_by_table(job: Job) -> None:
    """Add the sketches, a document at a time, in plain torch: the reference."""
    wide = job.out.dtype
    x, dy = job.x.to(wide), job.dy.to(wide)
    for d, (begin, end) in enumerate(pairwise(job.offsets.tolist())):
        grad = dy[begin:end].T @ x[begin:end]
        if job.weight_grad is not None:
            job.weight_grad.add_(grad)
        if job.precondition is not None:
            grad = grad * job.precondition
        job.out[d] += sketch_by_table(grad, job.out.shape[1], job.seed)


def add_cpp(job: Job) -> None:
    """Add the sketches with the compiled kernels.

    The fused pass of influence_dot forms a gradient tile by tile and sketches it from the L1. Measured on one core of
    an EPYC of family 26, 8 documents of 256 tokens, against torch.mm in chunks (MKL reaches 96 GFLOP/s there) and
    sketch_matrix: with AVX-512 0.63 of the time on [512, 512] and [1408, 512], 0.79 on [16, 2048], 0.47 on [2048, 16];
    with AVX2 1.05, 1.03, 0.96, 0.64; without either 2.2, 2.2, 1.7, 1.2. The instruction set decides, not the shape.
    """
    if _native.module().isa() == "base":
        _add_in_chunks(job)
        return
    groups = None if job.weight_grad is None else job.offsets.new_zeros(job.out.shape[0])
    sums = None if job.weight_grad is None else job.weight_grad[None]
    _influence_fused.fused(job.x, job.dy, job.offsets, None, job.precondition, groups, sums, job.out, job.seed)


def _add_in_chunks(job: Job) -> None:
    """Form the gradients of some documents and rows of the weight at a time, and sketch them."""
    (D, _), O, I = job.out.shape, job.dy.shape[1], job.x.shape[1]
    if D == 0 or O == 0 or I == 0:
        return
    x, dy = job.x.to(job.out.dtype), job.dy.to(job.out.dtype)
    # Of the shape alone: what a document's sketch rounds to must not depend on the documents beside it.
    rows = max(1, min(O, max(MIN_ROWS, CHUNK // I), WORKSPACE // I))
    documents = min(D, max(1, WORKSPACE // (rows * I)))
    workspace = x.new_empty(documents * rows * I)
    sketch_chunks(job, x, dy, job.offsets.tolist(), (rows, documents), workspace, _form, sketch_cpp)


def sketch_chunks(
    job: Job,
    x: Tensor,
    dy: Tensor,
    bounds: list[int],
    chunk: tuple[int, int],
    workspace: Tensor,
    form: Callable[[Tensor, Tensor, list[int], Tensor], None],
    sketch: Callable[[SketchJob], None],
) -> None:
    """Form and sketch `chunk` (rows of the weight, documents) of the gradients at a time, in the workspace."""
    D, O, I = job.out.shape[0], dy.shape[1], x.shape[1]
    rows, documents = chunk
    for row in range(0, O, rows):
        part = slice(row, min(O, row + rows))
        factor = None if job.precondition is None else job.precondition[part]
        total = None if job.weight_grad is None else job.weight_grad[part]
        for first in range(0, D, documents):
            near = bounds[first : first + documents + 1]
            shape = (len(near) - 1, part.stop - part.start, I)
            grads = workspace[: shape[0] * shape[1] * I].view(shape)
            form(x, dy[:, part], near, grads)
            sketch(SketchJob(grads, factor, total, job.out[first : first + documents], job.seed, row))


def _form(x: Tensor, dy: Tensor, bounds: list[int], grads: Tensor) -> None:
    """Form the gradients [D, rows, I] of the documents that `bounds` cut.

    One GEMM a document: a batched one may round by the size of the batch, and is no faster on a CPU.
    """
    for grad, (begin, end) in zip(grads, pairwise(bounds), strict=True):
        torch.mm(dy[begin:end].T, x[begin:end], out=grad)
