#include <immintrin.h>

#include "store_topk.h"

namespace fastsft {
namespace {

constexpr int LANES = 16, SUMS = 24;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

inline Ints load_units(const void* p) { return reinterpret_cast<Ints>(_mm512_loadu_si512(p)); }

inline Ints broadcast(const void* unit) {
  int32_t bits;
  __builtin_memcpy(&bits, unit, 4);
  return reinterpret_cast<Ints>(_mm512_set1_epi32(bits));
}

// The sums of neighbours within `a`, then those within `b`. Four rounds sum 16 vectors, in their order.
template <class V>
inline V fold(V a, V b) {
  const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const auto x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b), i = reinterpret_cast<__m512i>(even);
  return reinterpret_cast<V>(_mm512_permutex2var_epi32(x, i, y)) +
         reinterpret_cast<V>(_mm512_permutex2var_epi32(x, reinterpret_cast<__m512i>(even + 1), y));
}

template <class V>
inline V totals(const V* v) {
  V half[8], quarter[4];
  for (int i = 0; i < 8; ++i) half[i] = fold(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 4; ++i) quarter[i] = fold(half[2 * i], half[2 * i + 1]);
  return fold(fold(quarter[0], quarter[1]), fold(quarter[2], quarter[3]));
}

inline unsigned passing(Floats scores, Floats above, Floats below) {
  const auto s = reinterpret_cast<__m512>(scores);
  return _mm512_cmp_ps_mask(s, reinterpret_cast<__m512>(above), _CMP_GT_OQ) |
         _mm512_cmp_ps_mask(s, reinterpret_cast<__m512>(below), _CMP_LT_OQ);
}

struct Bf16 {
  using Sum = Floats;
  static constexpr int UNIT = 2, ROW_BYTES = 64;
  static constexpr bool DIRECT = true, SCALED = false;
  static Ints row(const uint8_t* p, int64_t v) { return load_units(p + v * 64); }
  static Ints query(const uint8_t* p, int64_t v) { return load_units(p + v * 64); }
  static Sum add(Sum sum, Ints row, Ints query) {
    return reinterpret_cast<Sum>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(row),
                                                  reinterpret_cast<__m512bh>(query)));
  }
};

struct Integers {
  using Sum = Ints;
  static constexpr int UNIT = 4;
  static constexpr bool DIRECT = false, SCALED = true;
  static Ints query(const uint8_t* p, int64_t v) { return load_units(p + v * 64); }
  // Unsigned numbers of rows by signed ones of queries; does not saturate.
  static Sum add(Sum sum, Ints row, Ints query) {
    return reinterpret_cast<Sum>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(row),
                                                     reinterpret_cast<__m512i>(query)));
  }
};

struct Int8 : Integers {
  static constexpr int ROW_BYTES = 64;
  static constexpr int32_t WEIGHT = 1, OFFSET = -128;
  // v + 128, which is unsigned.
  static Ints row(const uint8_t* p, int64_t v) { return load_units(p + v * 64) ^ static_cast<int32_t>(0x80808080); }
};

struct Bits : Integers {
  static constexpr int ROW_BYTES = 8;
  static constexpr int32_t WEIGHT = -2, OFFSET = 1;
  // 1 where the number is negative. Tried: one instruction less by leaving bit j as 2^j, the query's numbers in that order. No
  // faster at K=1024, about 15 % at K=4096 (2026-11-20, one query, rough); it needs another form of rows for many queries.
  static Ints row(const uint8_t* p, int64_t v) {
    uint64_t bits;
    __builtin_memcpy(&bits, p + v * 8, 8);
    return reinterpret_cast<Ints>(_mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1)));
  }
};

}  // namespace
}  // namespace fastsft

#include "store_topk_kernel.h"
TOPK_KERNEL(TOPK_AVX512VNNI)
