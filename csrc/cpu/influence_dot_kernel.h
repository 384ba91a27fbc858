// The body of influence_dot's kernel, included by one .cpp per instruction set with
//   LANES     floats of a vector register (4, 8, 16)
//   ROWS      rows of a tile that are accumulated at a time: ROWS * TILE / LANES accumulators must stay in registers
//   UNIT_NAME the function to define
// Everything else has internal linkage, and no template of the standard library is used: an inline function compiled here
// with AVX flags must not be the copy that the linker keeps for the rest of the program.
#include <cstdint>

#include "influence_dot.h"
#include "sjlt.h"

namespace fastsft {
namespace {

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float VecUnaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));

constexpr int VECS = TILE / LANES;
constexpr int64_t AHEAD = 4;  // rows prefetched ahead of packing: wide matrices put a page between rows, which no hardware follows

inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// The first n floats at p, zeros after them.
inline Vec load_first(const float* p, int n) {
  if (n >= LANES) return load(p);
  Vec v = {};
  for (int lane = 0; lane < n; ++lane) v[lane] = p[lane];
  return v;
}

inline float total(Vec v) {
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += v[lane];
  return sum;
}

inline int at_most(int64_t value, int64_t limit) { return static_cast<int>(value < limit ? value : limit); }

// Copy `tiles` panels of 16 columns, tokens first <= t < last, into panels [tiles, tokens, TILE]; pads with zeros.
// Packing reads whole cache lines of consecutive columns: walking one panel down a wide matrix would miss TLB and L1.
void pack(const Matrix& m, int64_t first, int64_t last, int64_t col_tile, int64_t tiles, float* panels) {
  const int64_t tokens = last - first;
  const int64_t col = col_tile * TILE, element = m.is_bf16 ? 2 : 4;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t row = (first + t) * m.row_stride + col;
    if (t + AHEAD < tokens) {
      const char* next = static_cast<const char*>(m.data) + (row + AHEAD * m.row_stride) * element;
      for (int64_t line = 0; line < tiles * TILE * element; line += 64) __builtin_prefetch(next + line);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      float* out = panels + (tile * panel_rows(tokens) + t) * TILE;
      const int n = at_most(m.cols - col - tile * TILE, TILE);
      if (m.is_bf16) {
        const uint16_t* in = static_cast<const uint16_t*>(m.data) + row + tile * TILE;
        for (int j = 0; j < TILE; ++j) {
          const uint32_t bits = j < n ? static_cast<uint32_t>(in[j]) << 16 : 0;
          __builtin_memcpy(out + j, &bits, 4);
        }
      } else {
        const float* in = static_cast<const float*>(m.data) + row + tile * TILE;
        if (n == TILE) {
          for (int v = 0; v < VECS; ++v) store(out + v * LANES, load(in + v * LANES));
        } else {
          for (int j = 0; j < TILE; ++j) out[j] = j < n ? in[j] : 0.0f;
        }
      }
    }
  }
}

// tile[r] = sum over tokens of dy[t][r] * x[t], for NUM rows. Each row is written twice, side by side, so that the sketch can
// read it rotated with one unaligned load.
template <int NUM>
inline void accumulate(const float* x, const float* dy, int64_t tokens, float* tile) {
  Vec sum[NUM][VECS] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    Vec in[VECS];
    for (int v = 0; v < VECS; ++v) in[v] = load(x + t * TILE + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < NUM; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sum[r][v] += in[v] * dy[t * TILE + r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < NUM; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      store(tile + r * 2 * TILE + v * LANES, sum[r][v]);
      store(tile + r * 2 * TILE + TILE + v * LANES, sum[r][v]);
    }
}

void form_tile(const float* x, const float* dy, int64_t tokens, int rows, float* tile) {
  int row = 0;
  while (row < rows) {
    float* out = tile + row * 2 * TILE;
    if (rows - row > ROWS / 2) {
      accumulate<ROWS>(x, dy + row, tokens, out);
      row += ROWS;
    } else {
      accumulate<ROWS / 2>(x, dy + row, tokens, out);
      row += ROWS / 2;
    }
  }
}

void add_sums(const float* tile, int rows, int cols, float* out, int64_t row_stride) {
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v * LANES < cols; ++v) {
      const int n = at_most(cols - v * LANES, LANES);
      float* p = out + r * row_stride + v * LANES;
      const Vec sum = load_first(p, n) + load(tile + r * 2 * TILE + v * LANES);
      if (n == LANES) {
        store(p, sum);
      } else {
        for (int lane = 0; lane < n; ++lane) p[lane] = sum[lane];
      }
    }
}

void scale(float* tile, int rows, int cols, const float* factor, int64_t row_stride) {
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v * LANES < cols; ++v) {
      float* p = tile + r * 2 * TILE + v * LANES;
      const Vec scaled = load(p) * load_first(factor + r * row_stride + v * LANES, at_most(cols - v * LANES, LANES));
      store(p, scaled);
      store(p + TILE, scaled);
    }
}

float dot(const float* tile, int rows, int cols, const float* target, int64_t row_stride) {
  Vec even = {}, odd = {};
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v * LANES < cols; ++v) {
      const Vec product = load(tile + r * 2 * TILE + v * LANES) *
                          load_first(target + r * row_stride + v * LANES, at_most(cols - v * LANES, LANES));
      if (r & 1) odd += product; else even += product;
    }
  return total(even + odd);
}

// The blocked sparse JL sketch, see fastsft/ops/_sjlt.py, which defines it.
void add_sketch(const float* tile, int rows, const uint32_t* buckets, const uint32_t* twists, int64_t stride, float* sketch) {
  Bits lane_bit = {};
  for (int lane = 0; lane < LANES; ++lane) lane_bit[lane] = 1u << (8 + lane);
  for (int r = 0; r < rows; ++r) {
    const uint32_t twist = twists[r * stride];
    float* out = sketch + buckets[r * stride];
    const float* rotated = tile + r * 2 * TILE + (twist & 15);
    for (int v = 0; v < VECS; ++v) {
      const Bits is_set = reinterpret_cast<Bits>(((Bits{} + (twist >> (v * LANES))) & lane_bit) != 0);
      const Vec value = load(rotated + v * LANES);
      const Vec flipped = reinterpret_cast<Vec>(reinterpret_cast<Bits>(value) ^ (is_set & 0x80000000u));
      store(out + v * LANES, load(out + v * LANES) + flipped);
    }
  }
}

void hash_unit(const InfluenceJob& job, const Unit& unit, uint32_t* buckets, uint32_t* twists) {
  const int64_t blocks_per_row = (job.x.cols + TILE - 1) / TILE;
  for (int64_t row = 0; row < unit.row_tiles * TILE; ++row)
    hash_blocks((unit.row_tile * TILE + row) * blocks_per_row + unit.col_tile, unit.col_tiles, job.seed, job.sketch_size,
                buckets + row * unit.col_tiles, twists + row * unit.col_tiles);
}

}  // namespace

void UNIT_NAME(const InfluenceJob& job, const Unit& unit, int64_t first, int64_t last, const Slot& slot,
               const Scratch& scratch) {
  const int64_t O = job.dy.cols, I = job.x.cols;
  alignas(64) float tile[TILE * 2 * TILE];
  if (job.sketch) hash_unit(job, unit, scratch.buckets, scratch.twists);
  for (int64_t d = first; d < last; ++d) {
    const int64_t begin = job.offsets[d], tokens = job.offsets[d + 1] - begin;
    const int64_t stride = panel_rows(tokens) * TILE;
    if (tokens == 0) continue;
    pack(job.x, begin, begin + tokens, unit.col_tile, unit.col_tiles, scratch.x_panels);
    pack(job.dy, begin, begin + tokens, unit.row_tile, unit.row_tiles, scratch.dy_panels);
    for (int64_t i = 0; i < unit.row_tiles; ++i) {
      const int64_t row = (unit.row_tile + i) * TILE;
      const int rows = at_most(O - row, TILE);
      for (int64_t j = 0; j < unit.col_tiles; ++j) {
        const int64_t col = (unit.col_tile + j) * TILE, at = row * I + col;
        const int cols = at_most(I - col, TILE);
        form_tile(scratch.x_panels + j * stride, scratch.dy_panels + i * stride, tokens, rows, tile);
        if (job.sums) add_sums(tile, rows, cols, job.sums + job.groups[d] * O * I + at, I);
        if (job.precondition) scale(tile, rows, cols, job.precondition + at, I);
        for (int64_t a = 0; a < job.num_targets; ++a)
          slot.scores[(d - first) * job.num_targets + a] += dot(tile, rows, cols, job.targets + a * O * I + at, I);
        if (job.sketch) {
          const int64_t block = i * TILE * unit.col_tiles + j;
          add_sketch(tile, rows, scratch.buckets + block, scratch.twists + block, unit.col_tiles,
                     slot.sketch + (d - first) * job.sketch_size);
        }
      }
    }
  }
}

}  // namespace fastsft
