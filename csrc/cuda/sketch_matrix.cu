// sketch_matrix: the blocked sparse JL sketch of matrices [B, O, I] -> [B, K], and their sum over B [O, I], in one read.
// fastsft/ops/_sjlt.py defines the hash. No atomics: the same bits at every call on one kind of device.
//
// A thread block holds the sketches of up to 8 matrices in shared memory. A round of blocks of 16 numbers is brought there
// while the one before is added; the hash of a block is computed once for all matrices. Warp w owns the buckets whose number
// is w modulo 16, and its half-warps own every other matrix: no two threads ever meet in a place of a sketch. A round's
// blocks are first sorted by owner, in their order. Thread blocks write partial sketches that a second kernel adds in order.
#include "library.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int BLOCK = 16;
constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int COPY_BYTES = 128 * 1024;  // shared memory for sketches, of 163 KB (sm_80) or 227 KB
constexpr int STAGE_BYTES = 32 * 1024;  // for one round of the matrices
constexpr int MAX_COLUMNS = 8192;       // numbers of a sketch that a thread block holds; longer sketches take several
constexpr int64_t MAX_SLICES = 128;     // fixed, not the number of multiprocessors: sums must not depend on it
constexpr int64_t SLICE_BLOCKS = 256;   // at least
constexpr uint32_t NOWHERE = 0xfffu;    // the bucket of a block that is not ours

struct Job {
  const void* matrices;        // [B, O, I]
  const float* precondition;   // [O, I] or null
  void* total;                 // [O, I] float32 or bfloat16, or null
  float* partial;              // [slices, B, K]
  int64_t num_matrices, rows, columns, blocks_per_row, num_blocks;
  int64_t first_block;         // the number of the first block, as the hash counts
  int64_t sketch_size;
  uint32_t seed;
  bool total_is_bf16, accumulate;
};

struct Plan {
  int each;                    // matrices of a half-warp
  int columns;                 // of a sketch, in a thread block
  int64_t slices, column_groups;
};

// Shared memory of a thread block whose half-warps own EACH matrices. Sizes are known to the compiler, so that a half-warp's
// matrices lie at fixed distances.
template <typename T, int EACH>
struct Layout {
  static constexpr int MATRICES = 2 * EACH;
  static constexpr int ROUND = STAGE_BYTES / (MATRICES * BLOCK * static_cast<int>(sizeof(T)));  // blocks
  // A matrix's stretch is padded by a block, so that the two halves of a warp read from different banks.
  static constexpr int STRETCH = (ROUND + 1) * BLOCK, STAGED = MATRICES * STRETCH;

  static constexpr int GROUPS = ROUND / 32;  // warps that hash a round

  float* copies;    // [columns / 16, EACH, 2, 16]
  T* stages;        // [2, MATRICES, ROUND + 1, 16]
  uint2* lists;     // [WARPS, ROUND]: where a block of the owner goes, and its place in the round
  int* counts;      // [2, GROUPS, WARPS]: blocks of each owner in each group of 32
  float* factors;   // [2, ROUND, 16], where there is a preconditioner

  __device__ Layout(unsigned char* shared, int columns)
      : copies(reinterpret_cast<float*>(shared)),
        stages(reinterpret_cast<T*>(copies + MATRICES * columns)),
        lists(reinterpret_cast<uint2*>(stages + 2 * STAGED)),
        counts(reinterpret_cast<int*>(lists + WARPS * ROUND)),
        factors(reinterpret_cast<float*>(counts + 2 * GROUPS * WARPS)) {}

  static size_t bytes(int columns, bool preconditioned) {
    return static_cast<size_t>(MATRICES) * columns * 4 + 2 * STAGED * sizeof(T) + WARPS * ROUND * sizeof(uint2) +
           2 * GROUPS * WARPS * 4 + (preconditioned ? 2 * ROUND * BLOCK * 4 : 0);
  }
};

__device__ __forceinline__ uint32_t mix(uint32_t v) {
  v ^= v >> 16;
  v *= 0x7feb352du;
  v ^= v >> 15;
  v *= 0x846ca68bu;
  v ^= v >> 16;
  return v;
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Where block `number` goes, in 32 bits: bucket (12, counted from this thread block's first), rotation (4), signs (16).
__device__ __forceinline__ uint32_t place(const Job& job, int64_t number, int columns) {
  const uint32_t high = static_cast<uint32_t>(number >> 32);
  const uint32_t hash = mix(static_cast<uint32_t>(number) ^ job.seed ^ mix(high));
  const uint32_t twist = mix(hash + 0x9e3779b9u);
  const uint32_t bucket = __umulhi(hash, static_cast<uint32_t>(job.sketch_size / BLOCK));
  const uint32_t local = bucket - blockIdx.z * (columns / BLOCK);  // wraps where the bucket lies before
  if (local >= static_cast<uint32_t>(columns / BLOCK)) return NOWHERE << 20;
  return local << 20 | (twist & 15u) << 16 | ((twist >> 8) & 0xffffu);
}

__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
}

// Bring `count` blocks from number `first` of one matrix to shared memory, element by element, zeros where a row's last block
// is not full.
template <typename T>
__device__ void fetch_by_element(const T* matrix, const Job& job, int64_t first, int count, T* to) {
  for (int i = threadIdx.x; i < count * BLOCK; i += THREADS) {
    const int64_t number = first + i / BLOCK, row = number / job.blocks_per_row;
    const int64_t column = (number - row * job.blocks_per_row) * BLOCK + i % BLOCK;
    to[i] = column < job.columns ? matrix[row * job.columns + column] : T(0.0f);
  }
}

// The same for `num` matrices that lie `size` apart, 16 bytes at a time: rows are whole blocks, hence contiguous.
template <typename T, int MATRICES, int ROUND, int STRETCH>
__device__ __forceinline__ void fetch_whole(const T* from, int64_t size, int num, int count, T* to) {
  constexpr int STEP = 16 / sizeof(T), CHUNKS = ROUND * BLOCK / STEP;  // of a matrix
#pragma unroll
  for (int i = 0; i < MATRICES * CHUNKS; i += THREADS) {
    const int m = (i + threadIdx.x) / CHUNKS, at = (i + threadIdx.x) % CHUNKS * STEP;
    if (m < num && at < count * BLOCK) copy_async(to + m * STRETCH + at, from + m * size + at);
  }
}

// Sum WIDTH elements over the matrices: `num_here` of them from shared memory, the others from where they are.
template <typename T, int WIDTH>
__device__ __forceinline__ void add_up(const Job& job, const T* staged, int stretch, int num_here, const T* matrices, int64_t at) {
  struct alignas(WIDTH * sizeof(T)) Values {
    T v[WIDTH];
  };
  float sum[WIDTH] = {};
  for (int64_t m = 0; m < job.num_matrices; ++m) {
    const T* const from = m < num_here ? staged + m * stretch : matrices + m * job.rows * job.columns + at;
    const Values values = *reinterpret_cast<const Values*>(from);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) sum[w] += widen(values.v[w]);
  }
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    if (job.total_is_bf16) {
      __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(job.total) + at + w;
      *out = __float2bfloat16(job.accumulate ? __bfloat162float(*out) + sum[w] : sum[w]);
    } else {
      float* const out = static_cast<float*>(job.total) + at + w;
      *out = job.accumulate ? *out + sum[w] : sum[w];
    }
  }
}

// Add the listed blocks to the sketches of this half-warp's matrices, EACH of them or `num_mine`; lane q of 16 owns place q.
template <typename T, int EACH, bool ALL, bool PRECONDITIONED>
__device__ __forceinline__ void add_blocks(const uint2* list, int num, const T* values, const float* factors, float* copy,
                                           int lane, int num_mine) {
  uint2 next = list[0];
  for (int i = 1; i <= num; ++i) {
    const uint32_t word = next.x;
    const int at = static_cast<int>(next.y) * BLOCK + ((lane + (word >> 16)) & 15);
    next = list[i < num ? i : 0];
    const uint32_t flip = (word << (31 - lane)) & 0x80000000u;
    float* const to = copy + (word >> 20) * (2 * EACH * BLOCK);
    const float factor = PRECONDITIONED ? factors[at] : 1.0f;
    float value[EACH], sum[EACH];
#pragma unroll
    for (int m = 0; m < EACH; ++m) {
      value[m] = widen(values[m * 2 * Layout<T, EACH>::STRETCH + at]);
      sum[m] = to[m * 2 * BLOCK];
    }
#pragma unroll
    for (int m = 0; m < EACH; ++m) {
      if (PRECONDITIONED) value[m] *= factor;
      // What a matrix that is not there would hold was never written: nothing of it may stay.
      const float signed_value = __uint_as_float(__float_as_uint(value[m]) ^ flip);
      if (ALL || m < num_mine) to[m * 2 * BLOCK] = sum[m] + signed_value;
    }
  }
}

template <typename T, bool WHOLE, int EACH, bool PRECONDITIONED>
__global__ void __launch_bounds__(THREADS, 1) sketch_matrix_kernel(const Job job, const Plan plan) {
  using Here = Layout<T, EACH>;
  extern __shared__ __align__(16) unsigned char shared[];
  const Here here(shared, plan.columns);
  const int64_t first_matrix = static_cast<int64_t>(blockIdx.y) * Here::MATRICES;
  const int num_here = static_cast<int>(min(static_cast<int64_t>(Here::MATRICES), job.num_matrices - first_matrix));
  const int64_t matrix_size = job.rows * job.columns;
  const T* const matrices = static_cast<const T*>(job.matrices) + first_matrix * matrix_size;
  const int64_t begin = job.num_blocks * blockIdx.x / gridDim.x, end = job.num_blocks * (blockIdx.x + 1) / gridDim.x;
  const bool totals = job.total && blockIdx.y == 0 && blockIdx.z == 0;
  const int warp = threadIdx.x / 32, half = (threadIdx.x >> 4) & 1, lane = threadIdx.x & 15;
  const int num_mine = (num_here - half + 1) / 2;

  for (int i = threadIdx.x; i < Here::MATRICES * plan.columns; i += THREADS) here.copies[i] = 0.0f;

  auto stage = [&](int64_t first, int slot) {
    if (first < end) {
      const int count = static_cast<int>(min(static_cast<int64_t>(Here::ROUND), end - first));
      T* const to = here.stages + slot * Here::STAGED;
      float* const factors = here.factors + slot * Here::ROUND * BLOCK;
      if (WHOLE) {
        fetch_whole<T, Here::MATRICES, Here::ROUND, Here::STRETCH>(matrices + first * BLOCK, matrix_size, num_here, count, to);
        if (PRECONDITIONED)
          fetch_whole<float, 1, Here::ROUND, 0>(job.precondition + first * BLOCK, 0, 1, count, factors);
      } else {
        for (int m = 0; m < num_here; ++m)
          fetch_by_element(matrices + m * matrix_size, job, first, count, to + m * Here::STRETCH);
        if (PRECONDITIONED) fetch_by_element(job.precondition, job, first, count, factors);
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  stage(begin, 0);
  int slot = 0;
  for (int64_t first = begin; first < end; first += Here::ROUND, slot ^= 1) {
    const int count = static_cast<int>(min(static_cast<int64_t>(Here::ROUND), end - first));
    int* const counts = here.counts + slot * Here::GROUPS * WARPS;
    uint32_t word = NOWHERE << 20, owner = WARPS;
    int rank = 0;
    if (threadIdx.x < Here::ROUND) {
      if (threadIdx.x < count) word = place(job, job.first_block + first + threadIdx.x, plan.columns);
      if ((word >> 20) != NOWHERE) owner = (word >> 20) % WARPS;
      if (threadIdx.x % 32 < WARPS) counts[warp * WARPS + threadIdx.x % 32] = 0;
      __syncwarp();
      const uint32_t alike = __match_any_sync(0xffffffffu, owner);
      rank = __popc(alike & ((1u << threadIdx.x % 32) - 1));
      if (rank == 0 && owner < WARPS) counts[warp * WARPS + owner] = __popc(alike);
    }
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();  // this round is here, and nobody reads the lists or the other slot any more
    if (owner < WARPS) {
      for (int group = 0; group < warp; ++group) rank += counts[group * WARPS + owner];
      here.lists[owner * Here::ROUND + rank] = make_uint2(word, threadIdx.x);
    }
    stage(first + Here::ROUND, slot ^ 1);
    __syncthreads();

    int num = 0;
#pragma unroll
    for (int group = 0; group < Here::GROUPS; ++group) num += counts[group * WARPS + warp];
    const uint2* const list = here.lists + warp * Here::ROUND;
    const T* const values = here.stages + slot * Here::STAGED + half * Here::STRETCH;
    const float* const factors = here.factors + slot * Here::ROUND * BLOCK;
    float* const copy = here.copies + half * BLOCK + lane;
    if (num_here == Here::MATRICES)
      add_blocks<T, EACH, true, PRECONDITIONED>(list, num, values, factors, copy, lane, num_mine);
    else
      add_blocks<T, EACH, false, PRECONDITIONED>(list, num, values, factors, copy, lane, num_mine);
    if (totals) {
      constexpr int WIDTH = WHOLE ? 16 / sizeof(T) : 1;
      for (int i = threadIdx.x * WIDTH; i < count * BLOCK; i += THREADS * WIDTH) {
        const int64_t number = first + i / BLOCK, row = WHOLE ? 0 : number / job.blocks_per_row;
        const int64_t column = (number - row * job.blocks_per_row) * BLOCK + i % BLOCK;
        if (!WHOLE && column >= job.columns) continue;
        add_up<T, WIDTH>(job, here.stages + slot * Here::STAGED + i, Here::STRETCH, num_here, matrices,
                         row * job.columns + column);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_here * plan.columns; i += THREADS) {
    const int m = i / plan.columns, k = i % plan.columns;
    const int64_t column = static_cast<int64_t>(blockIdx.z) * plan.columns + k;
    if (column < job.sketch_size)
      job.partial[(blockIdx.x * job.num_matrices + first_matrix + m) * job.sketch_size + column] =
          here.copies[(k / BLOCK * Here::MATRICES + m) * BLOCK + k % BLOCK];
  }
}

// signs [columns, size]: the matrix by which the sketch of a row [1, columns] is a product.
template <typename T>
__global__ void count_sketch_signs_kernel(T* signs, int64_t columns, int64_t size, uint32_t seed) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= columns * size) return;
  const int64_t column = at / size, out = at % size;
  const uint32_t hash = mix(static_cast<uint32_t>(column / BLOCK) ^ seed);
  const uint32_t twist = mix(hash + 0x9e3779b9u);
  const uint32_t bucket = __umulhi(hash, static_cast<uint32_t>(size / BLOCK));
  const uint32_t lane = static_cast<uint32_t>(column - twist) & 15u;
  const float sign = (twist >> (8 + lane)) & 1u ? -1.0f : 1.0f;
  signs[at] = static_cast<T>(out == bucket * BLOCK + lane ? sign : 0.0f);
}

__global__ void add_slices_kernel(const float* partial, float* out, int64_t size, int64_t slices) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t s = 0; s < slices; ++s) sum += partial[s * size + k];
  out[k] += sum;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, bool WHOLE, int EACH, bool PRECONDITIONED>
cudaError_t launch_for(const Job& job, const Plan& plan, cudaStream_t stream) {
  const auto kernel = sketch_matrix_kernel<T, WHOLE, EACH, PRECONDITIONED>;
  const int shared = static_cast<int>(Layout<T, EACH>::bytes(plan.columns, PRECONDITIONED));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const int64_t groups = divide_up(job.num_matrices, 2 * EACH);
  const dim3 grid(static_cast<unsigned>(plan.slices), static_cast<unsigned>(groups),
                  static_cast<unsigned>(plan.column_groups));
  kernel<<<grid, THREADS, shared, stream>>>(job, plan);
  return cudaGetLastError();
}

template <typename T, bool WHOLE, bool PRECONDITIONED>
cudaError_t launch_each(const Job& job, const Plan& plan, cudaStream_t stream) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const auto fits = [&](size_t bytes) { return bytes <= static_cast<size_t>(limit); };
  if (plan.each == 4 && fits(Layout<T, 4>::bytes(plan.columns, PRECONDITIONED)))
    return launch_for<T, WHOLE, 4, PRECONDITIONED>(job, plan, stream);
  if (plan.each >= 2 && fits(Layout<T, 2>::bytes(plan.columns, PRECONDITIONED)))
    return launch_for<T, WHOLE, 2, PRECONDITIONED>(job, plan, stream);
  return launch_for<T, WHOLE, 1, PRECONDITIONED>(job, plan, stream);
}

template <typename T>
cudaError_t launch(const Job& job, const Plan& plan, bool whole, cudaStream_t stream) {
  if (whole)
    return job.precondition ? launch_each<T, true, true>(job, plan, stream) : launch_each<T, true, false>(job, plan, stream);
  return job.precondition ? launch_each<T, false, true>(job, plan, stream) : launch_each<T, false, false>(job, plan, stream);
}

int64_t slices_of(int64_t num_blocks) {
  const int64_t slices = num_blocks / SLICE_BLOCKS;
  return slices < 1 ? 1 : slices > MAX_SLICES ? MAX_SLICES : slices;
}

Plan make_plan(const Job& job) {
  Plan plan;
  plan.columns = static_cast<int>(job.sketch_size < MAX_COLUMNS ? job.sketch_size : MAX_COLUMNS);
  plan.column_groups = divide_up(job.sketch_size, plan.columns);
  plan.slices = slices_of(job.num_blocks);
  plan.each = 4;
  while (plan.each > 1 && (plan.each >= job.num_matrices || 2 * plan.each * plan.columns * 4 > COPY_BYTES)) plan.each /= 2;
  return plan;
}

}  // namespace

// Floats of workspace that sketch_matrix needs for `num_blocks` blocks a matrix.
EXPORT int64_t fastsft_sketch_matrix_workspace(int64_t num_matrices, int64_t num_blocks, int64_t sketch_size) {
  return slices_of(num_blocks) * num_matrices * sketch_size;
}

// Adds to out [B, K] the sketches of matrices [B, rows, columns], contiguous, whose first row is row `first_row` of the whole.
EXPORT int fastsft_sketch_matrix(const void* matrices, int is_bf16, const float* precondition, void* total, int total_is_bf16,
                                 int accumulate, float* out, float* workspace, int64_t num_matrices, int64_t rows,
                                 int64_t columns, int64_t first_row, int64_t sketch_size, uint32_t seed, void* stream_handle) {
  const int64_t blocks_per_row = divide_up(columns, BLOCK), num_blocks = rows * blocks_per_row;
  if (num_matrices == 0 || num_blocks == 0) return cudaSuccess;
  const Job job = {matrices, precondition, total, workspace, num_matrices, rows, columns, blocks_per_row, num_blocks,
                   first_row * blocks_per_row, sketch_size, seed, total_is_bf16 != 0, accumulate != 0};
  const Plan plan = make_plan(job);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  // cp.async copies 16 bytes from addresses that are multiples of 16.
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool whole = columns % BLOCK == 0 && aligned(matrices) && aligned(precondition);
  const cudaError_t error =
      is_bf16 ? launch<__nv_bfloat16>(job, plan, whole, stream) : launch<float>(job, plan, whole, stream);
  if (error != cudaSuccess) return error;
  const int64_t size = num_matrices * sketch_size;
  add_slices_kernel<<<static_cast<unsigned>(divide_up(size, 256)), 256, 0, stream>>>(workspace, out, size, plan.slices);
  return cudaGetLastError();
}

// element: 0 float32, 1 bfloat16, 2 float16.
EXPORT int fastsft_count_sketch_signs(void* signs, int element, int64_t columns, int64_t size, uint32_t seed,
                                      void* stream_handle) {
  if (columns == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(divide_up(columns * size, 256));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (element == 0)
    count_sketch_signs_kernel<<<blocks, 256, 0, stream>>>(static_cast<float*>(signs), columns, size, seed);
  else if (element == 1)
    count_sketch_signs_kernel<<<blocks, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(signs), columns, size, seed);
  else
    count_sketch_signs_kernel<<<blocks, 256, 0, stream>>>(static_cast<__half*>(signs), columns, size, seed);
  return cudaGetLastError();
}
