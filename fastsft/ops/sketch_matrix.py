"""sketch_matrix: the blocked sparse JL sketch of matrices that exist, in one read of them.

`_sjlt` defines the sketch. The CPU kernel hashes on the fly: torch's index_add_ takes two to four times as long on wide
matrices, its table of places and signs ready (benchmarks/ops/bench_sketch_matrix.py).
"""

# B matrices, O outputs, I inputs, K sketch size

from typing import NamedTuple

import torch
from torch import Tensor

from fastsft import _native
from fastsft.ops import _cuda
from fastsft.ops._op import Implementation, Op, why_no_cpp
from fastsft.ops._register import register
from fastsft.ops._rules import buffer_for
from fastsft.ops._sjlt import BLOCK, check_sketch_size, sketch_by_table


class Job(NamedTuple):
    """One call. `total` and `out` are added to."""

    matrices: Tensor  # [B, O, I]
    precondition: Tensor | None  # [O, I]
    total: Tensor | None  # [O, I]
    out: Tensor  # [B, K]
    seed: int
    # The rows are rows first_row, first_row + 1, ... of larger matrices with the same columns.
    first_row: int


def sketch_matrix(
    matrices: Tensor,
    size: int,
    seed: int,
    *,
    precondition: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Sketch matrices [..., O, I] -> [..., size], float32 (float64 for float64); a flat vector is a matrix [1, n].

    The same `size` (a multiple of 16) and 32-bit `seed` make sketches of one shape comparable: inner products are kept
    in the mean, with error about 1 / sqrt(size). `_sjlt` has the rule.

    precondition [O, I]: multiplies every matrix on its way.
    total [O, I], float32 and contiguous: the sum of the matrices over their leading dimensions is added to it, not
        preconditioned; where they are per-sample gradients, that is the gradient of the weight.

    Results carry no gradient. On a CPU their bits depend neither on the number of threads nor, for each sketch, on the
    other matrices.
    """
    if matrices.ndim < 2 or not matrices.is_floating_point():
        raise ValueError(
            f"`matrices` must be floating point [..., O, I]: got {matrices.dtype} {list(matrices.shape)}. "
            f"A flat vector is a matrix of one row, vector[None]."
        )
    check_sketch_size(size)
    matrices = matrices.detach()
    shape = matrices.shape[-2:]
    if precondition is not None and (precondition.shape != shape or precondition.device != matrices.device):
        raise ValueError(
            f"`precondition` must be {list(shape)} on {matrices.device}, as `matrices` are: "
            f"got {list(precondition.shape)} on {precondition.device}."
        )
    wide = torch.promote_types(matrices.dtype, torch.float32)
    if total is not None:
        total = buffer_for("total", total, tuple(shape), matrices)
    batch = matrices.reshape(matrices.shape[:-2].numel(), *shape)
    out = matrices.new_zeros(batch.shape[0], size, dtype=wide)
    add_sketches(batch, None if precondition is None else precondition.to(wide), total, out, seed, 0)
    return out.reshape(*matrices.shape[:-2], size)


def _reference(job: Job) -> None:
    grads = job.matrices.to(job.out.dtype)
    if job.total is not None:
        job.total.add_(grads.sum(0))
    if job.precondition is not None:
        grads = grads * job.precondition
    job.out.add_(sketch_by_table(grads, job.out.shape[1], job.seed, job.first_row))


def run_cpp(job: Job) -> None:
    """Run the C++ kernel: float32 and narrower, any strides."""
    matrices = job.matrices
    if matrices.dtype not in (torch.float32, torch.bfloat16):
        matrices = matrices.float()
    if matrices.stride(2) != 1:
        matrices = matrices.contiguous()
    # Named, so that a copy made here lives until the call returns.
    precondition = None if job.precondition is None else job.precondition.contiguous()
    _native.module().sketch_matrix(
        *(matrices.data_ptr(), matrices.dtype == torch.bfloat16),
        *(*matrices.shape, *matrices.stride()[:2]),
        0 if precondition is None else precondition.data_ptr(),
        0 if job.total is None else job.total.data_ptr(),
        *(job.out.data_ptr(), job.out.shape[1], job.seed & 0xFFFFFFFF),
        *(job.first_row * -(-matrices.shape[2] // BLOCK), torch.get_num_threads()),
    )


def run_cuda(job: Job) -> None:
    """Run the CUDA kernel: float32 and narrower."""
    matrices = job.matrices
    if matrices.dtype not in (torch.float32, torch.bfloat16):
        matrices = matrices.float()
    precondition = None if job.precondition is None else job.precondition.contiguous()
    _cuda.sketch_matrix(matrices.contiguous(), precondition, job.total, job.out, job.seed, job.first_row)


_OP = Op(
    "sketch_matrix",
    _reference,
    [
        Implementation(backend="cpp", device="cpu", run=run_cpp, why_absent=why_no_cpp),
        Implementation(backend="cuda", device="cuda", run=run_cuda, why_absent=_cuda.why_no_library),
    ],
)


@register("sketch_matrix", mutates_args=("total", "out"))
def add_sketches(
    matrices: Tensor,
    precondition: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    seed: int,
    first_row: int,
) -> None:
    """Add the sketches of precondition * matrices [B, O, I] to `out` [B, K], and the matrices to `total`."""
    _OP(Job(matrices, precondition, total, out, seed, first_row), like=matrices)


@add_sketches.register_fake
def _(*_: object) -> None:
    return None
