// The instruction sets that kernels are compiled for, and the one in use: the best that this machine runs, or one asked for.
#pragma once

namespace fastsft {

// In order: what a machine runs includes what stands before. A kernel without code of its own for a set uses the one before.
enum class Isa { base, avx2, avx512, avx512vnni };

Isa current_isa();

}  // namespace fastsft
