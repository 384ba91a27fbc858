#include <immintrin.h>

#include "store_topk.h"

namespace fastsft {
namespace {

constexpr int LANES = 8, SUMS = 12;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

inline Ints load_units(const void* p) { return reinterpret_cast<Ints>(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }

inline Ints broadcast(const void* unit) {
  int32_t bits;
  __builtin_memcpy(&bits, unit, 4);
  return reinterpret_cast<Ints>(_mm256_set1_epi32(bits));
}

inline Floats fold(Floats a, Floats b) {
  return reinterpret_cast<Floats>(_mm256_hadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}

inline Ints fold(Ints a, Ints b) {
  return reinterpret_cast<Ints>(_mm256_hadd_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

// hadd works within halves of 128 bits: two rounds leave the totals of the lower halves and those of the upper.
template <class V>
inline V totals(const V* v) {
  const auto a = reinterpret_cast<__m256i>(fold(fold(v[0], v[1]), fold(v[2], v[3])));
  const auto b = reinterpret_cast<__m256i>(fold(fold(v[4], v[5]), fold(v[6], v[7])));
  return reinterpret_cast<V>(_mm256_permute2x128_si256(a, b, 0x20)) +
         reinterpret_cast<V>(_mm256_permute2x128_si256(a, b, 0x31));
}

inline unsigned passing(Floats scores, Floats above, Floats below) {
  const auto s = reinterpret_cast<__m256>(scores);
  const __m256 over = _mm256_cmp_ps(s, reinterpret_cast<__m256>(above), _CMP_GT_OQ);
  const __m256 under = _mm256_cmp_ps(s, reinterpret_cast<__m256>(below), _CMP_LT_OQ);
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_or_ps(over, under)));
}

inline __m128i load_half(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

struct Bf16 {
  using Sum = Floats;
  static constexpr int UNIT = 1, ROW_BYTES = 16;
  static constexpr bool DIRECT = false, SCALED = false;
  static Ints row(const uint8_t* p, int64_t v) {
    return reinterpret_cast<Ints>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p + v * 16)), 16));
  }
  static Ints query(const uint8_t* p, int64_t v) { return row(p, v); }
  static Sum add(Sum sum, Ints row, Ints query) {
    return reinterpret_cast<Sum>(_mm256_fmadd_ps(reinterpret_cast<__m256>(row), reinterpret_cast<__m256>(query),
                                                 reinterpret_cast<__m256>(sum)));
  }
};

// As 16-bit integers: the sum of two products of bytes (vpmaddubsw) would saturate at 16 bits.
struct Integers {
  using Sum = Ints;
  static constexpr int UNIT = 2;
  static constexpr bool DIRECT = false, SCALED = true;
  static constexpr int32_t WEIGHT = 1, OFFSET = 0;
  static Ints query(const uint8_t* p, int64_t v) {
    return reinterpret_cast<Ints>(_mm256_cvtepi8_epi16(load_half(p + v * 16)));
  }
  static Sum add(Sum sum, Ints row, Ints query) {
    return sum + reinterpret_cast<Sum>(_mm256_madd_epi16(reinterpret_cast<__m256i>(row), reinterpret_cast<__m256i>(query)));
  }
};

struct Int8 : Integers {
  static constexpr int ROW_BYTES = 16;
  static Ints row(const uint8_t* p, int64_t v) { return query(p, v); }
};

struct Bits : Integers {
  static constexpr int ROW_BYTES = 2;
  // -1 where the bit is set, else 1.
  static Ints row(const uint8_t* p, int64_t v) {
    int16_t bits;
    __builtin_memcpy(&bits, p + v * 2, 2);
    const __m256i places = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m256i is_set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(bits), places), places);
    return reinterpret_cast<Ints>(_mm256_or_si256(is_set, _mm256_set1_epi16(1)));
  }
};

}  // namespace
}  // namespace fastsft

#include "store_topk_kernel.h"
TOPK_KERNEL(TOPK_AVX2)
