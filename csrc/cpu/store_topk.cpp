// Driver of store_topk: hands ranges of rows to threads, each of which keeps its own best rows, and merges them.
#include "store_topk.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace fastsft {
namespace {

// Ranges are cut by shape alone, and their sums added in order: the sums, too, do not depend on the number of threads.
constexpr int64_t ROWS_PER_RANGE = 4096, MAX_RANGES = 64;
constexpr int64_t MAX_SUMS = 1 << 23;           // doubles of all ranges together
constexpr double MIN_PRODUCTS_PER_THREAD = 1e7;  // about 0.1 ms; starting a thread takes a third of that
constexpr float INF = std::numeric_limits<float>::infinity();

struct Entry {
  float key;  // the score, or minus the score: the larger the better
  int64_t row;
};

bool better(const Entry& a, const Entry& b) { return a.key > b.key || (a.key == b.key && a.row < b.row); }

using Heap = std::vector<Entry>;  // the worst of at most k entries in front

// Returns the key that has yet to be passed.
float insert(Heap& heap, int64_t k, Entry entry) {
  if (static_cast<int64_t>(heap.size()) == k) {
    std::pop_heap(heap.begin(), heap.end(), better);
    heap.back() = entry;
  } else {
    heap.push_back(entry);
  }
  std::push_heap(heap.begin(), heap.end(), better);
  return static_cast<int64_t>(heap.size()) == k ? heap.front().key : -INF;
}

struct Heaps {
  Heaps(int64_t num_queries, int64_t k, int64_t num_rows) : k(k), largest(num_queries), smallest(num_queries) {
    for (auto* heaps : {&largest, &smallest})
      for (auto& heap : *heaps) heap.reserve(std::min(k, num_rows));
  }
  int64_t k;
  std::vector<Heap> largest, smallest;
};

template <class T>
struct Lines {  // memory that begins with a cache line, not written
  explicit Lines(int64_t count)
      : memory(static_cast<T*>(::operator new(static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T), ALIGN))) {}
  T* get() const { return memory.get(); }

 private:
  static constexpr std::align_val_t ALIGN{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, ALIGN); }
  };
  std::unique_ptr<T, Free> memory;
};

struct Thread {
  Thread(const TopkJob& job, const TopkKernel& kernel)
      : heaps(job.num_queries, job.k, job.num_rows),
        above(padded(job.num_queries), INF),
        below(padded(job.num_queries), -INF),
        scratch(kernel.scratch_units(job)) {
    std::fill_n(above.begin(), job.num_queries, -INF);
    std::fill_n(below.begin(), job.num_queries, INF);
  }
  Heaps heaps;
  std::vector<float> above, below;
  Lines<uint32_t> scratch;
};

int64_t number_of_ranges(const TopkJob& job) {
  const int64_t by_rows = std::clamp<int64_t>(job.num_rows / ROWS_PER_RANGE, 1, MAX_RANGES);
  if (!job.groups) return by_rows;
  return std::clamp<int64_t>(MAX_SUMS / (job.num_groups * padded(job.num_queries)), 1, by_rows);
}

int useful_threads(const TopkJob& job, int64_t ranges, int asked) {
  const double products =
      static_cast<double>(job.num_rows) * static_cast<double>(job.size) * static_cast<double>(job.num_queries);
  const int64_t worth = 1 + static_cast<int64_t>(std::min(products / MIN_PRODUCTS_PER_THREAD, 1e6));
  return static_cast<int>(std::max<int64_t>(1, std::min({static_cast<int64_t>(asked), worth, ranges})));
}

void write_best(std::vector<Thread>& threads, std::vector<Heap> Heaps::*end, int64_t query, int64_t k, float sign,
                float* scores, int64_t* rows) {
  Heap all;
  for (auto& thread : threads) {
    const Heap& heap = (thread.heaps.*end)[query];
    all.insert(all.end(), heap.begin(), heap.end());
  }
  std::sort(all.begin(), all.end(), better);
  const int64_t found = std::min(k, static_cast<int64_t>(all.size()));
  for (int64_t i = 0; i < found; ++i) {
    scores[query * k + i] = sign * all[i].key;
    rows[query * k + i] = all[i].row;
  }
}

void write_sums(const TopkJob& job, const std::vector<double>& sums, int64_t ranges, double* out) {
  const int64_t Q = job.num_queries, wide = padded(Q), G = job.num_groups;
  for (int64_t range = 0; range < ranges; ++range)
    for (int64_t group = 0; group < G; ++group)
      for (int64_t query = 0; query < Q; ++query) out[query * G + group] += sums[(range * G + group) * wide + query];
}

}  // namespace

void keep(Best& best, int64_t query, float score, int64_t row) {
  auto& heaps = *static_cast<Heaps*>(best.heaps);
  if (score > best.above[query]) best.above[query] = insert(heaps.largest[query], heaps.k, {score, row});
  if (score < best.below[query]) best.below[query] = -insert(heaps.smallest[query], heaps.k, {-score, row});
}

void store_topk(const TopkJob& job, const TopkResult& result, const TopkKernel& kernel, int num_threads) {
  if (job.num_queries == 0 || job.num_rows == 0) return;
  const int64_t wide = padded(job.num_queries), ranges = number_of_ranges(job);
  num_threads = useful_threads(job, ranges, num_threads);

  const Lines<uint32_t> units(kernel.packed_units(job));
  std::vector<int32_t> offsets(job.blocks * wide);
  std::vector<float> steps(job.blocks * wide);
  const PackedQueries packed = {units.get(), offsets.data(), steps.data()};
  kernel.pack(job, packed);

  std::vector<double> sums(job.groups ? ranges * job.num_groups * wide : 0);
  std::vector<Thread> states;
  states.reserve(num_threads);
  for (int t = 0; t < num_threads; ++t) states.emplace_back(job, kernel);
  std::atomic<int64_t> next{0};
  auto work = [&](int t) {
    Thread& state = states[t];
    Best best = {state.above.data(), state.below.data(), &state.heaps};
    // A thread's ranges come in the order of rows, as `keep` asks.
    for (int64_t range = next++; range < ranges; range = next++)
      kernel.scan(job, packed, range * job.num_rows / ranges, (range + 1) * job.num_rows / ranges, best,
                  job.groups ? sums.data() + range * job.num_groups * wide : nullptr, state.scratch.get());
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < num_threads; ++t) threads.emplace_back(work, t);
  work(0);
  for (auto& thread : threads) thread.join();

  for (int64_t query = 0; query < job.num_queries; ++query) {
    write_best(states, &Heaps::largest, query, job.k, 1.0f, result.largest, result.largest_rows);
    write_best(states, &Heaps::smallest, query, job.k, -1.0f, result.smallest, result.smallest_rows);
  }
  if (job.groups) write_sums(job, sums, ranges, result.sums);
}

}  // namespace fastsft
