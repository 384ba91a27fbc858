#include "library.cuh"

// Raised with every change of a signature in csrc/cuda; fastsft/ops/_cuda.py compares.
EXPORT int fastsft_cuda_abi_version() { return 2; }

EXPORT const char* fastsft_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
