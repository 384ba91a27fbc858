// What every launcher of _cuda.so shares: exported plain C functions that return a cudaError_t.
#pragma once
#include <cstdint>
#include <cuda_runtime.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
