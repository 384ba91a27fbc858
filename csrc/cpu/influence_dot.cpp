// Driver of influence_dot: cuts the tile grid into units, hands them to threads, adds their parts up in a fixed order.
#include "influence_dot.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace fastsft {
namespace {

// Slots bound the memory of partial results and the useful number of threads. A slot holds a sketch of every document in
// the pass, hence fewer of them when there is a sketch.
constexpr int64_t SLOTS = 64, SLOTS_WITH_SKETCH = 8;
constexpr int64_t MAX_SKETCH_FLOATS = 1 << 20;       // of one slot, in one pass over the documents
constexpr double MIN_FLOPS_PER_THREAD = 1e7;         // 0.1 ms; starting a thread takes a third of that

// How many tiles a unit has along a side of `tiles`, where the other side has `others`. A side of LoRA's rank is one tile, and
// then the other may be long: the longer the stretch of a token's row that packing reads at a time, the nearer to the
// memory's bandwidth it comes.
int64_t panels(int64_t tiles, int64_t others) {
  const int64_t wide = UNIT_TILES / std::clamp<int64_t>(others, UNIT_TILES / MAX_PANELS, 8);
  return std::min(tiles, wide);
}

std::vector<Unit> cut(int64_t row_tiles, int64_t col_tiles) {
  const int64_t rows = panels(row_tiles, col_tiles), cols = panels(col_tiles, row_tiles);
  std::vector<Unit> units;
  for (int64_t row = 0; row < row_tiles; row += rows)
    for (int64_t col = 0; col < col_tiles; col += cols)
      units.push_back({row, std::min(rows, row_tiles - row), col, std::min(cols, col_tiles - col)});
  return units;
}

int64_t longest_document(const InfluenceJob& job) {
  int64_t longest = 0;
  for (int64_t d = 0; d < job.num_documents; ++d) longest = std::max(longest, job.offsets[d + 1] - job.offsets[d]);
  return longest;
}

int useful_threads(const InfluenceJob& job, int64_t num_slots, int asked) {
  const double tokens = static_cast<double>(job.offsets[job.num_documents] - job.offsets[0]);
  const double consumed = static_cast<double>(job.num_documents * (job.num_targets + 4));  // visits of each tile
  const double flops = 2.0 * (tokens + consumed) * static_cast<double>(job.x.cols) * static_cast<double>(job.dy.cols);
  const int64_t worth = 1 + static_cast<int64_t>(flops / MIN_FLOPS_PER_THREAD);
  return static_cast<int>(std::max<int64_t>(1, std::min({static_cast<int64_t>(asked), worth, num_slots})));
}

struct Workspace {
  Workspace(const Unit& largest, int64_t tokens)
      : x(largest.col_tiles * panel_rows(tokens) * TILE),
        dy(largest.row_tiles * panel_rows(tokens) * TILE),
        buckets(MAX_UNIT_BLOCKS),
        twists(MAX_UNIT_BLOCKS) {}
  std::vector<float> x, dy;
  std::vector<uint32_t> buckets, twists;
  Scratch view() { return {x.data(), dy.data(), buckets.data(), twists.data()}; }
};

}  // namespace

void influence_dot(const InfluenceJob& job, float* scores, UnitKernel kernel, int num_threads) {
  const int64_t D = job.num_documents, A = job.num_targets, K = job.sketch ? job.sketch_size : 0;
  const auto units = cut((job.dy.cols + TILE - 1) / TILE, (job.x.cols + TILE - 1) / TILE);
  const int64_t num_units = static_cast<int64_t>(units.size());
  if (num_units == 0) {  // a side of zero
    std::fill(scores, scores + D * A, 0.0f);
    return;
  }
  const int64_t num_slots = std::min(num_units, K ? SLOTS_WITH_SKETCH : SLOTS);
  const int64_t per_pass = K ? std::max<int64_t>(1, MAX_SKETCH_FLOATS / K) : std::max<int64_t>(1, D);
  num_threads = useful_threads(job, num_slots, num_threads);

  std::vector<double> slot_scores(num_slots * std::min(per_pass, D) * A);
  std::vector<float> slot_sketch(num_slots * std::min(per_pass, D) * K);
  std::vector<Workspace> workspaces(num_threads, Workspace(units.front(), longest_document(job)));

  for (int64_t first = 0; first < D; first += per_pass) {
    const int64_t last = std::min(D, first + per_pass), size = last - first;
    std::fill(slot_scores.begin(), slot_scores.end(), 0.0);
    std::fill(slot_sketch.begin(), slot_sketch.end(), 0.0f);
    std::atomic<int64_t> next{0};
    auto work = [&](int thread) {
      const Scratch scratch = workspaces[thread].view();
      for (int64_t s = next++; s < num_slots; s = next++)
        for (int64_t u = s * num_units / num_slots; u < (s + 1) * num_units / num_slots; ++u)
          kernel(job, units[u], first, last, {slot_scores.data() + s * size * A, slot_sketch.data() + s * size * K}, scratch);
    };
    std::vector<std::thread> threads;
    for (int t = 1; t < num_threads; ++t) threads.emplace_back(work, t);
    work(0);
    for (auto& thread : threads) thread.join();

    for (int64_t k = 0; k < size * A; ++k) {
      double sum = 0;
      for (int64_t s = 0; s < num_slots; ++s) sum += slot_scores[s * size * A + k];
      scores[first * A + k] = static_cast<float>(sum);
    }
    for (int64_t s = 0; s < num_slots; ++s)
      for (int64_t k = 0; k < size * K; ++k) job.sketch[first * K + k] += slot_sketch[s * size * K + k];
  }
}

}  // namespace fastsft
