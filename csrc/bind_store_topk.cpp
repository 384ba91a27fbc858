#include "bind.h"
#include "cpu/store_topk.h"
#include "isa.h"

namespace fastsft {
namespace {

const TopkKernel& kernel() {
#ifdef FASTSFT_X86
  if (current_isa() >= Isa::avx512vnni) return TOPK_AVX512VNNI;
  if (current_isa() >= Isa::avx2) return TOPK_AVX2;
#endif
  return TOPK_BASE;
}

void call(int format, int64_t N, int64_t K, int64_t M, uintptr_t data, uintptr_t scales, int64_t Q, uintptr_t queries,
          uintptr_t steps, uintptr_t groups, int64_t num_groups, int64_t first_row, int64_t k, uintptr_t largest,
          uintptr_t largest_rows, uintptr_t smallest, uintptr_t smallest_rows, uintptr_t sums, int num_threads) {
  const auto row_format = static_cast<RowFormat>(format);
  const int64_t bits = row_format == RowFormat::bf16 ? 16 : row_format == RowFormat::int8 ? 8 : 1;
  const TopkJob job = {row_format,
                       N,
                       K,
                       M,
                       K * bits / 8,
                       pointer<const uint8_t>(data),
                       pointer<const float>(scales),
                       Q,
                       pointer<const uint8_t>(queries),
                       pointer<const float>(steps),
                       pointer<const int64_t>(groups),
                       num_groups,
                       first_row,
                       k};
  const TopkResult result = {pointer<float>(largest), pointer<int64_t>(largest_rows), pointer<float>(smallest),
                             pointer<int64_t>(smallest_rows), pointer<double>(sums)};
  store_topk(job, result, kernel(), num_threads);
}

}  // namespace

void bind_store_topk(pybind11::module_& m) { m.def("store_topk", &call, Release()); }

}  // namespace fastsft
