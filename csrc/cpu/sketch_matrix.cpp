// Driver of sketch_matrix: cuts a matrix's blocks into slots, hands slots and groups of matrices to threads, adds the slots'
// parts up in a fixed order.
#include "sketch_matrix.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace fastsft {
namespace {

constexpr int64_t BLOCK = 16;
constexpr int64_t MAX_SLOTS = 16;
// A slot reads this many times as much as the part it leaves behind, so that adding the parts up stays small.
constexpr int64_t SLOT_TO_SKETCH = 32;
constexpr int64_t MAX_PART_FLOATS = 1 << 22;        // of all slots, in one pass over the matrices
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 300000;  // 0.1 ms; starting a thread takes a third of that

// Hands the numbers 0 <= i < count to threads.
template <class Work>
void share(int64_t count, int num_threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto loop = [&] {
    for (int64_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < std::min<int64_t>(num_threads, count); ++t) threads.emplace_back(loop);
  loop();
  for (auto& thread : threads) thread.join();
}

}  // namespace

void sketch_matrix(const SketchJob& job, SketchKernel kernel, int num_threads) {
  const int64_t B = job.num_matrices, K = job.sketch_size, elements = job.rows * job.cols;
  if (B == 0 || elements == 0) return;
  const int64_t num_blocks = job.rows * ((job.cols + BLOCK - 1) / BLOCK);
  const int64_t num_slots = std::clamp<int64_t>(elements / (SLOT_TO_SKETCH * K), 1, MAX_SLOTS);
  num_threads = static_cast<int>(std::min<int64_t>(num_threads, 1 + B * elements / MIN_ELEMENTS_PER_THREAD));
  const int64_t per_pass = num_slots == 1 ? B : std::max<int64_t>(1, MAX_PART_FLOATS / (num_slots * K));
  const int64_t num_parts = num_slots == 1 ? 0 : num_slots * std::min(per_pass, B) * K;
  const std::unique_ptr<float[]> parts(new float[num_parts]);  // not a vector, which would write zeros once more

  for (int64_t first = 0; first < B; first += per_pass) {
    const int64_t size = std::min(per_pass, B - first);
    float* const out = job.out + first * K;
    std::fill(parts.get(), parts.get() + num_parts, 0.0f);
    // One thread owns a slot's share of the total, hence all its matrices. Groups change no bits.
    const int64_t num_groups = job.total ? 1 : std::min<int64_t>(size, num_threads);
    share(num_slots * num_groups, num_threads, [&](int64_t i) {
      const int64_t slot = i / num_groups, group = i % num_groups;
      const int64_t begin = group * size / num_groups, end = (group + 1) * size / num_groups;
      float* const part = num_slots == 1 ? out : parts.get() + slot * size * K;
      kernel(job, slot * num_blocks / num_slots, (slot + 1) * num_blocks / num_slots, first + begin, end - begin,
             part + begin * K);
    });
    if (num_slots == 1) continue;
    for (int64_t slot = 0; slot < num_slots; ++slot)
      for (int64_t k = 0; k < size * K; ++k) out[k] += parts[slot * size * K + k];
  }
}

}  // namespace fastsft
