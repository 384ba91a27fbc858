"""sample_grad_project on CUDA: products by torch's GEMMs, sketches by the kernel of sketch_matrix.

Products of bfloat16 are rounded to bfloat16, as autograd's weight gradients are: half the memory to write and read
again, and an error of 2^-9 in the norm where the sketch's own is 1 / sqrt(K). Other types are multiplied to float32.
"""

# T tokens, D documents, I inputs, O outputs, C numbers of a narrowed side

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastsft.ops import _cuda
from fastsft.ops._project_sides import kronecker_sides, random_signs
from fastsft.ops._project_sjlt import Job, sketch_chunks
from fastsft.ops._sjlt import derived_seed
from fastsft.ops.sketch_matrix import Job as SketchJob
from fastsft.ops.sketch_matrix import run_cuda as sketch

# Of the gradients that exist at a time: eight documents of a bfloat16 layer of width 4096.
WORKSPACE_BYTES = 256 << 20
# Fewer rows make a GEMM read x too often.
MIN_ROWS = 256

_bounds: WeakIdKeyDictionary = WeakIdKeyDictionary()


def bounds_of(offsets: Tensor) -> list[int]:
    """Read offsets [D + 1], once for all layers of a backward pass, as each reading waits for the device."""
    version, bounds = _bounds.get(offsets, (None, []))
    if version != offsets._version:
        bounds = offsets.tolist()
        _bounds[offsets] = (offsets._version, bounds)
    return bounds


def add_sjlt(job: Job) -> None:
    """Form the gradients of as many documents and rows as the workspace holds, and sketch them."""
    (D, _), O, I = job.out.shape, job.dy.shape[1], job.x.shape[1]
    if D == 0 or O == 0 or I == 0:
        return
    x, dy = _same_type(job.x, job.dy)
    kind = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    room = WORKSPACE_BYTES // kind.itemsize
    rows = max(1, min(O, max(MIN_ROWS, room // (D * I)), room // I))
    documents = max(1, min(D, room // (rows * I)))
    workspace = torch.empty(documents * rows * I, dtype=kind, device=x.device)
    sketch_chunks(job, x, dy, bounds_of(job.offsets), (rows, documents), workspace, _form, sketch)


def add_factored(job: Job, narrow: int, salts: tuple[int, int]) -> None:
    """Narrow x and dy by count-sketches, then sketch their products."""
    x, dy = (
        side
        if side.shape[1] <= narrow
        else _times(side, _cuda.count_sketch_signs(side, narrow, derived_seed(job.seed, salt)))
        for side, salt in zip((job.x, job.dy), salts, strict=True)
    )
    products = _products(x, dy, bounds_of(job.offsets))
    sketch(SketchJob(products, None, None, job.out, job.seed, 0))


def add_kronecker(job: Job, salts: tuple[int, int]) -> None:
    """Project x and dy by dense random signs; their products are the sketch."""
    k_o, k_i = kronecker_sides(job.out.shape[1], job.dy.shape[1], job.x.shape[1])
    sides = []
    for side, size, salt in zip((job.x, job.dy), (k_i, k_o), salts, strict=True):
        if side.shape[1] != size:
            signs = random_signs(side.shape[1], size, derived_seed(job.seed, salt), side.device)
            side = _times(side, signs.to(side.dtype)).mul_(size**-0.5)
        sides.append(side)
    x, dy = sides
    job.out.add_(_products(x, dy, bounds_of(job.offsets)).flatten(1))


def add_weight_grad(job: Job, weight_grad: Tensor) -> None:
    """Add the sum of all documents' gradients in one product."""
    bounds = bounds_of(job.offsets)
    x, dy = _same_type(job.x[bounds[0] : bounds[-1]], job.dy[bounds[0] : bounds[-1]])
    total = torch.empty_like(weight_grad)
    _multiply(dy.T, x, total)
    weight_grad.add_(total)


def _same_type(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return (x, dy) if x.dtype == dy.dtype else (x.float(), dy.float())


def _times(side: Tensor, signs: Tensor) -> Tensor:
    """Multiply a side [T, I] by signs [I, C]: to bfloat16 for bfloat16, else to float32."""
    if side.dtype == torch.float16:
        return torch.mm(side, signs, out_dtype=torch.float32)
    return side @ signs


def _products(x: Tensor, dy: Tensor, bounds: list[int]) -> Tensor:
    """Form narrow gradients [D, O, I], float32."""
    x, dy = _same_type(x, dy)
    grads = torch.empty(len(bounds) - 1, dy.shape[1], x.shape[1], device=x.device)
    _form(x, dy, bounds, grads)
    return grads


def _form(x: Tensor, dy: Tensor, bounds: list[int], grads: Tensor) -> None:
    """Form the gradients [D, rows, I] of the documents that `bounds` cut."""
    lengths = {end - begin for begin, end in pairwise(bounds)}
    if len(lengths) == 1 and lengths != {0}:
        inside, shape = slice(bounds[0], bounds[-1]), (len(bounds) - 1, lengths.pop())
        _multiply(dy[inside].unflatten(0, shape).mT, x[inside].unflatten(0, shape), grads)
        return
    for grad, (begin, end) in zip(grads, pairwise(bounds), strict=True):
        _multiply(dy[begin:end].T, x[begin:end], grad)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Multiply matrices, or batches of them, into `out`, in its type."""
    if a.dtype == out.dtype:
        torch.matmul(a, b, out=out)
    else:
        (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=out.dtype, out=out)
