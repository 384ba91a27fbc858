// The hash of the blocked sparse JL sketch, see fastsft/ops/_sjlt.py, which defines it. Included by the kernels: internal
// linkage, so that each instruction set keeps its own copy.
#pragma once
#include <cstdint>

namespace fastsft {
namespace {

constexpr int SKETCH_BLOCK = 16;

inline uint32_t mix(uint32_t v) {
  v ^= v >> 16;
  v *= 0x7feb352du;
  v ^= v >> 15;
  v *= 0x846ca68bu;
  v ^= v >> 16;
  return v;
}

// For the blocks first, first + 1, ...: the offset of each block's bucket in a sketch of K numbers, and its twist (the
// rotation in the low 4 bits, the signs from bit 8 on). The inner loop has no branch: the compiler makes vectors of it.
inline void hash_blocks(int64_t first, int64_t num_blocks, uint32_t seed, int64_t K, uint32_t* buckets, uint32_t* twists) {
  const uint64_t bucket_blocks = static_cast<uint64_t>(K / SKETCH_BLOCK);
  for (int64_t done = 0; done < num_blocks;) {
    const uint64_t block = static_cast<uint64_t>(first + done);
    const uint32_t low = static_cast<uint32_t>(block), key = seed ^ mix(static_cast<uint32_t>(block >> 32));
    const int64_t until_carry = static_cast<int64_t>((uint64_t{1} << 32) - low);
    const int64_t left = num_blocks - done, run = left < until_carry ? left : until_carry;
    for (int64_t i = 0; i < run; ++i) {
      const uint32_t hash = mix((low + static_cast<uint32_t>(i)) ^ key);
      buckets[done + i] = static_cast<uint32_t>((hash * bucket_blocks) >> 32) * SKETCH_BLOCK;
      twists[done + i] = mix(hash + 0x9e3779b9u);
    }
    done += run;
  }
}

}  // namespace
}  // namespace fastsft
