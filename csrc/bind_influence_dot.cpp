#include "bind.h"
#include "cpu/influence_dot.h"
#include "isa.h"

namespace fastsft {
namespace {

UnitKernel unit_kernel() {
#ifdef FASTSFT_X86
  if (current_isa() >= Isa::avx512) return influence_unit_avx512;
  if (current_isa() >= Isa::avx2) return influence_unit_avx2;
#endif
  return influence_unit_base;
}

void call(uintptr_t x, int64_t x_stride, bool x_bf16, uintptr_t dy, int64_t dy_stride, bool dy_bf16, int64_t I, int64_t O,
          uintptr_t offsets, int64_t D, uintptr_t targets, int64_t A, uintptr_t precondition, uintptr_t groups, uintptr_t sums,
          uintptr_t sketch, int64_t K, uint32_t seed, uintptr_t scores, int num_threads) {
  const InfluenceJob job = {{pointer<const void>(x), x_stride, I, x_bf16},
                            {pointer<const void>(dy), dy_stride, O, dy_bf16},
                            pointer<const int64_t>(offsets),
                            D,
                            pointer<const float>(targets),
                            A,
                            pointer<const float>(precondition),
                            pointer<const int64_t>(groups),
                            pointer<float>(sums),
                            pointer<float>(sketch),
                            K,
                            seed};
  influence_dot(job, pointer<float>(scores), unit_kernel(), num_threads);
}

}  // namespace

void bind_influence_dot(pybind11::module_& m) { m.def("influence_dot", &call, Release()); }

}  // namespace fastsft
