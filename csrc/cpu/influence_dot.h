// The job of one influence_dot call on the CPU, shared by the driver (influence_dot.cpp) and the kernels, which are the
// same source (influence_dot_kernel.h) compiled once per instruction set.
//
// T tokens, D documents, I inputs, O outputs, A targets, K sketch size. G_d = sum over the tokens of d of dy_t x_t^T [O, I].
// G_d is formed in tiles of 16 x 16 which every requested output consumes while they are in L1; it never exists whole.
#pragma once
#include <cstdint>

namespace fastsft {

constexpr int TILE = 16;         // rows and columns of a tile; also the block of the sketch
constexpr int UNIT_TILES = 64;   // a unit of work is 8 x 8 tiles, or fewer by more where a side is short
constexpr int MAX_PANELS = 16;   // measured: 8 is a quarter slower on wide matrices, 32 no faster
constexpr int MAX_UNIT_BLOCKS = TILE * UNIT_TILES;

// Rows between panels. An odd number of cache lines, as packing writes a token's row to all panels at once, and panels a power
// of two apart would share one set of the L1.
constexpr int64_t panel_rows(int64_t tokens) { return tokens | 1; }

struct Matrix {                  // rows are tokens; the inner stride is 1
  const void* data;
  int64_t row_stride;            // in elements
  int64_t cols;
  bool is_bf16;
};

struct InfluenceJob {
  Matrix x, dy;                  // [T, I], [T, O]
  const int64_t* offsets;        // [D + 1]
  int64_t num_documents;
  const float* targets;          // [A, O, I] or null
  int64_t num_targets;
  const float* precondition;     // [O, I] or null
  const int64_t* groups;         // [D] or null
  float* sums;                   // [num_groups, O, I] or null, added to
  float* sketch;                 // [D, K] or null, added to
  int64_t sketch_size;
  uint32_t seed;
};

struct Unit {                    // a rectangle of tiles
  int64_t row_tile, row_tiles, col_tile, col_tiles;
};

struct Slot {                    // what the units of one slot add to, in their order
  double* scores;                // [documents of the pass, A]
  float* sketch;                 // [documents of the pass, K]
};

// Memory one thread works in. Sized by the longest document.
struct Scratch {
  float* x_panels;               // [panels, panel_rows(tokens), TILE], zero padded
  float* dy_panels;              // [panels, panel_rows(tokens), TILE], zero padded
  uint32_t* buckets;             // [MAX_UNIT_BLOCKS] offset into the sketch of each block of the unit
  uint32_t* twists;              // [MAX_UNIT_BLOCKS] rotation and signs of each block of the unit
};

// Adds the documents first <= d < last, restricted to the unit's tiles, to the slot (and to job.sums, which it owns there).
using UnitKernel = void (*)(const InfluenceJob& job, const Unit& unit, int64_t first, int64_t last, const Slot& slot,
                            const Scratch& scratch);

void influence_unit_base(const InfluenceJob&, const Unit&, int64_t, int64_t, const Slot&, const Scratch&);
void influence_unit_avx2(const InfluenceJob&, const Unit&, int64_t, int64_t, const Slot&, const Scratch&);
void influence_unit_avx512(const InfluenceJob&, const Unit&, int64_t, int64_t, const Slot&, const Scratch&);

// The same bits for any num_threads: work is cut by shape alone and added up in a fixed order.
void influence_dot(const InfluenceJob& job, float* scores, UnitKernel kernel, int num_threads);

}  // namespace fastsft
