// The body of store_topk's kernels, included by one .cpp per instruction set, after it has defined, in an unnamed namespace,
//   LANES        4-byte lanes of a vector register
//   SUMS         accumulators that stay in registers
//   Floats, Ints GCC vectors of LANES floats, LANES int32
//   load_units   LANES units from memory, as Ints; broadcast, one unit in every lane
//   totals       the sums over the lanes of each of LANES vectors, as one vector
//   passing      a bit for each lane of scores which is above or below the thresholds
//   Bf16, Int8, Bits, each with
//     Sum               Floats or Ints
//     UNIT, ROW_BYTES   numbers of a unit; bytes of a row that give LANES units
//     DIRECT            a row in memory is the units already
//     SCALED            products are of integers, and a block of a row and of a query has a scale
//     WEIGHT, OFFSET    where SCALED: the dot product is OFFSET * (sum of the query's numbers) + WEIGHT * (what `add` summed)
//     row, query        LANES units from a row, from a query
//     add               sum + row * query
// and it ends with TOPK_KERNEL(name). Everything else has internal linkage, and no template of the standard library is used:
// an inline function compiled here with AVX flags must not be the copy that the linker keeps for the rest of the program.
//
// Two ways to a score. For LANES queries at a time, lanes are queries: a unit of a row is broadcast and multiplied with the
// packed queries, so that nothing is ever summed across lanes, and the thresholds are compared vector by vector. A few queries
// left over would fill too few lanes: there lanes run along the row, and LANES dot products (rows by queries) are reduced
// together.

namespace fastsft {
namespace {

// The queries of a tile and two blocks of rows, of which the next is being prefetched, must stay in L2.
constexpr int64_t BLOCK_BYTES = 1 << 17;
constexpr int64_t AHEAD_BYTES = 1 << 12;  // what dot products prefetch beyond the rows at hand
constexpr int CHAINS = 4;  // sums that run beside each other along one row
constexpr int MAX_TILE_VECS = 4;
constexpr int STRIDE = 16;  // units between prefetches: a cache line. A block of a row is a multiple of 64 numbers.

constexpr int tile_rows(int vecs) { return SUMS / (vecs < 2 ? 2 : vecs); }

inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  static_assert(sizeof(T) == 4, "");
  __builtin_memcpy(p, &v, sizeof(v));
}

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// How many queries (padding included) are taken LANES at a time. Half-filled lanes cost what the dot products of as many do.
inline int64_t lane_queries(int64_t queries) {
  const int64_t over = queries % LANES;
  return over > LANES / 2 ? queries - over + LANES : queries - over;
}

// The queries left over, padded to a power of two: the width of a tile of dot products.
inline int dot_queries(int64_t queries) {
  const int64_t left = queries - lane_queries(queries);
  int width = left < 1 ? 0 : 1;
  while (width < left) width *= 2;
  return width;
}

template <class F>
int64_t units_of(const TopkJob& job) { return job.size / F::UNIT; }

template <class F>
int64_t block_rows(const TopkJob& job) {
  const int64_t groups = BLOCK_BYTES / (units_of<F>(job) * 4 * SUMS);
  return SUMS * (groups < 1 ? 1 : groups);  // a multiple of tile_rows of 1, 2, 3 and 4
}

template <class F>
int64_t packed_units(const TopkJob& job) {
  return (lane_queries(job.num_queries) + dot_queries(job.num_queries)) * units_of<F>(job);
}

template <class F>
int64_t scratch_units(const TopkJob& job) {
  return F::DIRECT || lane_queries(job.num_queries) == 0 ? 0 : block_rows<F>(job) * units_of<F>(job);
}

inline void pack_blocks(const TopkJob& job, const PackedQueries& packed, int32_t offset) {
  const int64_t wide = padded(job.num_queries), numbers = job.size / job.blocks;
  for (int64_t q = 0; q < job.num_queries; ++q)
    for (int64_t m = 0; m < job.blocks; ++m) {
      const int8_t* block = reinterpret_cast<const int8_t*>(job.queries) + q * job.size + m * numbers;
      int32_t sum = 0;
      for (int64_t j = 0; j < numbers; ++j) sum += block[j];
      packed.offsets[m * wide + q] = offset * sum;
      packed.steps[m * wide + q] = job.steps[q * job.blocks + m];
    }
}

// Tiles of up to 4 vectors of queries [units, vecs, LANES], then the rest as rows of units. Padding is zero.
template <class F>
void pack(const TopkJob& job, const PackedQueries& packed) {
  const int64_t units = units_of<F>(job), Q = job.num_queries, lanes = lane_queries(Q), places = lanes + dot_queries(Q);
  const int64_t query_bytes = F::SCALED ? job.size : job.size * 2;
  for (int64_t u = 0; u < units; u += LANES)
    for (int64_t q = 0; q < places; ++q) {
      uint32_t numbers[LANES] = {};
      if (q < Q) store(numbers, F::query(job.queries + q * query_bytes, u / LANES));
      const int64_t tile = q / (MAX_TILE_VECS * LANES) * MAX_TILE_VECS * LANES;
      const int64_t width = at_most(lanes - tile, MAX_TILE_VECS * LANES);
      for (int64_t i = 0; i < LANES; ++i)
        packed.units[q < lanes ? tile * units + (u + i) * width + q - tile : q * units + u + i] = numbers[i];
    }
  if constexpr (F::SCALED) pack_blocks(job, packed, F::OFFSET);
}

// score + product, not fused, as compilers would in some kernels and not in others: the same bits in all of them.
inline Floats add_product(Floats score, Floats product) {
  __asm__("" : "+m"(product));
  return score + product;
}

template <class F, int ROWS, int VECS>
inline void multiply_tile(const uint8_t* rows, int64_t row_bytes, const uint32_t* queries, int64_t units, const uint8_t* next,
                          int64_t next_bytes, typename F::Sum* out) {
  typename F::Sum sum[ROWS][VECS] = {};
  for (int64_t begin = 0; begin < units; begin += STRIDE) {
    if (next)
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next + r * next_bytes + begin / LANES * F::ROW_BYTES, 0, 2);
    for (int64_t u = begin; u < begin + STRIDE; ++u) {
      Ints query[VECS];
      for (int v = 0; v < VECS; ++v) query[v] = load_units(queries + (u * VECS + v) * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Ints row = broadcast(rows + r * row_bytes + u * 4);
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) sum[r][v] = F::add(sum[r][v], row, query[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) out[r * VECS + v] = sum[r][v];
}

inline void take(const float* scores, int64_t query, int64_t number, Best& best) {
  unsigned bits = passing(load(scores), load(best.above + query), load(best.below + query));
  for (; bits; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    keep(best, query + lane, scores[lane], number);
  }
}

struct Rows {                // consecutive rows as units: in memory, or widened into the scratch
  const uint8_t* units;
  int64_t bytes;             // of a row
  int64_t first;             // its number within the job
};

// ROWS rows against VECS * LANES queries from `query` on.
template <class F, int ROWS, int VECS>
void score_tile(const TopkJob& job, const PackedQueries& packed, const Rows& rows, int64_t query, const uint8_t* next,
                Best& best, double* sums) {
  const int64_t units = units_of<F>(job) / job.blocks, wide = padded(job.num_queries);
  const uint32_t* queries = packed.units + query * units_of<F>(job);
  alignas(64) float scores[ROWS * VECS * LANES] = {};
  for (int64_t m = 0; m < job.blocks; ++m) {
    typename F::Sum sum[ROWS * VECS];
    const uint8_t* ahead = next ? next + m * (job.row_bytes / job.blocks) : nullptr;
    multiply_tile<F, ROWS, VECS>(rows.units + m * units * 4, rows.bytes, queries + m * units * VECS * LANES, units, ahead,
                                 job.row_bytes, sum);
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECS; ++v) {
        float* score = scores + (r * VECS + v) * LANES;
        if constexpr (F::SCALED) {
          const int64_t at = m * wide + query + v * LANES;
          const Ints dot = load_units(packed.offsets + at) + sum[r * VECS + v] * F::WEIGHT;
          const Floats scale = job.scales[(rows.first + r) * job.blocks + m] * load(packed.steps + at);
          store(score, add_product(load(score), __builtin_convertvector(dot, Floats) * scale));
        } else {
          store(score, sum[r * VECS + v]);
        }
      }
  }
  for (int r = 0; r < ROWS; ++r) {
    const int64_t n = rows.first + r;
    for (int v = 0; v < VECS; ++v) take(scores + (r * VECS + v) * LANES, query + v * LANES, job.first_row + n, best);
    if (sums && job.groups[n] >= 0) {
      double* sum = sums + job.groups[n] * wide + query;
      for (int i = 0; i < VECS * LANES; ++i) sum[i] += scores[r * VECS * LANES + i];
    }
  }
}

// `count` rows against VECS * LANES queries. `next` is where the rows are of which the scan goes on, or null.
template <class F, int VECS>
void score_rows(const TopkJob& job, const PackedQueries& packed, Rows rows, int64_t count, int64_t query, const uint8_t* next,
                Best& best, double* sums) {
  constexpr int ROWS = tile_rows(VECS);
  int64_t row = 0;
  for (; row + ROWS <= count; row += ROWS) {
    const Rows some = {rows.units + row * rows.bytes, rows.bytes, rows.first + row};
    score_tile<F, ROWS, VECS>(job, packed, some, query, next ? next + row * job.row_bytes : nullptr, best, sums);
  }
  for (; row < count; ++row) {
    const Rows one = {rows.units + row * rows.bytes, rows.bytes, rows.first + row};
    score_tile<F, 1, VECS>(job, packed, one, query, nullptr, best, sums);
  }
}

template <class F>
void scan_lanes(const TopkJob& job, const PackedQueries& packed, int64_t first, int64_t count, Best& best, double* sums,
                uint32_t* scratch) {
  const int64_t lanes = lane_queries(job.num_queries), units = units_of<F>(job);
  if (lanes == 0) return;
  const uint8_t* data = job.data + first * job.row_bytes;
  Rows rows = {data, job.row_bytes, first};
  if (!F::DIRECT) {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t v = 0; v < units / LANES; ++v)
        store(scratch + row * units + v * LANES, F::row(data + row * job.row_bytes, v));
    rows = {reinterpret_cast<const uint8_t*>(scratch), units * 4, first};
  }
  for (int64_t query = 0; query < lanes; query += MAX_TILE_VECS * LANES) {
    const int64_t vecs = at_most(lanes - query, MAX_TILE_VECS * LANES) / LANES;
    const bool is_last = query + vecs * LANES == lanes;
    const uint8_t* next = is_last ? data + count * job.row_bytes : nullptr;
    if (vecs == 4) score_rows<F, 4>(job, packed, rows, count, query, next, best, sums);
    else if (vecs == 3) score_rows<F, 3>(job, packed, rows, count, query, next, best, sums);
    else if (vecs == 2) score_rows<F, 2>(job, packed, rows, count, query, next, best, sums);
    else score_rows<F, 1>(job, packed, rows, count, query, next, best, sums);
  }
}

// The dot product of a row with one query, as a vector of partial sums. Rows one after the other, as memory
// gives a single stream no slower than eight rows at a time (measured up to a fifth faster, on a busy machine).
template <class F>
inline typename F::Sum dot_row(const uint8_t* row, const uint32_t* query, int64_t vecs) {
  typename F::Sum sum[CHAINS] = {};
  int64_t v = 0;
  for (; v + CHAINS <= vecs; v += CHAINS)
#pragma GCC unroll 8
    for (int c = 0; c < CHAINS; ++c) {
      const int64_t at = (v + c) * F::ROW_BYTES;
      if (at % 64 < F::ROW_BYTES) __builtin_prefetch(row + at + AHEAD_BYTES, 0, 3);  // once a cache line
      sum[c] = F::add(sum[c], F::row(row, v + c), load_units(query + (v + c) * LANES));
    }
  for (; v < vecs; ++v) sum[0] = F::add(sum[0], F::row(row, v), load_units(query + v * LANES));
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Dot products of ROWS rows with QUERIES queries, one vector of partial sums each.
template <class F, int ROWS, int QUERIES>
inline void dot_tile(const uint8_t* rows, int64_t row_bytes, const uint32_t* queries, int64_t stride, int64_t vecs,
                     typename F::Sum* out) {
  const int64_t ahead = AHEAD_BYTES + ROWS * row_bytes;
  typename F::Sum sum[ROWS][QUERIES] = {};
  for (int64_t v = 0; v < vecs; ++v) {
    Ints query[QUERIES];
#pragma GCC unroll 8
    for (int q = 0; q < QUERIES; ++q) query[q] = load_units(queries + q * stride + v * LANES);
    const bool is_line = v * F::ROW_BYTES % 64 < F::ROW_BYTES;  // prefetch once a cache line
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      if (is_line) __builtin_prefetch(rows + r * row_bytes + v * F::ROW_BYTES + ahead, 0, 3);
      const Ints row = F::row(rows + r * row_bytes, v);
#pragma GCC unroll 8
      for (int q = 0; q < QUERIES; ++q) sum[r][q] = F::add(sum[r][q], row, query[q]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < QUERIES; ++q) out[r * QUERIES + q] = sum[r][q];
}

// One value a query, for the lanes of a tile.
template <int QUERIES, class V, class T>
inline V along_queries(const T* values) {
  V v = {};
  for (int i = 0; i < LANES; ++i) v[i] = values[i % QUERIES];
  return v;
}

template <int QUERIES>
inline Floats along_rows(const float* values, int64_t stride) {
  if (QUERIES == 1 && stride == 1) return load(values);
  Floats v = {};
  for (int i = 0; i < LANES; ++i) v[i] = values[i / QUERIES * stride];
  return v;
}

// Scores of the rows from `first` on, HEIGHT or `count` of them, for QUERIES queries: lane r * QUERIES + q.
template <class F, int QUERIES>
Floats score_dots(const TopkJob& job, const PackedQueries& packed, int64_t first, int64_t count, int64_t query) {
  constexpr int HEIGHT = LANES / QUERIES;
  const int64_t units = units_of<F>(job), vecs = units / job.blocks / LANES, bytes = job.row_bytes;
  Floats score = {};
  for (int64_t m = 0; m < job.blocks; ++m) {
    typename F::Sum sum[LANES] = {};
    const uint32_t* queries = packed.units + query * units + m * vecs * LANES;
    const uint8_t* rows = job.data + first * bytes + m * (bytes / job.blocks);
    if constexpr (QUERIES == 1) {
      for (int64_t r = 0; r < count; ++r) sum[r] = dot_row<F>(rows + r * bytes, queries, vecs);
    } else if (count == HEIGHT) {
      dot_tile<F, HEIGHT, QUERIES>(rows, bytes, queries, units, vecs, sum);
    } else {
      for (int64_t r = 0; r < count; ++r)
        dot_tile<F, 1, QUERIES>(rows + r * bytes, bytes, queries, units, vecs, sum + r * QUERIES);
    }
    if constexpr (F::SCALED) {
      const int64_t at = m * padded(job.num_queries) + query;
      const Ints dot = along_queries<QUERIES, Ints>(packed.offsets + at) + totals(sum) * F::WEIGHT;
      const float* scales = job.scales + first * job.blocks + m;
      alignas(64) float last[LANES] = {};
      if (count < HEIGHT) {  // not to read past the end
        for (int64_t r = 0; r < count; ++r) last[r] = scales[r * job.blocks];
      }
      const Floats scale = count < HEIGHT ? along_rows<QUERIES>(last, 1) : along_rows<QUERIES>(scales, job.blocks);
      score = add_product(score, __builtin_convertvector(dot, Floats) *
                                     (scale * along_queries<QUERIES, Floats>(packed.steps + at)));
    } else {
      score = totals(sum);
    }
  }
  return score;
}

// `count` rows against the queries that are left over.
template <class F, int QUERIES>
void scan_dots(const TopkJob& job, const PackedQueries& packed, int64_t first, int64_t count, Best& best, double* sums) {
  constexpr int HEIGHT = LANES / QUERIES;
  const int64_t query = lane_queries(job.num_queries);
  for (int64_t row = first; row < first + count; row += HEIGHT) {
    const int64_t some = at_most(first + count - row, HEIGHT);
    const Floats scores = score_dots<F, QUERIES>(job, packed, row, some, query);
    unsigned bits = passing(scores, along_queries<QUERIES, Floats>(best.above + query),
                            along_queries<QUERIES, Floats>(best.below + query));
    bits &= (1u << some * QUERIES) - 1;
    if (!bits && !sums) continue;
    alignas(64) float lanes[LANES];
    store(lanes, scores);
    for (; bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      keep(best, query + lane % QUERIES, lanes[lane], job.first_row + row + lane / QUERIES);
    }
    for (int64_t r = 0; sums && r < some; ++r) {
      const int64_t group = job.groups[row + r];
      if (group < 0) continue;
      for (int q = 0; q < QUERIES; ++q) sums[group * padded(job.num_queries) + query + q] += lanes[r * QUERIES + q];
    }
  }
}

template <class F>
void scan_rest(const TopkJob& job, const PackedQueries& packed, int64_t first, int64_t count, Best& best, double* sums) {
  const int queries = dot_queries(job.num_queries);
  if (queries == 1) scan_dots<F, 1>(job, packed, first, count, best, sums);
  if (queries == 2) scan_dots<F, 2>(job, packed, first, count, best, sums);
  if constexpr (LANES >= 8) {
    if (queries == 4) scan_dots<F, 4>(job, packed, first, count, best, sums);
  }
  if constexpr (LANES >= 16) {
    if (queries == 8) scan_dots<F, 8>(job, packed, first, count, best, sums);
  }
}

template <class F>
void scan(const TopkJob& job, const PackedQueries& packed, int64_t first, int64_t last, Best& best, double* sums,
          uint32_t* scratch) {
  const int64_t rows = block_rows<F>(job);
  for (int64_t row = first; row < last; row += rows) {
    const int64_t count = at_most(last - row, rows);
    scan_lanes<F>(job, packed, row, count, best, sums, scratch);
    scan_rest<F>(job, packed, row, count, best, sums);
  }
}

#define BY_FORMAT(function, job, ...)                                                 \
  switch ((job).format) {                                                             \
    case RowFormat::bf16: return function<Bf16>(__VA_ARGS__);                         \
    case RowFormat::int8: return function<Int8>(__VA_ARGS__);                         \
    default: return function<Bits>(__VA_ARGS__);                                      \
  }

int64_t any_packed_units(const TopkJob& job) { BY_FORMAT(packed_units, job, job) }
int64_t any_scratch_units(const TopkJob& job) { BY_FORMAT(scratch_units, job, job) }
void any_pack(const TopkJob& job, const PackedQueries& packed) { BY_FORMAT(pack, job, job, packed) }
void any_scan(const TopkJob& job, const PackedQueries& packed, int64_t first, int64_t last, Best& best, double* sums,
              uint32_t* scratch) {
  BY_FORMAT(scan, job, job, packed, first, last, best, sums, scratch)
}

}  // namespace
}  // namespace fastsft

#define TOPK_KERNEL(name) \
  const fastsft::TopkKernel fastsft::name = {any_packed_units, any_scratch_units, any_pack, any_scan};
