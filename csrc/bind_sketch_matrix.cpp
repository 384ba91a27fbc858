#include "bind.h"
#include "cpu/sketch_matrix.h"
#include "isa.h"

namespace fastsft {
namespace {

SketchKernel sketch_kernel() {
#ifdef FASTSFT_X86
  if (current_isa() >= Isa::avx512) return sketch_blocks_avx512;
  if (current_isa() >= Isa::avx2) return sketch_blocks_avx2;
#endif
  return sketch_blocks_base;
}

void call(uintptr_t matrices, bool is_bf16, int64_t B, int64_t O, int64_t I, int64_t matrix_stride, int64_t row_stride,
          uintptr_t precondition, uintptr_t total, uintptr_t out, int64_t K, uint32_t seed, int64_t first_block,
          int num_threads) {
  const SketchJob job = {pointer<const void>(matrices),
                         is_bf16,
                         B,
                         O,
                         I,
                         matrix_stride,
                         row_stride,
                         pointer<const float>(precondition),
                         pointer<float>(total),
                         pointer<float>(out),
                         K,
                         seed,
                         first_block};
  sketch_matrix(job, sketch_kernel(), num_threads);
}

}  // namespace

void bind_sketch_matrix(pybind11::module_& m) { m.def("sketch_matrix", &call, Release()); }

}  // namespace fastsft
