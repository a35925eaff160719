// Column sums of the attention of a few queries over a paged key cache. Contract: kernels/window_attention.py.
//
// Keys are visited twice: the first pass finds the maximum and the sum of every softmax row, the second recomputes the
// logits and sums the finished probabilities per key. Logits live in registers only.
//
// Vector lanes are queries and keys are broadcast, so keys stored as [head_size, block_size] and as
// [block_size, head_size] cost the same, row maxima need no shuffles, and only the column sums reduce over lanes.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include <omp.h>

#include "element.hpp"
#include "isa.hpp"
#include "vector.hpp"

namespace kvevict {
namespace {

// Work is split by token count only, so results do not depend on the number of threads.
constexpr int64_t TASK_TOKENS = 256;
// Scratch of one thread: one tile of TILE_TOKENS keys as float32, 16 KiB for a head size of 64.
constexpr int64_t TILE_TOKENS = 64;
// Lowest finite float rather than -infinity: a row that sees no key of a task must not compute inf - inf.
constexpr float NO_LOGIT = std::numeric_limits<float>::lowest();

struct Job {
  const void* query;
  int64_t query_stride_token, query_stride_head;
  const void* keys;
  int64_t key_stride_page, key_stride_token, key_stride_dim;
  const int64_t* page_table;
  int64_t page_table_stride_head;
  float* column_sums;  // [num_heads, kv_len]
  int32_t query_dtype, key_dtype;
  int64_t window, num_heads, num_kv_heads, head_size, block_size, kv_len;
  float scale;

  // A head's queries fill `row_vectors` vectors; rows past `window` are zero queries of weight zero.
  int64_t row_vectors = 0, rows = 0;
  int64_t tasks_per_head = 0;
  float* packed_query = nullptr;  // [num_heads, row_vectors, head_size, LANES]
  float* row_max = nullptr;       // [num_kv_heads, tasks_per_head, group, rows], logits in units of log 2
  float* row_sum = nullptr;       // same shape
  float* final_max = nullptr;     // [num_heads, rows]
  float* final_weight = nullptr;  // [num_heads, rows], 1 / softmax denominator

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t num_tasks() const { return num_kv_heads * tasks_per_head; }
  bool keys_transposed() const { return key_stride_dim != 1; }
  // First key that some query must not see: query i is the token at kv_len - window + i.
  int64_t first_masked() const { return kv_len - window + 1; }
};

// Up to TILE_TOKENS consecutive keys of one KV head as float32, in the order they are stored in.
struct Tile {
  const float* data;
  int64_t token_stride, dim_stride;
  int64_t first, count;  // cache indices first .. first + count - 1
};

enum class Stage { PACK_QUERY, FIND_SOFTMAX, MERGE_SOFTMAX, SUM_COLUMNS };

template <typename Element, int LANES>
KVEVICT_INLINE void pack_query(const Job& job, int64_t head) {
  // Logits in units of log 2 make the exponential a power of two.
  const float scale = job.scale * 1.4426950408889634f;
  const Element* query = static_cast<const Element*>(job.query) + head * job.query_stride_head;
  float* packed = job.packed_query + head * job.rows * job.head_size;
  for (int64_t row = 0; row < job.rows; ++row) {
    float* out = packed + (row / LANES) * job.head_size * LANES + row % LANES;
    for (int64_t dim = 0; dim < job.head_size; ++dim)
      out[dim * LANES] = row < job.window ? to_float(query[row * job.query_stride_token + dim]) * scale : 0.0f;
  }
}

template <typename Element>
KVEVICT_INLINE Tile load_tile(const Job& job, int64_t kv_head, int64_t first, int64_t count, float* data) {
  const bool transposed = job.keys_transposed();
  // The last micro-tile may reach past `count`: those products must be finite to be masked.
  if (count < TILE_TOKENS) std::fill(data, data + TILE_TOKENS * job.head_size, 0.0f);
  const int64_t* pages = job.page_table + kv_head * job.page_table_stride_head;
  for (int64_t done = 0; done < count;) {
    const int64_t offset = (first + done) % job.block_size;
    const int64_t length = std::min(job.block_size - offset, count - done);
    const Element* source = static_cast<const Element*>(job.keys) +
                            pages[(first + done) / job.block_size] * job.key_stride_page +
                            offset * job.key_stride_token;
    if (transposed) {
      for (int64_t dim = 0; dim < job.head_size; ++dim)
        for (int64_t token = 0; token < length; ++token)
          data[dim * TILE_TOKENS + done + token] = to_float(source[dim * job.key_stride_dim + token]);
    } else {
      for (int64_t token = 0; token < length; ++token)
        for (int64_t dim = 0; dim < job.head_size; ++dim)
          data[(done + token) * job.head_size + dim] = to_float(source[token * job.key_stride_token + dim]);
    }
    done += length;
  }
  return {data, transposed ? 1 : job.head_size, transposed ? TILE_TOKENS : 1, first, count};
}

KVEVICT_INLINE Tile load_tile_any(const Job& job, int64_t kv_head, int64_t first, int64_t count, float* data) {
  if (job.key_dtype == BFLOAT16) return load_tile<BFloat16>(job, kv_head, first, count, data);
  if (job.key_dtype == FLOAT16) return load_tile<Float16>(job, kv_head, first, count, data);
  if (job.key_dtype == FLOAT8_E4M3) return load_tile<Float8E4M3>(job, kv_head, first, count, data);
  if (job.key_dtype == FLOAT8_E5M2) return load_tile<Float8E5M2>(job, kv_head, first, count, data);
  return load_tile<float>(job, kv_head, first, count, data);
}

// Logits of TOKENS keys against VECS vectors of queries; masked ones are -infinity.
template <int LANES, int TOKENS, int VECS>
KVEVICT_INLINE void compute_logits(const Job& job, const Tile& tile, int64_t token, const float* query, int64_t row,
                                   Float<LANES> (&logits)[TOKENS][VECS]) {
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) logits[t][v] = Float<LANES>{};
  const float* keys = tile.data + token * tile.token_stride;
  for (int64_t dim = 0; dim < job.head_size; ++dim) {
    Float<LANES> lanes[VECS];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) lanes[v] = load<LANES>(query + (v * job.head_size + dim) * LANES);
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; ++t) {
      const float key = keys[t * tile.token_stride + dim * tile.dim_stride];
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) logits[t][v] += lanes[v] * key;
    }
  }
  if (tile.first + token + TOKENS <= job.first_masked()) return;

  typename VectorTypes<LANES>::Int query_row;
  for (int lane = 0; lane < LANES; ++lane) query_row[lane] = static_cast<int32_t>(row) + lane;
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; ++t) {
    const int64_t position = tile.first + token + t;
    const int64_t hidden_rows = std::max<int64_t>(position - job.first_masked() + 1, 0);
    // Past the last key of the cache every row is hidden.
    const int32_t first_row =
        position < job.kv_len ? static_cast<int32_t>(hidden_rows) : std::numeric_limits<int32_t>::max();
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v)
      logits[t][v] = query_row + v * LANES >= first_row
                         ? logits[t][v]
                         : broadcast<LANES>(-std::numeric_limits<float>::infinity());
  }
}

// One group of query rows against one tile: brings the running maximum and sum of each row up to date.
template <int LANES, int TOKENS, int VECS>
KVEVICT_INLINE void update_softmax(const Job& job, const Tile& tile, const float* query, int64_t row, float* row_max,
                                   float* row_sum) {
  for (int64_t token = 0; token < tile.count; token += TOKENS) {
    Float<LANES> logits[TOKENS][VECS];
    compute_logits<LANES, TOKENS, VECS>(job, tile, token, query, row, logits);
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) {
      const Float<LANES> old_max = load<LANES>(row_max + v * LANES);
      Float<LANES> max = old_max;
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; ++t) max = larger<LANES>(logits[t][v], max);
      Float<LANES> sum = load<LANES>(row_sum + v * LANES) * exp2_nonpositive<LANES>(old_max - max);
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; ++t) sum += exp2_nonpositive<LANES>(logits[t][v] - max);
      store<LANES>(row_max + v * LANES, max);
      store<LANES>(row_sum + v * LANES, sum);
    }
  }
}

// One query head against one tile: writes the finished sums of the tile's columns.
template <int LANES, int TOKENS, int VECS>
KVEVICT_INLINE void sum_columns(const Job& job, const Tile& tile, int64_t head, float* out) {
  for (int64_t token = 0; token < tile.count; token += TOKENS) {
    Float<LANES> sums[TOKENS] = {};
    for (int64_t row = 0; row < job.rows; row += VECS * LANES) {
      const float* query = job.packed_query + (head * job.rows + row) * job.head_size;
      Float<LANES> logits[TOKENS][VECS];
      compute_logits<LANES, TOKENS, VECS>(job, tile, token, query, row, logits);
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) {
        const Float<LANES> max = load<LANES>(job.final_max + head * job.rows + row + v * LANES);
        const Float<LANES> weight = load<LANES>(job.final_weight + head * job.rows + row + v * LANES);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t) sums[t] += exp2_nonpositive<LANES>(logits[t][v] - max) * weight;
      }
    }
    const int64_t live = std::min<int64_t>(TOKENS, tile.count - token);
    for (int64_t t = 0; t < live; ++t) out[token + t] = sum_lanes<LANES>(sums[t]);
  }
}

template <int LANES>
KVEVICT_INLINE void merge_softmax(const Job& job, int64_t head) {
  const int64_t kv_head = head / job.group(), head_in_group = head % job.group();
  for (int64_t row = 0; row < job.rows; row += LANES) {
    const int64_t first = (kv_head * job.tasks_per_head * job.group() + head_in_group) * job.rows + row;
    const int64_t task_stride = job.group() * job.rows;
    Float<LANES> max = broadcast<LANES>(NO_LOGIT), sum = {};
    for (int64_t task = 0; task < job.tasks_per_head; ++task)
      max = larger<LANES>(load<LANES>(job.row_max + first + task * task_stride), max);
    for (int64_t task = 0; task < job.tasks_per_head; ++task) {
      const int64_t at = first + task * task_stride;
      sum += load<LANES>(job.row_sum + at) * exp2_nonpositive<LANES>(load<LANES>(job.row_max + at) - max);
    }
    Float<LANES> weight = 1.0f / sum;
    for (int lane = 0; lane < LANES; ++lane)
      if (row + lane >= job.window) weight[lane] = 0.0f;
    store<LANES>(job.final_max + head * job.rows + row, max);
    store<LANES>(job.final_weight + head * job.rows + row, weight);
  }
}

template <int LANES, int TOKENS, int VECS>
KVEVICT_INLINE void run_task(const Job& job, Stage stage, int64_t task, float* scratch) {
  const int64_t kv_head = task / job.tasks_per_head, group = job.group(), group_rows = group * job.rows;
  const int64_t begin = task % job.tasks_per_head * TASK_TOKENS;
  const int64_t end = std::min(begin + TASK_TOKENS, job.kv_len);
  float* row_max = job.row_max + task * group_rows;
  float* row_sum = job.row_sum + task * group_rows;
  if (stage == Stage::FIND_SOFTMAX) {
    std::fill(row_max, row_max + group_rows, NO_LOGIT);
    std::fill(row_sum, row_sum + group_rows, 0.0f);
  }
  for (int64_t first = begin; first < end; first += TILE_TOKENS) {
    const Tile tile = load_tile_any(job, kv_head, first, std::min(TILE_TOKENS, end - first), scratch);
    for (int64_t in_group = 0; in_group < group; ++in_group) {
      const int64_t head = kv_head * group + in_group;
      if (stage == Stage::SUM_COLUMNS) {
        sum_columns<LANES, TOKENS, VECS>(job, tile, head, job.column_sums + head * job.kv_len + first);
        continue;
      }
      for (int64_t row = 0; row < job.rows; row += VECS * LANES) {
        const float* query = job.packed_query + (head * job.rows + row) * job.head_size;
        const int64_t at = in_group * job.rows + row;
        update_softmax<LANES, TOKENS, VECS>(job, tile, query, row, row_max + at, row_sum + at);
      }
    }
  }
}

template <int LANES, int TOKENS>
KVEVICT_INLINE void run_stage(const Job& job, Stage stage, int64_t item, float* scratch) {
  if (stage == Stage::MERGE_SOFTMAX) return merge_softmax<LANES>(job, item);
  if (stage == Stage::PACK_QUERY) {
    if (job.query_dtype == BFLOAT16) return pack_query<BFloat16, LANES>(job, item);
    if (job.query_dtype == FLOAT16) return pack_query<Float16, LANES>(job, item);
    return pack_query<float, LANES>(job, item);
  }
  // Two vectors of queries halve the broadcasts; one does not pad a short window to twice its length.
  if (job.row_vectors % 2 == 0) return run_task<LANES, TOKENS, 2>(job, stage, item, scratch);
  return run_task<LANES, 2 * TOKENS, 1>(job, stage, item, scratch);
}

// The code for one instruction set, named by its vector width in floats.
struct Isa {
  int32_t lanes;
  void (*run_stage)(const Job&, Stage, int64_t, float*);
};

// TOKENS * 2 accumulators and 2 query vectors must fit in the registers: 32 with AVX-512 and NEON, else 16.
#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v4"))) void run_stage_v4(const Job& job, Stage stage, int64_t item, float* scratch) {
  run_stage<16, 8>(job, stage, item, scratch);
}
__attribute__((target("arch=x86-64-v3"))) void run_stage_v3(const Job& job, Stage stage, int64_t item, float* scratch) {
  run_stage<8, 4>(job, stage, item, scratch);
}
void run_stage_baseline(const Job& job, Stage stage, int64_t item, float* scratch) {
  run_stage<4, 4>(job, stage, item, scratch);
}
Isa choose_isa(int32_t most_lanes) {
  if (most_lanes >= 16 && __builtin_cpu_supports("x86-64-v4")) return {16, run_stage_v4};
  if (most_lanes >= 8 && __builtin_cpu_supports("x86-64-v3")) return {8, run_stage_v3};
  return {4, run_stage_baseline};
}
#else
void run_stage_baseline(const Job& job, Stage stage, int64_t item, float* scratch) {
  run_stage<4, 8>(job, stage, item, scratch);
}
Isa choose_isa(int32_t) { return {4, run_stage_baseline}; }
#endif

struct AlignedDelete {
  void operator()(float* data) const { ::operator delete[](data, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], AlignedDelete>;

Buffer allocate(int64_t count) {
  void* data = ::operator new[](static_cast<size_t>(count) * sizeof(float), std::align_val_t(64), std::nothrow);
  return Buffer(static_cast<float*>(data));
}

void run_all_stages(const Job& job, const Isa& isa, float* tiles) {
#pragma omp parallel
  {
    float* tile = tiles + omp_get_thread_num() * TILE_TOKENS * job.head_size;
#pragma omp for
    for (int64_t head = 0; head < job.num_heads; ++head) isa.run_stage(job, Stage::PACK_QUERY, head, tile);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < job.num_tasks(); ++task) isa.run_stage(job, Stage::FIND_SOFTMAX, task, tile);
#pragma omp for
    for (int64_t head = 0; head < job.num_heads; ++head) isa.run_stage(job, Stage::MERGE_SOFTMAX, head, tile);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < job.num_tasks(); ++task) isa.run_stage(job, Stage::SUM_COLUMNS, task, tile);
  }
}

}  // namespace
}  // namespace kvevict

// Limits later calls to vectors of this many floats (4 is always there) and returns the width they will use, so that
// tests can run what narrower machines run.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_limit_lanes(int32_t most_lanes) {
  kvevict::most_lanes = most_lanes;
  return kvevict::choose_isa(most_lanes).lanes;
}

// Returns 0, or 1 when scratch memory could not be allocated. Strides count elements; the caller has checked shapes,
// strides and page ids.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_window_attention(
    const void* query, int64_t query_stride_token, int64_t query_stride_head,
    const void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim,
    const int64_t* page_table, int64_t page_table_stride_head,
    float* column_sums,
    int32_t query_dtype, int32_t key_dtype, int64_t window, int64_t num_heads, int64_t num_kv_heads,
    int64_t head_size, int64_t block_size, int64_t kv_len, float scale) {
  using namespace kvevict;
  const Isa isa = choose_isa(most_lanes);
  Job job{query, query_stride_token, query_stride_head,
          keys, key_stride_page, key_stride_token, key_stride_dim,
          page_table, page_table_stride_head,
          column_sums,
          query_dtype, key_dtype, window, num_heads, num_kv_heads, head_size, block_size,
          kv_len, scale};
  job.row_vectors = (window + isa.lanes - 1) / isa.lanes;
  job.rows = job.row_vectors * isa.lanes;
  job.tasks_per_head = (kv_len + TASK_TOKENS - 1) / TASK_TOKENS;

  const int64_t query_count = num_heads * job.rows * head_size;
  const int64_t partial_count = num_heads * job.tasks_per_head * job.rows;
  const int64_t final_count = num_heads * job.rows;
  const int64_t tile_count = omp_get_max_threads() * TILE_TOKENS * head_size;
  const Buffer buffer = allocate(query_count + 2 * partial_count + 2 * final_count + tile_count);
  if (!buffer) return 1;
  job.packed_query = buffer.get();
  job.row_max = job.packed_query + query_count;
  job.row_sum = job.row_max + partial_count;
  job.final_max = job.row_sum + partial_count;
  job.final_weight = job.final_max + final_count;
  run_all_stages(job, isa, job.final_weight + final_count);
  return 0;
}
