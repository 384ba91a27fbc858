"""The kinds of sample_grad_project, put together from parts, and which parts each backend runs."""

# T tokens, I inputs, O outputs, C numbers of a narrowed side

from collections.abc import Callable

from torch import Tensor

from fastsft.ops import _project_cuda as cuda
from fastsft.ops import _project_sides as sides
from fastsft.ops import _project_sjlt as sjlt
from fastsft.ops._influence_fused import materialise
from fastsft.ops._project_sjlt import Job
from fastsft.ops._sjlt import derived_seed

# Where kind "factored" leaves a side as it is.
NARROW = 256
# Salts of the seeds of the sides, by kind; the sketch of a product has the seed itself.
_FACTORED_X, _FACTORED_DY, KRONECKER_X, KRONECKER_DY = 1, 2, 3, 4

AddSjlt = Callable[[Job], None]
CountSketch = Callable[[Tensor, int, int], Tensor]


def run_reference(job: Job) -> None:
    """Add to the job's buffers, in plain torch."""
    _run(job, sjlt.add_by_table, sides.count_sketch_by_table)


def run_cpp(job: Job) -> None:
    """Add to the job's buffers, with the compiled kernels."""
    _run(job, sjlt.add_cpp, sides.count_sketch_cpp)


def run_cuda(job: Job) -> None:
    """Add to the job's buffers, with GEMMs and the CUDA kernel of sketch_matrix."""
    if job.kind == "sjlt":
        cuda.add_sjlt(job)
        return
    if job.weight_grad is not None:
        cuda.add_weight_grad(job, job.weight_grad)
    if job.kind == "factored":
        cuda.add_factored(job, NARROW, (_FACTORED_X, _FACTORED_DY))
    else:
        cuda.add_kronecker(job, (KRONECKER_X, KRONECKER_DY))


def _run(job: Job, add_sjlt: AddSjlt, count_sketch: CountSketch) -> None:
    if job.kind == "sjlt":
        add_sjlt(job)
        return
    if job.weight_grad is not None:
        _add_weight_grad(job, job.weight_grad)
    if job.kind == "factored":
        add_sjlt(_narrowed(job, count_sketch))
    else:
        _add_kronecker(job)


def _add_weight_grad(job: Job, weight_grad: Tensor) -> None:
    """Add the sum of all documents' gradients in one product."""
    begin, end = job.offsets[[0, -1]].tolist()
    wide = weight_grad.dtype
    weight_grad.add_(job.dy[begin:end].to(wide).T @ job.x[begin:end].to(wide))


def _narrowed(job: Job, count_sketch: CountSketch) -> Job:
    """Count-sketch the sides that are wider than 256: what remains is a small layer's job of kind "sjlt"."""
    x, dy = (
        rows if rows.shape[1] <= NARROW else count_sketch(rows, NARROW, derived_seed(job.seed, salt))
        for rows, salt in ((job.x, _FACTORED_X), (job.dy, _FACTORED_DY))
    )
    return job._replace(x=x.to(job.out.dtype), dy=dy.to(job.out.dtype), weight_grad=None)


def _add_kronecker(job: Job) -> None:
    k_o, k_i = sides.kronecker_sides(job.out.shape[1], job.dy.shape[1], job.x.shape[1])
    x = sides.project_side(job.x, k_i, derived_seed(job.seed, KRONECKER_X))
    dy = sides.project_side(job.dy, k_o, derived_seed(job.seed, KRONECKER_DY))
    job.out.add_(materialise(x, dy, job.offsets).flatten(1))
