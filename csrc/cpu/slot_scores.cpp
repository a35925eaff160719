// Scores of what the slots of each KV head hold, in no order, by the attention that some queries pay. Contract:
// kernels/slot_scores.py.
//
// A task is one KV head of one request and some of its queries, all heads of the group: the logits of these rows are
// held until their softmax is known, so that keys are multiplied once; up to a few thousand slots they stay in the second
// cache. Where a head holds so many slots that they would take too much memory, a task goes through its queries in
// passes. Vector lanes are slots. Where AVX-512 multiplies pairs of bfloat16, dimensions go two by two.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include <omp.h>

#include "buffer.hpp"
#include "element.hpp"
#include "isa.hpp"
#include "pages.hpp"
#include "products.hpp"
#include "vector.hpp"

namespace kvevict {
namespace {

// Queries of a task, for which keys are read once: all of a usual window. Work is split by it alone, so results do not
// depend on the number of threads.
constexpr int64_t TASK_QUERIES = 32;
// Logits that a thread holds, 16 MiB, but always those of one query.
constexpr int64_t MOST_LOGITS = 1 << 22;
// The position of a slot that no query sees.
constexpr int32_t NOWHERE = std::numeric_limits<int32_t>::max();
// Least sum of the softmax of a row that sees a slot: the largest term is 1. Hidden ones may be 2^-125 each.
constexpr float LEAST_SUM = 0.5f;

enum Group : int32_t { GROUP_SUM = 0, GROUP_MAX = 1 };
enum Fusion : int32_t { FUSION_SUM = 0, FUSION_MAX = 1, NO_FUSION = 2 };

struct Job {
  const void* query;
  int64_t query_stride_req, query_stride_token, query_stride_head;
  PagePool<const void> keys;
  const int64_t* page_table;
  int64_t page_table_stride_req, page_table_stride_head;
  const int64_t* positions;  // [num_reqs, num_kv_heads, num_slots]
  const int64_t* last_seen;  // [num_reqs, num_queries]
  float* scores;             // [num_reqs, num_kv_heads, num_slots], behind the heads [num_queries] if not fused
  int32_t query_dtype, key_dtype;
  int64_t num_reqs, num_queries, num_heads, num_kv_heads, head_size, block_size, num_slots;
  float scale, query_weight;
  float softcap;       // of logits; 0: none
  const float* sinks;  // [num_reqs, num_heads], the logit of a sink of each query head; null: none
  int32_t group_code, fusion_code;

  float* parts = nullptr;  // [num_items, tasks_per_item, num_slots], if the queries of an item are fused of several tasks

  float logit_scale() const { return scale * LOG2_E; }
  float logit_cap() const { return softcap * LOG2_E; }
  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t num_items() const { return num_reqs * num_kv_heads; }
  int64_t tasks_per_item() const { return (num_queries + TASK_QUERIES - 1) / TASK_QUERIES; }
  bool has_parts() const { return fusion_code != NO_FUSION && tasks_per_item() > 1; }
  int64_t queries_of_pass() const {
    return std::clamp<int64_t>(MOST_LOGITS / (group() * padded_slots()), 1, std::min(TASK_QUERIES, num_queries));
  }
  // Rows of a pass: its queries, of each the heads of the group, and zeros up to a whole block.
  int64_t most_rows() const { return rows_of(queries_of_pass()); }
  int64_t rows_of(int64_t queries) const { return round_up(queries * group(), ROWS); }
  int64_t padded_slots() const { return round_up(num_slots, TILE_TOKENS); }
  int64_t thread_scratch() const {
    return most_rows() * (head_size + padded_slots()) + TILE_TOKENS * head_size + padded_slots();
  }
  static int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
};

// One task, or a pass over some of its queries, and a thread's scratch for it.
struct Task {
  int64_t req, kv_head, first_query, num_queries, num_rows;
  int64_t num_slots;  // up to the last one that is held, whole tiles
  float* out;
  float* query;    // [num_rows / ROWS, head_size, ROWS], with the scale in it; of pairs half of that, without the scale
  float* keys;     // [head_size, TILE_TOKENS]; of pairs half of that
  float* logits;   // [num_rows, padded_slots], in units of log 2; then the terms of the softmax
  int32_t* places; // [padded_slots], positions
};

KVEVICT_INLINE Task make_task(const Job& job, int64_t index, float* scratch) {
  const int64_t item = index / job.tasks_per_item(), part = index % job.tasks_per_item();
  Task task{};
  task.req = item / job.num_kv_heads, task.kv_head = item % job.num_kv_heads;
  task.first_query = part * TASK_QUERIES;
  task.num_queries = std::min(TASK_QUERIES, job.num_queries - task.first_query);
  task.num_rows = job.rows_of(task.num_queries);
  const int64_t rows_before = job.fusion_code == NO_FUSION ? item * job.num_queries + task.first_query : index;
  task.out = (job.has_parts() ? job.parts : job.scores) + rows_before * job.num_slots;
  task.query = scratch;
  task.keys = task.query + job.most_rows() * job.head_size;
  task.logits = task.keys + TILE_TOKENS * job.head_size;
  task.places = reinterpret_cast<int32_t*>(task.logits + job.most_rows() * job.padded_slots());
  const int64_t* positions = job.positions + item * job.num_slots;
  int64_t held = job.num_slots;
  while (held > 0 && positions[held - 1] < 0) --held;
  task.num_slots = Job::round_up(held, TILE_TOKENS);
  for (int64_t slot = 0; slot < held; ++slot)
    task.places[slot] = positions[slot] < 0 ? NOWHERE : static_cast<int32_t>(positions[slot]);
  std::fill(task.places + held, task.places + task.num_slots, NOWHERE);
  return task;
}

template <typename Element>
KVEVICT_INLINE const Element* row_of_query(const Job& job, const Task& task, int64_t row) {
  const int64_t token = task.first_query + row / job.group(), head = task.kv_head * job.group() + row % job.group();
  return static_cast<const Element*>(job.query) + task.req * job.query_stride_req + token * job.query_stride_token +
         head * job.query_stride_head;
}

template <typename Element>
KVEVICT_INLINE void pack_query(const Job& job, const Task& task) {
  std::fill(task.query, task.query + task.num_rows * job.head_size, 0.0f);
  for (int64_t row = 0; row < task.num_queries * job.group(); ++row) {
    const Element* query = row_of_query<Element>(job, task, row);
    float* out = task.query + row / ROWS * ROWS * job.head_size + row % ROWS;
    for (int64_t dim = 0; dim < job.head_size; ++dim) out[dim * ROWS] = to_float(query[dim]) * job.logit_scale();
  }
}

KVEVICT_INLINE void pack_query_pairs(const Job& job, const Task& task) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(task.query);
  std::fill(pairs, pairs + task.num_rows * job.head_size / 2, 0u);
  for (int64_t row = 0; row < task.num_queries * job.group(); ++row) {
    const BFloat16* query = row_of_query<BFloat16>(job, task, row);
    uint32_t* out = pairs + row / ROWS * ROWS * job.head_size / 2 + row % ROWS;
    for (int64_t pair = 0; pair < job.head_size / 2; ++pair)
      out[pair * ROWS] = query[2 * pair].bits | static_cast<uint32_t>(query[2 * pair + 1].bits) << 16;
  }
}

// The last position that a row sees, -1 if it sees none.
KVEVICT_INLINE int32_t last_seen(const Job& job, const Task& task, int64_t row) {
  const int64_t query = std::min(row / job.group(), task.num_queries - 1);
  const int64_t position = job.last_seen[task.req * job.num_queries + task.first_query + query];
  return static_cast<int32_t>(std::clamp<int64_t>(position, -1, NOWHERE - 1));
}

// Loads keys into a thread's scratch as `multiply` reads them.
template <int LANES, bool PAIRS>
KVEVICT_INLINE void load_tile(const Job& job, const Task& task, int64_t first) {
  const int64_t* pages =
      job.page_table + task.req * job.page_table_stride_req + task.kv_head * job.page_table_stride_head;
  const Tokens tokens{pages, job.block_size, first, std::min(TILE_TOKENS, job.num_slots - first)};
  if constexpr (PAIRS) {
    load_key_pairs(job.keys, tokens, job.head_size, reinterpret_cast<uint32_t*>(task.keys));
  } else {
    load_keys_by_dimension<LANES>(job.keys, job.key_dtype, tokens, job.head_size, task.keys);
  }
}

template <int LANES, int VECS, bool PAIRS>
KVEVICT_INLINE void multiply(const Job& job, const Task& task, int64_t row, int64_t slot,
                             Float<LANES> (&logits)[ROWS][VECS]) {
  if constexpr (PAIRS) {
    const uint32_t *query = reinterpret_cast<const uint32_t*>(task.query) + row * job.head_size / 2,
                   *keys = reinterpret_cast<const uint32_t*>(task.keys) + slot;
    multiply_pairs<LANES, VECS>(query, keys, job.head_size / 2, logits);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) logits[r][v] *= job.logit_scale();
  } else {
    multiply_rows<LANES, VECS>(task.query + row * job.head_size, task.keys + slot, job.head_size, logits);
  }
}

template <int LANES, int VECS, bool PAIRS>
KVEVICT_INLINE void compute_logits(const Job& job, const Task& task, int64_t first) {
  load_tile<LANES, PAIRS>(job, task, first);
  for (int64_t row = 0; row < task.num_rows; row += ROWS) {
    int32_t seen[ROWS];
    for (int r = 0; r < ROWS; ++r) seen[r] = last_seen(job, task, row + r);
    for (int64_t slot = 0; slot < TILE_TOKENS; slot += VECS * LANES) {
      Float<LANES> logits[ROWS][VECS];
      multiply<LANES, VECS, PAIRS>(job, task, row, slot, logits);
      if (job.softcap > 0)
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < VECS; ++v) logits[r][v] = soft_capped<LANES>(logits[r][v], job.logit_cap());
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        Int<LANES> places;
        std::memcpy(&places, task.places + first + slot + v * LANES, sizeof(places));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
          store<LANES>(task.logits + (row + r) * job.padded_slots() + first + slot + v * LANES,
                       keep_where_room<LANES>(logits[r][v], seen[r] - places));
      }
    }
  }
}

// Turns the logits of a row into the terms of its softmax; returns what these are to be multiplied by.
// `member`: which head of the group the row is of.
template <int LANES>
KVEVICT_INLINE float finish_row(const Job& job, const Task& task, int64_t member, float* logits) {
  const int64_t head = (task.req * job.num_kv_heads + task.kv_head) * job.group() + member;
  const float sink = job.sinks == nullptr ? NO_LOGIT : job.sinks[head] * LOG2_E;
  Float<LANES> most = broadcast<LANES>(sink), sums = {};
  for (int64_t slot = 0; slot < task.num_slots; slot += LANES) most = larger<LANES>(load<LANES>(logits + slot), most);
  const float max = largest_lane<LANES>(most);
  for (int64_t slot = 0; slot < task.num_slots; slot += LANES) {
    const Float<LANES> term = exp2_limited<LANES>(load<LANES>(logits + slot) - max);
    store<LANES>(logits + slot, term);
    sums += term;
  }
  float sum = sum_lanes<LANES>(sums);
  if (job.sinks != nullptr) sum += sum_lanes<4>(exp2_limited<4>(broadcast<4>(sink - max))) / 4;
  return sum < LEAST_SUM ? 0.0f : job.query_weight / sum;  // NaN is no less
}

// Adds what the group pays in one query to what stands in `out`, or takes the larger; `out` is overwritten if `is_first`.
template <int LANES>
KVEVICT_INLINE void fuse_query(const Job& job, const Task& task, const float* terms, const float* weights, float* out,
                               bool is_first) {
  const int64_t count = std::min(task.num_slots, job.num_slots);
  for (int64_t slot = 0; slot < count; slot += LANES) {
    Float<LANES> paid = load<LANES>(terms + slot) * weights[0];
    for (int64_t member = 1; member < job.group(); ++member) {
      const Float<LANES> more = load<LANES>(terms + member * job.padded_slots() + slot) * weights[member];
      paid = job.group_code == GROUP_MAX ? larger_or_nan(more, paid) : paid + more;
    }
    float lanes[LANES] = {};
    const int64_t live = std::min<int64_t>(LANES, count - slot);
    if (!is_first) {
      std::copy(out + slot, out + slot + live, lanes);
      const Float<LANES> before = load<LANES>(lanes);
      paid = job.fusion_code == FUSION_MAX ? larger_or_nan(paid, before) : before + paid;
    }
    store<LANES>(lanes, paid);
    std::copy(lanes, lanes + live, out + slot);
  }
  if (is_first) std::fill(out + count, out + job.num_slots, 0.0f);
}

// Scores a pass; `is_first`: nothing of its task stands in `pass.out` yet.
template <int LANES, int VECS, bool PAIRS>
KVEVICT_INLINE void score_pass(const Job& job, const Task& pass, float* weights, bool is_first) {
  if constexpr (PAIRS) {
    pack_query_pairs(job, pass);
  } else {
    with_model_type(job.query_dtype,
                    [&](auto element) KVEVICT_INLINE_LAMBDA { pack_query<decltype(element)>(job, pass); });
  }
  for (int64_t first = 0; first < pass.num_slots; first += TILE_TOKENS)
    compute_logits<LANES, VECS, PAIRS>(job, pass, first);
  for (int64_t query = 0; query < pass.num_queries; ++query) {
    float* logits = pass.logits + query * job.group() * job.padded_slots();
    for (int64_t member = 0; member < job.group(); ++member)
      weights[member] = finish_row<LANES>(job, pass, member, logits + member * job.padded_slots());
    const bool is_apart = job.fusion_code == NO_FUSION;
    fuse_query<LANES>(job, pass, logits, weights, pass.out + (is_apart ? query * job.num_slots : 0),
                      is_apart || (is_first && query == 0));
  }
}

template <int LANES, int VECS, bool PAIRS = false>
KVEVICT_INLINE void score_task(const Job& job, int64_t index, float* scratch, float* weights) {
  const Task task = make_task(job, index, scratch);
  for (int64_t done = 0; done < task.num_queries; done += job.queries_of_pass()) {
    Task pass = task;
    pass.first_query += done;
    pass.num_queries = std::min(job.queries_of_pass(), task.num_queries - done);
    pass.num_rows = job.rows_of(pass.num_queries);
    if (job.fusion_code == NO_FUSION) pass.out += done * job.num_slots;
    score_pass<LANES, VECS, PAIRS>(job, pass, weights, done == 0);
  }
}

// Fuses what the tasks of an item have found, always in the same order.
KVEVICT_INLINE void fuse_parts(const Job& job, int64_t item) {
  const float* parts = job.parts + item * job.tasks_per_item() * job.num_slots;
  float* scores = job.scores + item * job.num_slots;
  std::copy(parts, parts + job.num_slots, scores);
  for (int64_t part = 1; part < job.tasks_per_item(); ++part) {
    const float* more = parts + part * job.num_slots;
    for (int64_t slot = 0; slot < job.num_slots; ++slot)
      scores[slot] = job.fusion_code == FUSION_MAX ? larger_or_nan(more[slot], scores[slot]) : scores[slot] + more[slot];
  }
}

struct ScoreTask {
  template <int LANES>
  KVEVICT_INLINE static void run(const Job& job, int64_t index, float* scratch, float* weights) {
    score_task<LANES, VECTOR_REGISTERS<LANES> / 8>(job, index, scratch, weights);
  }
};

using TaskFunction = void (*)(const Job&, int64_t, float*, float*);

#if defined(__x86_64__)
struct ScoreTaskOfPairs {
  template <int LANES>
  KVEVICT_INLINE static void run(const Job& job, int64_t index, float* scratch, float* weights) {
    score_task<LANES, VECTOR_REGISTERS<LANES> / 8, LANES == 16>(job, index, scratch, weights);
  }
};

TaskFunction choose(bool pairs) { return pairs ? &Compiled<ScoreTaskOfPairs>::v4 : function_for<ScoreTask>(); }
#else
TaskFunction choose(bool) { return function_for<ScoreTask>(); }
#endif

}  // namespace
}  // namespace kvevict

// Returns 0, or 1 when scratch memory could not be allocated. Strides count elements; the caller has checked shapes,
// strides and page ids.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_slot_scores(
    const void* query, int64_t query_stride_req, int64_t query_stride_token, int64_t query_stride_head,
    const void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim,
    const int64_t* page_table, int64_t page_table_stride_req, int64_t page_table_stride_head,
    const int64_t* positions, const int64_t* last_seen, float* scores,
    int32_t query_dtype, int32_t key_dtype,
    int64_t num_reqs, int64_t num_queries, int64_t num_heads, int64_t num_kv_heads, int64_t head_size,
    int64_t block_size, int64_t num_slots,
    float scale, float query_weight, float softcap, const float* sinks, int32_t group_code, int32_t fusion_code) {
  using namespace kvevict;
  Job job{query, query_stride_req, query_stride_token, query_stride_head,
          {keys, key_stride_page, key_stride_token, key_stride_dim},
          page_table, page_table_stride_req, page_table_stride_head,
          positions, last_seen, scores,
          query_dtype, key_dtype,
          num_reqs, num_queries, num_heads, num_kv_heads, head_size,
          block_size, num_slots,
          scale, query_weight, softcap, sinks, group_code, fusion_code};
  const int64_t thread_scratch = Job::round_up(job.thread_scratch() + job.group(), 16);  // cache lines
  const int64_t num_tasks = job.num_items() * job.tasks_per_item();
  const int64_t num_threads = omp_get_max_threads();
  const int64_t part_count = job.has_parts() ? num_tasks * num_slots : 0;
  const Buffer<float> buffer = allocate<float>(num_threads * thread_scratch + part_count);
  if (!buffer) return 1;
  job.parts = buffer.get() + num_threads * thread_scratch;
  const bool pairs = usable_pairs() && query_dtype == BFLOAT16 && key_dtype == BFLOAT16 && head_size % 2 == 0;
  const auto run = choose(pairs);
#pragma omp parallel
  {
    float* own = buffer.get() + omp_get_thread_num() * thread_scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_tasks; ++task) run(job, task, own, own + thread_scratch - job.group());
    if (job.has_parts()) {
#pragma omp for
      for (int64_t item = 0; item < job.num_items(); ++item) fuse_parts(job, item);
    }
  }
  return 0;
}
