#include "store_topk.h"

namespace fastsft {
namespace {

constexpr int LANES = 4, SUMS = 12;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Units __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));
typedef int8_t Bytes __attribute__((vector_size(8)));

template <class V>
inline V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

inline Ints load_units(const void* p) { return load_as<Ints>(p); }
inline Ints broadcast(const void* unit) { return Ints{} + load_as<int32_t>(unit); }

template <class V>
inline V totals(const V* v) {
  V sums = {};
  for (int i = 0; i < LANES; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
  return sums;
}

inline unsigned passing(Floats scores, Floats above, Floats below) {
  const Ints is_passing = (scores > above) | (scores < below);
  unsigned bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= (is_passing[i] & 1u) << i;
  return bits;
}

struct Bf16 {
  using Sum = Floats;
  static constexpr int UNIT = 1, ROW_BYTES = 8;
  static constexpr bool DIRECT = false, SCALED = false;
  static Ints row(const uint8_t* p, int64_t v) {
    return reinterpret_cast<Ints>(__builtin_convertvector(load_as<Halves>(p + v * 8), Units) << 16);
  }
  static Ints query(const uint8_t* p, int64_t v) { return row(p, v); }
  static Sum add(Sum sum, Ints row, Ints query) {
    return sum + reinterpret_cast<Floats>(row) * reinterpret_cast<Floats>(query);
  }
};

// Pairs of 16-bit integers: every machine multiplies those, and a product of bytes fits.
struct Integers {
  using Sum = Ints;
  static constexpr int UNIT = 2;
  static constexpr bool DIRECT = false, SCALED = true;
  static constexpr int32_t WEIGHT = 1, OFFSET = 0;
  static Ints query(const uint8_t* p, int64_t v) {
    return reinterpret_cast<Ints>(__builtin_convertvector(load_as<Bytes>(p + v * 8), Shorts));
  }
  static Sum add(Sum sum, Ints row, Ints query) {
    const Ints pairs = reinterpret_cast<Ints>(reinterpret_cast<Shorts>(row) * reinterpret_cast<Shorts>(query));
    return sum + (pairs << 16 >> 16) + (pairs >> 16);
  }
};

struct Int8 : Integers {
  static constexpr int ROW_BYTES = 8;
  static Ints row(const uint8_t* p, int64_t v) { return query(p, v); }
};

struct Bits : Integers {
  static constexpr int ROW_BYTES = 1;
  // -1 where the bit is set, else 1.
  static Ints row(const uint8_t* p, int64_t v) {
    const Shorts places = {1, 2, 4, 8, 16, 32, 64, 128};
    const Shorts is_set = (places & static_cast<int16_t>(p[v])) != 0;
    return reinterpret_cast<Ints>(is_set | 1);
  }
};

}  // namespace
}  // namespace fastsft

#include "store_topk_kernel.h"
TOPK_KERNEL(TOPK_BASE)
