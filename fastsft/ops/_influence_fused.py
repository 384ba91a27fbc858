"""The fused pass of influence_dot: scores for dense targets, group sums and sketches of the documents' gradients."""

# T tokens, D documents, I inputs, O outputs, A targets, K sketch size

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastsft import _native
from fastsft.ops._op import Implementation, Op, why_no_cpp, why_no_triton
from fastsft.ops._register import register
from fastsft.ops._rules import check_groups, check_offsets
from fastsft.ops._sjlt import sketch_by_table


class Job(NamedTuple):
    """One call. `sums` and `sketch` are added to."""

    x: Tensor  # [T, I]
    dy: Tensor  # [T, O]
    offsets: Tensor  # [D + 1]
    targets: Tensor | None  # [A, O, I]
    precondition: Tensor | None  # [O, I]
    groups: Tensor | None  # [D]
    sums: Tensor | None  # [num_groups, O, I]
    sketch: Tensor | None  # [D, K]
    seed: int


def materialise(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """Form each document's gradient [D, O, I], in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dy = x.to(wide), dy.to(wide)
    bounds = offsets.tolist()
    lengths = {end - begin for begin, end in pairwise(bounds)}
    if len(lengths) == 1 and lengths != {0}:
        shape = (len(bounds) - 1, lengths.pop(), -1)
        inside = slice(bounds[0], bounds[-1])
        return torch.bmm(dy[inside].reshape(shape).mT, x[inside].reshape(shape))
    grads = x.new_zeros(len(bounds) - 1, dy.shape[1], x.shape[1])
    for d, (begin, end) in enumerate(pairwise(bounds)):
        torch.mm(dy[begin:end].T, x[begin:end], out=grads[d])
    return grads


def _add_sketches(job: Job, grads: Tensor) -> None:
    """Add the sketches of gradients that are preconditioned already."""
    if job.sketch is not None:
        job.sketch.add_(sketch_by_table(grads, job.sketch.shape[1], job.seed))


def _reference(job: Job) -> Tensor:
    grads = materialise(job.x, job.dy, job.offsets)  # [D, O, I]
    if job.sums is not None and job.groups is not None:
        for d, group in enumerate(job.groups.tolist()):
            job.sums[group] += grads[d]
    if job.precondition is not None:
        grads = grads * job.precondition
    _add_sketches(job, grads)
    if job.targets is None:
        return grads.new_zeros(grads.shape[0], 0)
    return grads.flatten(1) @ job.targets.flatten(1).T


def _cpp(job: Job) -> Tensor:
    x, dy = _rows_of_float(job.x), _rows_of_float(job.dy)
    # Named, so that copies made here live until the call returns.
    offsets, targets, precondition, groups = (
        t if t is None else t.contiguous() for t in (job.offsets, job.targets, job.precondition, job.groups)
    )
    scores = torch.empty(job.offsets.shape[0] - 1, 0 if targets is None else targets.shape[0])
    _native.module().influence_dot(
        *(x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16),
        *(dy.data_ptr(), dy.stride(0), dy.dtype == torch.bfloat16),
        *(x.shape[1], dy.shape[1]),
        *(_pointer(offsets), scores.shape[0]),
        *(_pointer(targets), scores.shape[1]),
        *(_pointer(precondition), _pointer(groups), _pointer(job.sums)),
        *(_pointer(job.sketch), 0 if job.sketch is None else job.sketch.shape[1], job.seed & 0xFFFFFFFF),
        *(scores.data_ptr(), torch.get_num_threads()),
    )
    return scores


def _rows_of_float(matrix: Tensor) -> Tensor:
    """Bring a matrix into what the kernel reads: float32 or bfloat16, inner stride 1, any stride between rows."""
    if matrix.dtype not in (torch.float32, torch.bfloat16):
        matrix = matrix.float()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _triton(job: Job) -> Tensor:
    from fastsft.triton_kernels import influence_dot as kernels

    if job.sketch is not None:
        _sketch_on_cuda(job, job.sketch)
    if job.targets is None and job.sums is None:
        return job.x.new_zeros(job.offsets.shape[0] - 1, 0, dtype=torch.float32)
    return kernels.influence_dot(*job[:7])


def _sketch_on_cuda(job: Job, sketch: Tensor) -> None:
    from fastsft.ops import _cuda, _project_cuda
    from fastsft.ops._project_sjlt import Job as ProjectJob

    if _cuda.why_no_library() is None:
        _project_cuda.add_sjlt(ProjectJob(job.x, job.dy, job.offsets, "sjlt", job.precondition, None, sketch, job.seed))
        return
    grads = materialise(job.x, job.dy, job.offsets)
    _add_sketches(job, grads if job.precondition is None else grads * job.precondition)


_OP = Op(
    "influence_dot",
    _reference,
    [
        Implementation(backend="cpp", device="cpu", run=_cpp, why_absent=why_no_cpp),
        Implementation(
            backend="triton",
            device="cuda",
            run=_triton,
            why_absent=why_no_triton,
            note="scores and sums; sketches as sample_grad_project, or by a table in torch where cuda was not built",
        ),
    ],
)


@register("influence_dot", mutates_args=("sums", "sketch"))
def fused(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    targets: Tensor | None,
    precondition: Tensor | None,
    groups: Tensor | None,
    sums: Tensor | None,
    sketch: Tensor | None,
    seed: int,
) -> Tensor:
    """Score documents [D, A], and add to `sums` and `sketch`."""
    check_offsets(offsets, x.shape[0])
    check_groups(groups, 0 if sums is None else sums.shape[0])
    return _OP(Job(x, dy, offsets, targets, precondition, groups, sums, sketch, seed), like=x)


@fused.register_fake
def _(x: Tensor, dy: Tensor, offsets: Tensor, targets: Tensor | None, *_: object) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(offsets.shape[0] - 1, 0 if targets is None else targets.shape[0], dtype=wide)
