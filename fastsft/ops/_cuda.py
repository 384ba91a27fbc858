"""The way to fastsft/_cuda.so: plain C launchers that take pointers, sizes and a stream, called through ctypes."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastsft.ops._op import why_no_cuda

ABI_VERSION = 2
LIBRARY = Path(__file__).parent.parent / "_cuda.so"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.fastsft_segment_sum.argtypes = [pointer, pointer, pointer, size, size, pointer]
    library.fastsft_sketch_matrix_workspace.argtypes = [size, size, size]
    library.fastsft_sketch_matrix_workspace.restype = size
    library.fastsft_sketch_matrix.argtypes = [
        *(pointer, flag, pointer, pointer, flag, flag, pointer, pointer),
        *(size, size, size, size, size, ctypes.c_uint32, pointer),
    ]
    library.fastsft_count_sketch_signs.argtypes = [pointer, flag, size, size, ctypes.c_uint32, pointer]
    library.fastsft_store_topk_bits.argtypes = [*(pointer,) * 8, *(size,) * 6, pointer]
    library.fastsft_cuda_error_string.restype = ctypes.c_char_p
    return library


@cache
def why_no_library() -> str | None:
    """Say why the CUDA library cannot be used, or None where it can."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built: it needs nvcc when fastsft is installed (FASTSFT_CUDA=1 insists)."
    built = _library().fastsft_cuda_abi_version()
    if built != ABI_VERSION:
        return f"{LIBRARY.name} was built with ABI {built}, and this fastsft needs {ABI_VERSION}: build it again."
    return why_no_cuda()


def _check(name: str, error: int) -> None:
    if error:
        raise RuntimeError(f"{name} failed on the device: {_library().fastsft_cuda_error_string(error).decode()}.")


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows of each segment: values [T, A], offsets [D + 1] -> [D, A]. Same bits at every call (no atomics)."""
    values = values.contiguous()
    offsets = offsets.contiguous()
    sums = torch.empty(offsets.shape[0] - 1, values.shape[1], device=values.device)
    with torch.cuda.device(values.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = _library().fastsft_segment_sum(
            values.data_ptr(), offsets.data_ptr(), sums.data_ptr(), *sums.shape, stream
        )
    _check("segment_sum", error)
    return sums


def sketch_matrix(
    matrices: Tensor,
    precondition: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    seed: int,
    first_row: int = 0,
    *,
    accumulate: bool = True,
) -> None:
    """Add the blocked SJLT of matrices [B, O, I], contiguous, float32 or bfloat16, to out [B, K] float32.

    precondition [O, I] float32 multiplies on the way; total [O, I], float32 or bfloat16, is added to (written, without
    `accumulate`): the sum of the raw matrices. Row 0 is row `first_row` of the whole matrix. Same bits at every call.
    """
    B, O, I = matrices.shape
    K = out.shape[1]
    with torch.cuda.device(matrices.device):
        size = _library().fastsft_sketch_matrix_workspace(B, O * -(-I // 16), K)
        workspace = torch.empty(size, device=matrices.device)
        stream = torch.cuda.current_stream().cuda_stream
        error = _library().fastsft_sketch_matrix(
            *(matrices.data_ptr(), matrices.dtype == torch.bfloat16, _pointer(precondition), _pointer(total)),
            *(total is not None and total.dtype == torch.bfloat16, accumulate, out.data_ptr(), workspace.data_ptr()),
            *(B, O, I, first_row, K, seed & 0xFFFFFFFF, stream),
        )
    _check("sketch_matrix", error)


def count_sketch_signs(rows: Tensor, size: int, seed: int) -> Tensor:
    """Make the matrix [I, C] by which rows [T, I] become their sketches as matrices [1, I], in the type of the rows."""
    signs = torch.empty(rows.shape[1], size, dtype=rows.dtype, device=rows.device)
    element = (torch.float32, torch.bfloat16, torch.float16).index(rows.dtype)
    with torch.cuda.device(rows.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = _library().fastsft_count_sketch_signs(
            signs.data_ptr(), element, rows.shape[1], size, seed & 0xFFFFFFFF, stream
        )
    _check("sample_grad_project", error)
    return signs


# Queries that store_topk_bits takes at once, and bytes of a row of bits: four queries fill 128 KiB of shared memory.
BITS_QUERIES, BITS_BYTES = (1, 2, 4), 4096


def store_topk_bits(
    data: Tensor,
    scales: Tensor,
    planes: Tensor,
    steps: Tensor,
    query_sums: Tensor,
    thresholds: Tensor,
    keys: Tensor,
    counts: Tensor,
    k: int,
    room: int,
    first: int,
    last: int,
) -> None:
    """Append to the candidates of triton_kernels/store_topk.py those of rows first <= n < last of bits, M = 1.

    data uint8 [N, W], W a multiple of 16, planes int8 [Q, 8, W] with Q among BITS_QUERIES, thresholds int32 [2, Q],
    keys int64 [2, Q, k + room], counts int32 [2, Q].
    """
    with torch.cuda.device(data.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = _library().fastsft_store_topk_bits(
            *(t.data_ptr() for t in (data, scales, planes, steps, query_sums, thresholds, keys, counts)),
            *(planes.shape[0], k, room, data.shape[1], first, last, stream),
        )
    _check("store_topk", error)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
