"""The way to fastsft/_cuda.so: plain C launchers that take pointers, sizes and a stream, called through ctypes."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastsft.ops._op import why_no_cuda

ABI_VERSION = 1
LIBRARY = Path(__file__).parent.parent / "_cuda.so"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.fastsft_segment_sum.argtypes = [pointer, pointer, pointer, size, size, pointer]
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
    if error:
        raise RuntimeError(f"segment_sum failed on the device: {_library().fastsft_cuda_error_string(error).decode()}.")
    return sums
