// The scan of store_topk over rows of bits for a few queries: candidates for the k best of either sign.
//
// A warp scores several rows at a time. Masking every eighth bit of a word leaves four bytes of 0 or 2^plane, which one dp4a
// multiplies with four numbers of the query; the query lies in shared memory in that order, and each plane has a sum of its
// own, so that no bit need be shifted. A tensor core would need the bytes of all bits in shared memory first: twice the time
// (Triton, H200). See triton_kernels/store_topk.py for what becomes of the candidates.
#include "library.cuh"

namespace {

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int MOST = 4;  // rows of a warp for one query: eight sums each are kept in registers
constexpr unsigned ALL = 0xffffffffu;

struct Bits {
  const uint4* rows;           // [N, units] of 128 bits
  const float* scales;         // [N]
  const uint4* queries;        // int8 [QUERIES, 8 planes, units * 16]
  const float* steps;          // [QUERIES]
  const int32_t* query_sums;   // [QUERIES]
  const int32_t* thresholds;   // [2, QUERIES]
  int64_t* keys;               // [2, QUERIES, k + room]: the best before, and the candidates
  int32_t* counts;             // [2, QUERIES]
  int64_t k, room, units, first, last;
};

// One list of a query: scores of one sign, the best of which before this stretch is `threshold` as ordered bits.
struct List {
  int64_t* keys;
  int32_t* count;
  int32_t threshold;
};

__device__ __forceinline__ void offer(const Bits& job, const List& list, float score, int64_t row) {
  int32_t bits = __float_as_int(score);
  bits ^= (bits >> 31) & 0x7fffffff;  // ordered as the floats are
  if (bits <= list.threshold) return;
  // Where every row is a candidate, it has a place of its own.
  const int64_t slot = job.last <= job.room ? row : atomicAdd(list.count, 1);
  if (slot < job.room) list.keys[slot] = static_cast<int64_t>(bits) * (int64_t(1) << 32) | (0xffffffffll - row);
}

// acc + a . b of four unsigned and four signed bytes.
__device__ __forceinline__ int32_t dot(uint32_t a, uint32_t b, int32_t acc) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(acc) : "r"(a), "r"(b));
  return acc;
}

template <int QUERIES>
__global__ void __launch_bounds__(THREADS, 2) store_topk_bits_kernel(const Bits job) {
  constexpr int ROWS = MOST / QUERIES;
  extern __shared__ uint4 numbers[];  // [QUERIES, 8, units]
  for (int64_t i = threadIdx.x; i < QUERIES * 8 * job.units; i += THREADS) numbers[i] = job.queries[i];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * WARPS;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  // Lane i ends with the score of row i / QUERIES for query i % QUERIES.
  const int query = lane % QUERIES;
  List lists[2];
#pragma unroll
  for (int sign = 0; sign < 2; ++sign) {
    const int list = sign * QUERIES + query;
    lists[sign].keys = job.keys + list * (job.k + job.room) + job.k;
    lists[sign].count = job.counts + list;
    lists[sign].threshold = job.thresholds[list];
  }
  const float step = job.steps[query];
  const int32_t query_sum = job.query_sums[query];
  for (int64_t row = job.first + warp * ROWS; row < job.last; row += warps * ROWS) {
    const int64_t this_row = row + lane / QUERIES;
    const bool is_mine = lane < ROWS * QUERIES && this_row < job.last;
    const float scale = is_mine ? job.scales[this_row] : 0.0f;
    int32_t sum[ROWS][QUERIES][8] = {};
    for (int64_t unit = lane; unit < job.units; unit += 32) {
      uint4 bits[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) bits[r] = job.rows[min(row + r, job.last - 1) * job.units + unit];
#pragma unroll
      for (int plane = 0; plane < 8; ++plane)
#pragma unroll
        for (int q = 0; q < QUERIES; ++q) {
          const uint4 number = numbers[(q * 8 + plane) * job.units + unit];
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            sum[r][q][plane] = dot(bits[r].x & (0x01010101u << plane), number.x, sum[r][q][plane]);
            sum[r][q][plane] = dot(bits[r].y & (0x01010101u << plane), number.y, sum[r][q][plane]);
            sum[r][q][plane] = dot(bits[r].z & (0x01010101u << plane), number.z, sum[r][q][plane]);
            sum[r][q][plane] = dot(bits[r].w & (0x01010101u << plane), number.w, sum[r][q][plane]);
          }
        }
    }
    int32_t mine = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int q = 0; q < QUERIES; ++q) {
        int32_t planes = 0;
#pragma unroll
        for (int plane = 0; plane < 8; ++plane) planes += sum[r][q][plane] >> plane;  // exact: a multiple of 2^plane
        const int32_t total = __reduce_add_sync(ALL, planes);
        if (lane == r * QUERIES + q) mine = total;
      }
    // A set bit is a minus.
    const float score = static_cast<float>(query_sum - 2 * mine) * (scale * step);
    if (is_mine) {
      offer(job, lists[0], score, this_row);
      offer(job, lists[1], -score, this_row);
    }
  }
}

template <int QUERIES>
cudaError_t launch(const Bits& job, cudaStream_t stream) {
  const size_t shared = static_cast<size_t>(QUERIES) * 8 * job.units * sizeof(uint4);
  cudaError_t error = cudaFuncSetAttribute(store_topk_bits_kernel<QUERIES>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  const int64_t at_once = MOST / QUERIES * WARPS, blocks = (job.last - job.first + at_once - 1) / at_once;
  store_topk_bits_kernel<QUERIES><<<static_cast<unsigned>(blocks < 2048 ? blocks : 2048), THREADS, shared, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace

// Offers the rows first <= n < last, each a multiple of 16 bytes, to the lists of num_queries (1, 2 or 4) queries.
EXPORT int fastsft_store_topk_bits(const void* rows, const float* scales, const void* queries, const float* steps,
                                   const int32_t* query_sums, const int32_t* thresholds, int64_t* keys, int32_t* counts,
                                   int64_t num_queries, int64_t k, int64_t room, int64_t row_bytes, int64_t first, int64_t last,
                                   void* stream_handle) {
  if (first >= last) return cudaSuccess;
  const Bits job = {static_cast<const uint4*>(rows), scales, static_cast<const uint4*>(queries), steps, query_sums, thresholds,
                    keys, counts, k, room, row_bytes / 16, first, last};
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (num_queries == 1) return launch<1>(job, stream);
  if (num_queries == 2) return launch<2>(job, stream);
  return num_queries == 4 ? launch<4>(job, stream) : cudaErrorInvalidValue;
}
