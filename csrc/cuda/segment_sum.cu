// segment_sum: out[d][a] = sum of values[t][a] over offsets[d] <= t < offsets[d + 1], in float32.
//
// values [T, A] contiguous, offsets [D + 1] nondecreasing, out [D, A]. One block per document and column: thread i adds
// tokens i, i + THREADS, ... and a tree of fixed shape adds the threads up, so the bits depend on the input alone (an
// atomic sum would not keep them).
#include "library.cuh"

namespace {

constexpr int THREADS = 128;

__global__ void segment_sum_kernel(const float* values, const int64_t* offsets, float* out, int64_t num_columns) {
  const int64_t document = blockIdx.x;
  const int64_t last = offsets[document + 1];
  __shared__ float parts[THREADS];
  for (int64_t column = blockIdx.y; column < num_columns; column += gridDim.y) {
    float sum = 0;
    for (int64_t t = offsets[document] + threadIdx.x; t < last; t += THREADS) sum += values[t * num_columns + column];
    parts[threadIdx.x] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) out[document * num_columns + column] = parts[0];
    __syncthreads();
  }
}

}  // namespace

EXPORT int fastsft_segment_sum(const float* values, const int64_t* offsets, float* out, int64_t num_documents,
                               int64_t num_columns, void* stream) {
  if (num_documents == 0 || num_columns == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(num_documents), static_cast<unsigned>(num_columns < 65535 ? num_columns : 65535));
  segment_sum_kernel<<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(values, offsets, out, num_columns);
  return cudaGetLastError();
}
