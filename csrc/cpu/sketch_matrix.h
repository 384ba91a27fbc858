// The job of one sketch_matrix call on the CPU, shared by the driver (sketch_matrix.cpp) and the kernels, which are the
// same source (sketch_matrix_kernel.h) compiled once per instruction set.
//
// B matrices of O rows and I columns, K sketch size.
#pragma once
#include <cstdint>

namespace fastsft {

struct SketchJob {
  const void* matrices;          // [B, O, I], float or bfloat16; the inner stride is 1
  bool is_bf16;
  int64_t num_matrices, rows, cols;
  int64_t matrix_stride, row_stride;  // in elements
  const float* precondition;     // [O, I] or null: multiplies each matrix on its way into the sketch
  float* total;                  // [O, I] or null: the sum of the matrices is added to it
  float* out;                    // [B, K], added to
  int64_t sketch_size;
  uint32_t seed;
  int64_t first_block;           // the number of the first block: the rows may be those of a larger matrix from some row on
};

// Adds blocks first <= j < last (counted from the job's first) of `num` matrices from `matrix` on to out [num, K], and
// to job.total.
using SketchKernel = void (*)(const SketchJob& job, int64_t first, int64_t last, int64_t matrix, int64_t num, float* out);

void sketch_blocks_base(const SketchJob&, int64_t, int64_t, int64_t, int64_t, float*);
void sketch_blocks_avx2(const SketchJob&, int64_t, int64_t, int64_t, int64_t, float*);
void sketch_blocks_avx512(const SketchJob&, int64_t, int64_t, int64_t, int64_t, float*);

// The same bits for any num_threads, and for each matrix whatever others there are: work is cut by a matrix's shape alone and
// added up in a fixed order.
void sketch_matrix(const SketchJob& job, SketchKernel kernel, int num_threads);

}  // namespace fastsft
