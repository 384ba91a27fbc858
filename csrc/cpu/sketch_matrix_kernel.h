// The body of sketch_matrix's kernel, included by one .cpp per instruction set with
//   LANES       floats of a vector register (4, 8, 16)
//   BLOCKS_NAME the function to define
// Everything else has internal linkage, and no template of the standard library is used: an inline function compiled here
// with AVX flags must not be the copy that the linker keeps for the rest of the program.
#include <cstdint>

#include "sjlt.h"
#include "sketch_matrix.h"

namespace fastsft {
namespace {

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float VecUnaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

constexpr int VECS = SKETCH_BLOCK / LANES;
// Blocks that are hashed at a time, once for all matrices, and read of each matrix in one go: measured on four flat vectors of
// 1M, 256 blocks took 1.25 times as long, as the hardware's prefetching starts anew with each stretch.
constexpr int64_t HASHED = 1024;
// Elements prefetched ahead: without it the same took 1.4 times as long.
constexpr int64_t AHEAD = 1024;
// Blocks that are staged before they are added: a load that spans two stores must wait until both have left the store buffer.
constexpr int64_t STAGED = 16;

inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

inline Vec load(const uint16_t* p) {  // bfloat16
  return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
}

inline float widen(float value) { return value; }
inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What one block of one matrix is read from. `total` and `precondition` may be null.
template <class In>
struct Source {
  const In* in;
  float* total;
  const float* precondition;
};

// Reads 16 values, adds them to the total, and stages them scaled; twice, side by side, so that they can be read rotated with
// unaligned loads.
template <class In>
inline void stage(const Source<In>& from, float* staged) {
  for (int v = 0; v < VECS; ++v) {
    Vec value = load(from.in + v * LANES);
    if (from.total) store(from.total + v * LANES, load(from.total + v * LANES) + value);
    if (from.precondition) value *= load(from.precondition + v * LANES);
    store(staged + v * LANES, value);
    store(staged + SKETCH_BLOCK + v * LANES, value);
  }
}

// The same for W values from place `at` on: loops of known length, which the compiler unrolls into vectors.
template <int W, class In>
inline void stage_part(const Source<In>& from, int64_t at, float* staged) {
  float value[W];
  for (int i = 0; i < W; ++i) value[i] = widen(from.in[at + i]);
  if (from.total)
    for (int i = 0; i < W; ++i) from.total[at + i] += value[i];
  if (from.precondition)
    for (int i = 0; i < W; ++i) value[i] *= from.precondition[at + i];
  for (int i = 0; i < W; ++i) staged[at + i] = staged[SKETCH_BLOCK + at + i] = value[i];
}

// The last block of a row: n < 16 values, zeros after them.
template <class In>
inline void stage_tail(const Source<In>& from, int64_t n, float* staged) {
  for (int v = 0; v < 2 * VECS; ++v) store(staged + v * LANES, Vec{});
  if (n & 8) stage_part<8>(from, 0, staged);
  if (n & 4) stage_part<4>(from, n & 8, staged);
  if (n & 2) stage_part<2>(from, n & 12, staged);
  if (n & 1) stage_part<1>(from, n & 14, staged);
}

inline void add_block(const float* staged, uint32_t twist, float* out) {
  Bits lane_bit = {};
  for (int lane = 0; lane < LANES; ++lane) lane_bit[lane] = 1u << (8 + lane);
  for (int v = 0; v < VECS; ++v) {
    const Bits is_set = reinterpret_cast<Bits>(((Bits{} + (twist >> (v * LANES))) & lane_bit) != 0);
    const Vec value = load(staged + (twist & 15) + v * LANES);
    const Vec flipped = reinterpret_cast<Vec>(reinterpret_cast<Bits>(value) ^ (is_set & 0x80000000u));
    store(out + v * LANES, load(out + v * LANES) + flipped);
  }
}

// Walks over a matrix block by block.
struct Cursor {
  int64_t row, col;
};

// Adds `num_blocks` blocks of one matrix from `at` on to its sketch.
template <class In>
void add_blocks(const SketchJob& job, const In* in, Cursor at, int64_t num_blocks, const uint32_t* buckets,
                const uint32_t* twists, float* out) {
  alignas(64) float staged[STAGED][2 * SKETCH_BLOCK];
  for (int64_t done = 0; done < num_blocks; done += STAGED) {
    const int64_t count = smaller(STAGED, num_blocks - done);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t entry = at.row * job.cols + at.col, left = job.cols - at.col;
      const Source<In> from = {in + at.row * job.row_stride + at.col, job.total ? job.total + entry : nullptr,
                               job.precondition ? job.precondition + entry : nullptr};
      __builtin_prefetch(from.in + AHEAD);
      if (left >= SKETCH_BLOCK) {
        stage(from, staged[i]);
      } else {
        stage_tail(from, left, staged[i]);
      }
      at = left > SKETCH_BLOCK ? Cursor{at.row, at.col + SKETCH_BLOCK} : Cursor{at.row + 1, 0};
    }
    for (int64_t i = 0; i < count; ++i) add_block(staged[i], twists[done + i], out + buckets[done + i]);
  }
}

template <class In>
void sketch_blocks(const SketchJob& job, int64_t first, int64_t last, int64_t matrix, int64_t num, float* out) {
  const int64_t blocks_per_row = (job.cols + SKETCH_BLOCK - 1) / SKETCH_BLOCK;
  uint32_t buckets[HASHED], twists[HASHED];
  for (int64_t begin = first; begin < last; begin += HASHED) {
    const int64_t count = smaller(HASHED, last - begin);
    hash_blocks(job.first_block + begin, count, job.seed, job.sketch_size, buckets, twists);
    const Cursor at = {begin / blocks_per_row, begin % blocks_per_row * SKETCH_BLOCK};
    for (int64_t b = 0; b < num; ++b) {
      const In* in = static_cast<const In*>(job.matrices) + (matrix + b) * job.matrix_stride;
      add_blocks(job, in, at, count, buckets, twists, out + b * job.sketch_size);
    }
  }
}

}  // namespace

void BLOCKS_NAME(const SketchJob& job, int64_t first, int64_t last, int64_t matrix, int64_t num, float* out) {
  if (job.is_bf16) {
    sketch_blocks<uint16_t>(job, first, last, matrix, num, out);
  } else {
    sketch_blocks<float>(job, first, last, matrix, num, out);
  }
}

}  // namespace fastsft
