// The job of one store_topk call on the CPU, shared by the driver (store_topk.cpp) and the kernels, which are the same source
// (store_topk_kernel.h) over the few instructions in which the sets differ (store_topk_<set>.cpp).
//
// N rows, K numbers of a row, M blocks of a row, Q queries.
#pragma once
#include <cstdint>

namespace fastsft {

enum class RowFormat { bf16, int8, bits };  // in the order of FORMATS in fastsft/ops/_rows.py

struct TopkJob {
  RowFormat format;
  int64_t num_rows, size, blocks;  // N, K, M
  int64_t row_bytes;
  const uint8_t* data;             // [N, row_bytes]
  const float* scales;             // [N, M], null for bf16
  int64_t num_queries;
  const uint8_t* queries;          // [Q, K] bf16 for bf16, else int8
  const float* steps;              // [Q, M], null for bf16
  const int64_t* groups;           // [N] or null
  int64_t num_groups;
  int64_t first_row;
  int64_t k;
};

constexpr int QUERY_PADDING = 16;  // the widest vector of any set
constexpr int64_t padded(int64_t queries) { return (queries + QUERY_PADDING - 1) / QUERY_PADDING * QUERY_PADDING; }

// The queries as a kernel reads them, packed once. A unit is 4 bytes: 1, 2 or 4 numbers.
struct PackedQueries {
  uint32_t* units;
  int32_t* offsets;                // [M, padded(Q)] what is added to a dot product of integers
  float* steps;                    // [M, padded(Q)]
};

// The best rows so far at both ends, and the scores that have yet to be passed.
struct Best {
  float* above;                    // [padded(Q)] a larger score is among the k largest; +inf in the padding
  float* below;                    // [padded(Q)] a smaller score is among the k smallest; -inf in the padding
  void* heaps;
};

// Take a row's score in if it is among the best. Rows must come in the order of their numbers.
void keep(Best& best, int64_t query, float score, int64_t row);

struct TopkKernel {
  int64_t (*packed_units)(const TopkJob&);
  int64_t (*scratch_units)(const TopkJob&);
  void (*pack)(const TopkJob&, const PackedQueries&);
  // Scans the rows first <= n < last. `sums` [num_groups, padded(Q)] is added to, or null.
  void (*scan)(const TopkJob&, const PackedQueries&, int64_t first, int64_t last, Best&, double* sums, uint32_t* scratch);
};

extern const TopkKernel TOPK_BASE, TOPK_AVX2, TOPK_AVX512VNNI;

struct TopkResult {
  float* largest;                  // [Q, k], filled with -inf
  int64_t* largest_rows;           // [Q, k], filled with -1
  float* smallest;                 // [Q, k], filled with inf
  int64_t* smallest_rows;          // [Q, k], filled with -1
  double* sums;                    // [Q, num_groups], zero, or null
};

// The same bits for any num_threads.
void store_topk(const TopkJob& job, const TopkResult& result, const TopkKernel& kernel, int num_threads);

}  // namespace fastsft
