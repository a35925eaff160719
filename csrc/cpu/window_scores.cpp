// Scores of cached tokens by the attention that the last queries of each request pay. Contract: kernels/window_scores.py.
//
// Keys are visited twice: the first pass finds the maximum and the sum of every softmax row, the second recomputes the
// logits and sums the finished probabilities per key. Logits live in registers only.
//
// Vector lanes are tokens and queries are broadcast: the sums of columns, their reduction over a group and the pool need
// no shuffles, and a window of one query leaves no lane idle. Keys stored as [block_size, head_size] are transposed when
// they are loaded, once for all queries of their KV head.
//
// Where AMX multiplies bfloat16, its products take the place of the broadcasts: those of 16 rows and 64 keys at a time
// are read back from the first cache.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <omp.h>

#include "buffer.hpp"
#include "element.hpp"
#include "isa.hpp"
#include "pages.hpp"
#include "products.hpp"
#include "tiles.hpp"
#include "vector.hpp"

namespace kvevict {
namespace {

// Work is split by token count only, so results do not depend on the number of threads.
constexpr int64_t TASK_TOKENS = 256;
// A row's exponents are taken relative to one of its logits, not to the largest: that may exceed it by this power of two
// before the sum is rescaled, which then happens a few times per task only.
constexpr float SLACK = 16.0f;

enum Group : int32_t { GROUP_SUM = 0, GROUP_MAX = 1 };
enum Pool : int32_t { POOL_MAX = 0, POOL_AVG = 1 };
enum Weight : int32_t { NO_WEIGHT = 0, VALUE_NORM = 1, LARGEST_VALUE_NORM = 2 };

// Consecutive tokens of one item, which is one KV head of one request: cache indices first .. first + count - 1.
struct Span {
  int64_t item, first, count;
};

struct Job {
  const void* query;
  int64_t query_stride_req, query_stride_token, query_stride_head;
  PagePool<const void> keys, values;
  const int64_t* page_table;
  int64_t page_table_stride_req, page_table_stride_head;
  const int64_t* kv_lens;
  float* scores;  // [num_reqs, num_kv_heads, max_kv_len]
  int32_t query_dtype, key_dtype;
  int64_t num_reqs, window, num_heads, num_kv_heads, head_size, value_head_size, block_size, max_kv_len;
  int64_t num_unscored;  // tokens at the end of a request
  float scale, query_weight, value_scale;
  float softcap;       // of logits; 0: none
  const float* sinks;  // [num_reqs, num_heads], the logit of a sink of each query head; null: none
  int32_t group_code, pool_code, weight_code;
  int64_t pool_kernel;

  // A head's queries fill whole blocks of rows; rows past `window` are zero queries of weight zero.
  int64_t rows = 0, tasks_per_head = 0, column_stride = 0;
  // [num_items, group * rows / ROWS, head_size, ROWS], with the scale in it; for AMX, bfloat16 without the scale and
  // [num_items, group * rows / TILE_ROWS, head_size / TILE_DEPTH, TILE_ROWS, TILE_DEPTH]
  float* packed_query = nullptr;
  float* row_max = nullptr;       // [num_items, tasks_per_head, group * rows], logits in units of log 2
  float* row_sum = nullptr;       // same shape
  float* final_max = nullptr;     // [num_items, group * rows]
  float* final_weight = nullptr;  // [num_items, group * rows], query_weight / softmax denominator
  float* task_norm = nullptr;     // [num_items, tasks_per_head], largest norm of a task's values
  float* columns = nullptr;       // [num_items, column_stride], reduced over the group, with zeros around

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t group_rows() const { return group() * rows; }
  int64_t num_items() const { return num_reqs * num_kv_heads; }
  int64_t num_tasks() const { return num_items() * tasks_per_head; }
  int64_t kv_len(int64_t item) const { return kv_lens[item / num_kv_heads]; }
  int64_t num_scored(int64_t item) const { return kv_len(item) - num_unscored; }
  float logit_scale() const { return scale * LOG2_E; }
  float logit_cap() const { return softcap * LOG2_E; }
  uint16_t* tiled_query() const { return reinterpret_cast<uint16_t*>(packed_query); }
  int64_t pool_reach() const { return pool_kernel / 2; }
  Tokens tokens_of(const Span& span) const {
    const int64_t req = span.item / num_kv_heads, kv_head = span.item % num_kv_heads;
    const int64_t* pages = page_table + req * page_table_stride_req + kv_head * page_table_stride_head;
    return {pages, block_size, span.first, span.count};
  }
  static int64_t thread_scratch(int64_t head_size, int64_t group_rows, int64_t lanes) {
    return TILE_TOKENS * head_size + group_rows * lanes + TASK_TOKENS;
  }
};

enum class Stage { PACK_QUERY, FIND_SOFTMAX, MERGE_SOFTMAX, SUM_COLUMNS, FINISH };

template <typename Element>
KVEVICT_INLINE void pack_query(const Job& job, int64_t item) {
  const float scale = job.logit_scale();
  const int64_t req = item / job.num_kv_heads, kv_head = item % job.num_kv_heads;
  float* packed = job.packed_query + item * job.group_rows() * job.head_size;
  for (int64_t row = 0; row < job.group_rows(); ++row) {
    const int64_t head = kv_head * job.group() + row / job.rows, token = row % job.rows;
    const Element* query = static_cast<const Element*>(job.query) + req * job.query_stride_req +
                           token * job.query_stride_token + head * job.query_stride_head;
    float* out = packed + row / ROWS * job.head_size * ROWS + row % ROWS;
    for (int64_t dim = 0; dim < job.head_size; ++dim)
      out[dim * ROWS] = token < job.window ? to_float(query[dim]) * scale : 0.0f;
  }
}

KVEVICT_INLINE void pack_tiled_query(const Job& job, int64_t item) {
  const int64_t req = item / job.num_kv_heads, kv_head = item % job.num_kv_heads;
  uint16_t* packed = job.tiled_query() + item * job.group_rows() * job.head_size;
  for (int64_t row = 0; row < job.group_rows(); ++row) {
    const int64_t head = kv_head * job.group() + row / job.rows, token = row % job.rows;
    const BFloat16* query = static_cast<const BFloat16*>(job.query) + req * job.query_stride_req +
                            token * job.query_stride_token + head * job.query_stride_head;
    uint16_t* out = packed + row / TILE_ROWS * TILE_ROWS * job.head_size + row % TILE_ROWS * TILE_DEPTH;
    for (int64_t dim = 0; dim < job.head_size; ++dim)
      out[dim / TILE_DEPTH * TILE_ELEMENTS + dim % TILE_DEPTH] = token < job.window ? query[dim].bits : 0;
  }
}

// Writes keys as AMX takes them: bfloat16 [TILE_TOKENS / TILE_COLUMNS, head_size / 2, TILE_COLUMNS, 2].
KVEVICT_INLINE void load_tiled_keys(const Job& job, const Span& span, uint32_t* pairs) {
  const int64_t num_pairs = job.head_size / 2;
  if (span.count < TILE_TOKENS) std::fill(pairs, pairs + TILE_TOKENS * num_pairs, 0u);
  const PagePool<const void>& keys = job.keys;
  for_each_run<BFloat16>(keys, job.tokens_of(span),
                         [&](int64_t done, int64_t length, const BFloat16* source) KVEVICT_INLINE_LAMBDA {
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      const BFloat16 *first = source + 2 * pair * keys.stride_dim, *second = first + keys.stride_dim;
      uint32_t* out = pairs + pair * TILE_COLUMNS;
      int64_t token = 0;
      if (keys.stride_token == 1 && done % TILE_COLUMNS == 0)
        for (; token + TILE_COLUMNS <= length; token += TILE_COLUMNS)
          for (int64_t i = 0; i < TILE_COLUMNS; ++i)
            out[(done + token) * num_pairs + i] = first[token + i].bits | static_cast<uint32_t>(second[token + i].bits) << 16;
      for (; token < length; ++token) {
        const int64_t at = done + token, from = token * keys.stride_token;
        out[at / TILE_COLUMNS * TILE_COLUMNS * num_pairs + at % TILE_COLUMNS] =
            first[from].bits | static_cast<uint32_t>(second[from].bits) << 16;
      }
    }
  });
}

// Loads keys into a thread's scratch as `compute_logits` reads them. AMX takes half of it, and its products the other half.
template <int LANES, bool TILES>
KVEVICT_INLINE void load_tile(const Job& job, const Span& tile, float* keys) {
  if constexpr (TILES) {
    load_tiled_keys(job, tile, reinterpret_cast<uint32_t*>(keys));
  } else {
    load_keys_by_dimension<LANES>(job.keys, job.key_dtype, job.tokens_of(tile), job.head_size, keys);
  }
}

template <typename Element, int LANES>
KVEVICT_INLINE void load_value_norms_of(const Job& job, const Span& span, float* norms) {
  for_each_run<Element>(job.values, job.tokens_of(span),
                        [&](int64_t done, int64_t length, const Element* source) KVEVICT_INLINE_LAMBDA {
    for (int64_t token = 0; token < length; ++token) {
      const Element* value = source + token * job.values.stride_token;
      Float<LANES> sums = {};
      int64_t dim = 0;
      for (; dim + LANES <= job.value_head_size; dim += LANES) sums += magnitude<LANES>(convert<LANES>(value + dim));
      float norm = sum_lanes<LANES>(sums);
      for (; dim < job.value_head_size; ++dim) norm += std::abs(to_float(value[dim]));
      norms[done + token] = norm * job.value_scale;
    }
  });
}

// Writes the l1 norm of each value of a span.
template <int LANES>
KVEVICT_INLINE void load_value_norms(const Job& job, const Span& span, float* norms) {
  with_cache_type(job.key_dtype, [&](auto element) KVEVICT_INLINE_LAMBDA {
    load_value_norms_of<decltype(element), LANES>(job, span, norms);
  });
}

// Logits of VECS vectors of keys against one block of rows; masked ones are -infinity.
//
// With TILES the first of every TILE_ROWS rows computes the products of all of them, behind the keys.
template <int LANES, int VECS, bool TILES>
KVEVICT_INLINE void compute_logits(const Job& job, const Span& tile, float* keys, int64_t token, int64_t row,
                                   Float<LANES> (&logits)[ROWS][VECS]) {
  if constexpr (TILES) {
    static_assert(VECS * LANES == TILE_TOKENS);
    float* products = keys + TILE_TOKENS * job.head_size / 2;
    const uint16_t* query = job.tiled_query() + (tile.item * job.group_rows() + row) * job.head_size;
    if (row % TILE_ROWS == 0) multiply_tiles(query, reinterpret_cast<const uint16_t*>(keys), job.head_size, products);
    products += row % TILE_ROWS * TILE_TOKENS;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v)
        logits[r][v] = load<LANES>(products + r * TILE_TOKENS + v * LANES) * job.logit_scale();
  } else {
    const float* query = job.packed_query + (tile.item * job.group_rows() + row) * job.head_size;
    multiply_rows<LANES, VECS>(query, keys + token, job.head_size, logits);
  }
  if (job.softcap > 0)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECS; ++v) logits[r][v] = soft_capped<LANES>(logits[r][v], job.logit_cap());
  const int64_t first_query = job.kv_len(tile.item) - job.window;
  if (tile.first + token + VECS * LANES <= first_query + 1) return;

#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    const int64_t last_seen = first_query + std::min((row + r) % job.rows, job.window - 1);
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v)
      logits[r][v] = keep_first<LANES>(logits[r][v], static_cast<int32_t>(last_seen + 1 - tile.first - token - v * LANES));
  }
}
// One block of rows against VECS vectors of keys: brings the running reference and sum of each row up to date.
template <int LANES, int VECS>
KVEVICT_INLINE void update_softmax(const Float<LANES> (&logits)[ROWS][VECS], float* row_max, float* lane_sums) {
  Float<LANES> top[ROWS], excess = broadcast<LANES>(NO_LOGIT);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    top[r] = logits[r][0];
#pragma GCC unroll 4
    for (int v = 1; v < VECS; ++v) top[r] = larger<LANES>(logits[r][v], top[r]);
    excess = larger<LANES>(top[r] - row_max[r], excess);
  }
  if (largest_lane<LANES>(excess) > SLACK) {
    for (int r = 0; r < ROWS; ++r) {
      const float max = std::max(row_max[r], largest_lane<LANES>(top[r]));
      const Float<LANES> rescale = exp2_limited<LANES>(broadcast<LANES>(row_max[r] - max));
      store<LANES>(lane_sums + r * LANES, load<LANES>(lane_sums + r * LANES) * rescale);
      row_max[r] = max;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    Float<LANES> sum = load<LANES>(lane_sums + r * LANES);
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) sum += exp2_limited<LANES>(logits[r][v] - row_max[r]);
    store<LANES>(lane_sums + r * LANES, sum);
  }
}

template <int LANES, int VECS, bool TILES>
KVEVICT_INLINE void find_softmax(const Job& job, int64_t task, const Span& span, float* scratch) {
  float* keys = scratch;
  float* lane_sums = keys + TILE_TOKENS * job.head_size;
  float* row_max = job.row_max + task * job.group_rows();
  std::fill(row_max, row_max + job.group_rows(), NO_LOGIT);
  std::fill(lane_sums, lane_sums + job.group_rows() * LANES, 0.0f);
  for (int64_t done = 0; done < span.count; done += TILE_TOKENS) {
    const Span tile{span.item, span.first + done, std::min(TILE_TOKENS, span.count - done)};
    load_tile<LANES, TILES>(job, tile, keys);
    for (int64_t row = 0; row < job.group_rows(); row += ROWS) {
      for (int64_t token = 0; token < tile.count; token += VECS * LANES) {
        Float<LANES> logits[ROWS][VECS];
        compute_logits<LANES, VECS, TILES>(job, tile, keys, token, row, logits);
        update_softmax<LANES, VECS>(logits, row_max + row, lane_sums + row * LANES);
      }
    }
  }
  for (int64_t row = 0; row < job.group_rows(); ++row)
    job.row_sum[task * job.group_rows() + row] = sum_lanes<LANES>(load<LANES>(lane_sums + row * LANES));
}

template <int LANES>
KVEVICT_INLINE void find_largest_norm(const Job& job, int64_t task, const Span& span, float* norms) {
  const int64_t count = std::clamp<int64_t>(job.num_scored(span.item) - span.first, 0, span.count);
  load_value_norms<LANES>(job, Span{span.item, span.first, count}, norms);
  float largest = 0.0f;
  for (int64_t token = 0; token < count; ++token) largest = larger_or_nan(norms[token], largest);
  job.task_norm[task] = largest;
}

KVEVICT_INLINE void merge_softmax(const Job& job, int64_t item) {
  const int64_t num_tasks = (job.kv_len(item) + TASK_TOKENS - 1) / TASK_TOKENS, stride = job.group_rows();
  for (int64_t row = 0; row < job.group_rows(); row += ROWS) {
    const int64_t first = item * job.tasks_per_head * stride + row;
    Float<ROWS> max = broadcast<ROWS>(NO_LOGIT), sum = {};
    for (int64_t task = 0; task < num_tasks; ++task)
      max = larger<ROWS>(load<ROWS>(job.row_max + first + task * stride), max);
    for (int64_t task = 0; task < num_tasks; ++task) {
      const int64_t at = first + task * stride;
      sum += load<ROWS>(job.row_sum + at) * exp2_limited<ROWS>(load<ROWS>(job.row_max + at) - max);
    }
    if (job.sinks != nullptr) {
      // the rows of a head are whole blocks
      const Float<ROWS> sink = broadcast<ROWS>(job.sinks[item * job.group() + row / job.rows] * LOG2_E);
      const Float<ROWS> before = max;
      max = larger<ROWS>(sink, max);
      sum = sum * exp2_limited<ROWS>(before - max) + exp2_limited<ROWS>(sink - max);
    }
    Float<ROWS> weight = job.query_weight / sum;
    for (int r = 0; r < ROWS; ++r)
      if ((row + r) % job.rows >= job.window) weight[r] = 0.0f;
    store<ROWS>(job.final_max + item * stride + row, max);
    store<ROWS>(job.final_weight + item * stride + row, weight);
  }
}

// Writes the finished sums of a tile's columns, reduced over the group; those that do not count are zero.
template <int LANES, int VECS, bool TILES>
KVEVICT_INLINE void sum_columns(const Job& job, const Span& tile, float* keys, float* out) {
  const float* final_max = job.final_max + tile.item * job.group_rows();
  const float* final_weight = job.final_weight + tile.item * job.group_rows();
  for (int64_t token = 0; token < tile.count; token += VECS * LANES) {
    Float<LANES> reduced[VECS] = {};
    for (int64_t head = 0; head < job.group(); ++head) {
      Float<LANES> sums[VECS] = {};
      for (int64_t row = head * job.rows; row < (head + 1) * job.rows; row += ROWS) {
        Float<LANES> logits[ROWS][VECS];
        compute_logits<LANES, VECS, TILES>(job, tile, keys, token, row, logits);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < VECS; ++v)
            sums[v] += exp2_limited<LANES>(logits[r][v] - final_max[row + r]) * final_weight[row + r];
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v)
        reduced[v] = job.group_code == GROUP_MAX ? larger_or_nan(sums[v], reduced[v]) : reduced[v] + sums[v];
    }
    const int64_t live = std::min<int64_t>(VECS * LANES, job.num_scored(tile.item) - tile.first - token);
    float columns[VECS * LANES];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) store<LANES>(columns + v * LANES, reduced[v]);
    for (int64_t t = 0; t < live; ++t) out[token + t] = columns[t];
  }
}

template <int LANES, int VECS, bool TILES>
KVEVICT_INLINE void sum_task_columns(const Job& job, const Span& span, float* keys) {
  const int64_t count = std::clamp<int64_t>(job.num_scored(span.item) - span.first, 0, span.count);
  float* out = job.columns + span.item * job.column_stride + job.pool_reach() + span.first;
  for (int64_t done = 0; done < count; done += TILE_TOKENS) {
    const Span tile{span.item, span.first + done, std::min(TILE_TOKENS, count - done)};
    load_tile<LANES, TILES>(job, tile, keys);
    sum_columns<LANES, VECS, TILES>(job, tile, keys, out + done);
  }
}

// Pools and weights the columns of a task; what is not scored becomes zero.
template <int LANES>
KVEVICT_INLINE void finish(const Job& job, const Span& span, float* norms) {
  const int64_t count = std::clamp<int64_t>(job.num_scored(span.item) - span.first, 0, span.count);
  float weight = 1.0f;
  if (job.weight_code == VALUE_NORM) load_value_norms<LANES>(job, Span{span.item, span.first, count}, norms);
  if (job.weight_code == LARGEST_VALUE_NORM) {
    const float* task_norm = job.task_norm + span.item * job.tasks_per_head;
    const int64_t num_tasks = (job.kv_len(span.item) + TASK_TOKENS - 1) / TASK_TOKENS;
    weight = 0.0f;
    for (int64_t task = 0; task < num_tasks; ++task) weight = larger_or_nan(task_norm[task], weight);
  }
  if (job.pool_code == POOL_AVG) weight /= static_cast<float>(job.pool_kernel);
  const float* columns = job.columns + span.item * job.column_stride + span.first;
  float* out = job.scores + span.item * job.max_kv_len + span.first;
  for (int64_t token = 0; token < count; token += LANES) {
    Float<LANES> pooled = load<LANES>(columns + token);
    for (int64_t near = 1; near < job.pool_kernel; ++near) {
      const Float<LANES> column = load<LANES>(columns + token + near);
      pooled = job.pool_code == POOL_MAX ? larger_or_nan(column, pooled) : pooled + column;
    }
    pooled *= weight;
    if (job.weight_code == VALUE_NORM) pooled *= load<LANES>(norms + token);
    float scores[LANES];
    store<LANES>(scores, pooled);
    std::copy(scores, scores + std::min<int64_t>(LANES, count - token), out + token);
  }
  std::fill(out + count, out + std::min(TASK_TOKENS, job.max_kv_len - span.first), 0.0f);
}

template <int LANES, int VECS, bool TILES = false>
KVEVICT_INLINE void run_stage(const Job& job, Stage stage, int64_t index, float* scratch) {
  if (stage == Stage::MERGE_SOFTMAX) return merge_softmax(job, index);
  if (stage == Stage::PACK_QUERY) {
    if constexpr (TILES) return pack_tiled_query(job, index);
    return with_model_type(job.query_dtype,
                           [&](auto element) KVEVICT_INLINE_LAMBDA { pack_query<decltype(element)>(job, index); });
  }
  const int64_t item = index / job.tasks_per_head, first = index % job.tasks_per_head * TASK_TOKENS;
  const Span span{item, first, std::clamp<int64_t>(job.kv_len(item) - first, 0, TASK_TOKENS)};
  float* norms = scratch + TILE_TOKENS * job.head_size + job.group_rows() * LANES;
  if (stage == Stage::FINISH) return finish<LANES>(job, span, norms);
  if (stage == Stage::SUM_COLUMNS) return sum_task_columns<LANES, VECS, TILES>(job, span, scratch);
  find_softmax<LANES, VECS, TILES>(job, index, span, scratch);
  if (job.weight_code == LARGEST_VALUE_NORM) find_largest_norm<LANES>(job, index, span, norms);
}

struct RunStage {
  template <int LANES>
  KVEVICT_INLINE static void run(const Job& job, Stage stage, int64_t index, float* scratch) {
    run_stage<LANES, VECTOR_REGISTERS<LANES> / 8>(job, stage, index, scratch);
  }
};
using StageFunction = void (*)(const Job&, Stage, int64_t, float*);

#if defined(__x86_64__)
struct RunTiledStage {
  template <int LANES>
  KVEVICT_INLINE static void run(const Job& job, Stage stage, int64_t index, float* scratch) {
    const TileConfig config;
    run_stage<LANES, TILE_TOKENS / LANES, true>(job, stage, index, scratch);
  }
};

StageFunction choose(int32_t lanes, bool tiles) {
  return tiles ? Compiled<RunTiledStage>::v4 : function_for<RunStage>(lanes);
}
#else
StageFunction choose(int32_t lanes, bool) { return function_for<RunStage>(lanes); }
#endif

void run_all_stages(const Job& job, StageFunction run, float* scratch, int64_t thread_scratch) {
#pragma omp parallel
  {
    float* own = scratch + omp_get_thread_num() * thread_scratch;
#pragma omp for
    for (int64_t item = 0; item < job.num_items(); ++item) {
      float* columns = job.columns + item * job.column_stride;
      std::fill(columns, columns + job.column_stride, 0.0f);
      run(job, Stage::PACK_QUERY, item, own);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < job.num_tasks(); ++task) run(job, Stage::FIND_SOFTMAX, task, own);
#pragma omp for
    for (int64_t item = 0; item < job.num_items(); ++item) run(job, Stage::MERGE_SOFTMAX, item, own);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < job.num_tasks(); ++task) run(job, Stage::SUM_COLUMNS, task, own);
#pragma omp for
    for (int64_t task = 0; task < job.num_tasks(); ++task) run(job, Stage::FINISH, task, own);
  }
}

}  // namespace
}  // namespace kvevict

// Returns 0, or 1 when scratch memory could not be allocated. Strides count elements; the caller has checked shapes,
// strides, lengths and page ids.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_window_scores(
    const void* query, int64_t query_stride_req, int64_t query_stride_token, int64_t query_stride_head,
    const void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim,
    const void* values, int64_t value_stride_page, int64_t value_stride_token, int64_t value_stride_dim,
    const int64_t* page_table, int64_t page_table_stride_req, int64_t page_table_stride_head,
    const int64_t* kv_lens, float* scores,
    int32_t query_dtype, int32_t key_dtype,
    int64_t num_reqs, int64_t window, int64_t num_heads, int64_t num_kv_heads, int64_t head_size,
    int64_t value_head_size, int64_t block_size, int64_t max_kv_len, int64_t num_unscored,
    float scale, float query_weight, float value_scale, float softcap, const float* sinks,
    int32_t group_code, int32_t pool_code, int32_t weight_code, int64_t pool_kernel) {
  using namespace kvevict;
  Job job{query, query_stride_req, query_stride_token, query_stride_head,
          {keys, key_stride_page, key_stride_token, key_stride_dim},
          {values, value_stride_page, value_stride_token, value_stride_dim},
          page_table, page_table_stride_req, page_table_stride_head,
          kv_lens, scores,
          query_dtype, key_dtype,
          num_reqs, window, num_heads, num_kv_heads, head_size,
          value_head_size, block_size, max_kv_len, num_unscored,
          scale, query_weight, value_scale, softcap, sinks,
          group_code, pool_code, weight_code, pool_kernel};
  const int32_t lanes = usable_lanes();
  job.rows = (window + ROWS - 1) / ROWS * ROWS;
  // Other windows would need rows that are computed for nothing.
  const bool tiles = usable_tiles() && query_dtype == BFLOAT16 && key_dtype == BFLOAT16 && window % TILE_ROWS == 0 &&
                     head_size % TILE_DEPTH == 0;
  job.tasks_per_head = (max_kv_len + TASK_TOKENS - 1) / TASK_TOKENS;
  // A vector may be loaded that starts at the last column and reaches over the pool.
  job.column_stride = max_kv_len + pool_kernel + lanes;

  const int64_t final_count = job.num_items() * job.group_rows();
  const int64_t query_count = final_count * head_size;
  const int64_t partial_count = final_count * job.tasks_per_head;
  const int64_t thread_scratch = Job::thread_scratch(head_size, job.group_rows(), lanes);
  const Buffer<float> buffer =
      allocate<float>(query_count + 2 * partial_count + 2 * final_count + job.num_tasks() +
                      job.num_items() * job.column_stride + omp_get_max_threads() * thread_scratch);
  if (!buffer) return 1;
  job.packed_query = buffer.get();
  float* scratch = job.packed_query + query_count;
  job.row_max = scratch + omp_get_max_threads() * thread_scratch;
  job.row_sum = job.row_max + partial_count;
  job.final_max = job.row_sum + partial_count;
  job.final_weight = job.final_max + final_count;
  job.task_norm = job.final_weight + final_count;
  job.columns = job.task_norm + job.num_tasks();
  run_all_stages(job, choose(lanes, tiles), scratch, thread_scratch);
  return 0;
}
