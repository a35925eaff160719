// Marks the highest scores of every row, and counts those of joint rankings. Contract: kernels/select.py.
//
// The threshold is found by bisection over integer keys that sort like the scores. A pass counts the keys from the
// middle of the remaining range on: vector compares over a row of keys that stays in the nearest cache. It ends when a
// pass counts exactly what is wanted, which for scores that differ takes about half of the 32 passes at most.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include <omp.h>

#include "buffer.hpp"
#include "isa.hpp"
#include "vector.hpp"

namespace kvevict {
namespace {

constexpr int32_t LOWEST = std::numeric_limits<int32_t>::min();
constexpr int UNROLL = 4;

// Orders the bits of floats like the floats: NaN below -infinity, both zeros alike.
template <typename Signed>
KVEVICT_INLINE Signed key_of(Signed bits) {
  const Signed magnitude = bits & 0x7fffffff;
  const Signed ordered = bits < 0 ? -magnitude : magnitude;
  return magnitude > 0x7f800000 ? Signed{} + LOWEST : ordered;
}

struct Range {
  int32_t lowest, highest;
};

// Writes the keys of `count` scores, and returns their range.
template <int LANES>
KVEVICT_INLINE Range write_keys(const float* scores, int64_t count, int32_t* keys) {
  Range range{std::numeric_limits<int32_t>::max(), LOWEST};
  Int<LANES> low = Int<LANES>{} + range.lowest, high = Int<LANES>{} + range.highest;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    Int<LANES> bits;
    std::memcpy(&bits, scores + i, sizeof(bits));
    const Int<LANES> key = key_of(bits);
    std::memcpy(keys + i, &key, sizeof(key));
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  for (int lane = 0; lane < LANES; ++lane)
    range = {std::min(range.lowest, static_cast<int32_t>(low[lane])),
             std::max(range.highest, static_cast<int32_t>(high[lane]))};
  for (; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, scores + i, sizeof(bits));
    keys[i] = key_of(bits);
    range = {std::min(range.lowest, keys[i]), std::max(range.highest, keys[i])};
  }
  return range;
}

template <int LANES>
KVEVICT_INLINE int64_t count_from(const int32_t* keys, int64_t count, int32_t least) {
  Int<LANES> counts[UNROLL] = {};
  int64_t i = 0;
  for (; i + UNROLL * LANES <= count; i += UNROLL * LANES)
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; ++u) {
      Int<LANES> key;
      std::memcpy(&key, keys + i + u * LANES, sizeof(key));
      counts[u] -= key >= least;  // a true lane is -1
    }
  int64_t total = 0;
  const Int<LANES> sum = (counts[0] + counts[1]) + (counts[2] + counts[3]);
  for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
  for (; i < count; ++i) total += keys[i] >= least;
  return total;
}

// The wanted keys are those from `least` on, less those equal to it if there are too many: then `above` is their number
// without these, and -1 otherwise.
struct Threshold {
  int32_t least;
  int64_t above;
};

// wanted: 1 to count
template <int LANES>
KVEVICT_INLINE Threshold find_threshold(const int32_t* keys, int64_t count, Range range, int64_t wanted) {
  // From `low` on there are more keys than wanted, or all; from `high` on there are `above`, too few.
  int64_t low = range.lowest, high = int64_t{range.highest} + 1, above = 0;
  if (wanted == count) return {range.lowest, -1};
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t found = count_from<LANES>(keys, count, static_cast<int32_t>(middle));
    if (found == wanted) return {static_cast<int32_t>(middle), -1};
    if (found > wanted) {
      low = middle;
    } else {
      high = middle;
      above = found;
    }
  }
  return {static_cast<int32_t>(low), above};
}

// A row of scores and what is asked of it. `first` and `last` bound the tokens that compete; the row has room for
// `max_kv_len`.
struct Row {
  const float* scores;
  int64_t kv_len, max_kv_len, first, last, num_kept;
  uint8_t* kept;
};

Row make_row(const float* scores, int64_t kv_len, int64_t max_kv_len, int64_t num_sink, int64_t num_recent,
             int64_t num_kept, uint8_t* kept) {
  const int64_t first = std::min(num_sink, kv_len), last = std::max(kv_len - num_recent, first);
  return {scores, kv_len, max_kv_len, first, last, num_kept, kept};
}

struct SelectRow {
  template <int LANES>
  KVEVICT_INLINE static void run(const Row& row, int32_t* keys) {
    const int64_t count = row.last - row.first, num_protected = row.kv_len - count;
    const int64_t wanted = row.num_kept - num_protected;
    std::memset(row.kept, 0, static_cast<size_t>(row.max_kv_len));
    if (wanted <= 0) {  // not even all protected ones
      const int64_t sinks = std::min(row.num_kept, row.first);
      std::memset(row.kept, 1, static_cast<size_t>(sinks));
      std::memset(row.kept + row.last, 1, static_cast<size_t>(row.num_kept - sinks));
      return;
    }
    std::memset(row.kept, 1, static_cast<size_t>(row.first));
    std::memset(row.kept + row.last, 1, static_cast<size_t>(row.kv_len - row.last));
    const Range range = write_keys<LANES>(row.scores + row.first, count, keys);
    const Threshold threshold = find_threshold<LANES>(keys, count, range, wanted);
    uint8_t* kept = row.kept + row.first;
    for (int64_t i = 0; i < count; ++i) kept[i] = keys[i] >= threshold.least;
    if (threshold.above < 0) return;
    int64_t ties = wanted - threshold.above;
    for (int64_t i = 0; i < count; ++i)
      if (keys[i] == threshold.least && ties-- <= 0) kept[i] = 0;
  }
};

// Rows that are ranked jointly; `above` and `ties` have a number for each of them.
struct Group {
  const float* scores;
  int64_t num_rows, kv_len, total;
  int64_t *above, *ties;
};

struct CountGroup {
  template <int LANES>
  KVEVICT_INLINE static void run(const Group& group, int32_t* keys) {
    const int64_t count = group.num_rows * group.kv_len;
    const Range range = write_keys<LANES>(group.scores, count, keys);
    const Threshold threshold = find_threshold<LANES>(keys, count, range, group.total);
    for (int64_t row = 0; row < group.num_rows; ++row) {
      const int32_t* of_row = keys + row * group.kv_len;
      const int64_t from = count_from<LANES>(of_row, group.kv_len, threshold.least);
      const bool is_split = threshold.above >= 0;
      group.above[row] = is_split ? count_from<LANES>(of_row, group.kv_len, threshold.least + 1) : from;
      group.ties[row] = from - group.above[row];
    }
  }
};

// Calls run(item, keys) for every item, with room for `num_keys` keys. Returns 1 where there is no such room.
template <typename Run>
int32_t for_each(int64_t num_items, int64_t num_keys, const Run& run) {
  const int64_t num_threads = std::min<int64_t>(omp_get_max_threads(), num_items);
  const Buffer<int32_t> keys = allocate<int32_t>(num_threads * num_keys);
  if (!keys) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(num_threads))
  for (int64_t item = 0; item < num_items; ++item) run(item, keys.get() + omp_get_thread_num() * num_keys);
  return 0;
}

}  // namespace
}  // namespace kvevict

// Returns 0, or 1 when scratch memory could not be allocated. All arrays are contiguous; the caller has checked that
// every number to keep is at most the tokens of its row, and that there is a row. kv_lens: tokens of each row, null if
// all have max_kv_len.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_select(
    const float* scores, const int64_t* num_kept, const int64_t* kv_lens, uint8_t* kept,
    int64_t num_rows, int64_t max_kv_len, int64_t num_sink, int64_t num_recent) {
  using namespace kvevict;
  const auto select_row = function_for<SelectRow>();
  return for_each(num_rows, max_kv_len, [&](int64_t row, int32_t* keys) {
    const int64_t kv_len = kv_lens == nullptr ? max_kv_len : kv_lens[row], at = row * max_kv_len;
    select_row(make_row(scores + at, kv_len, max_kv_len, num_sink, num_recent, num_kept[row], kept + at), keys);
  });
}

// The same for joint rankings. Every total is from 1 to num_rows * kv_len.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_count_best(
    const float* scores, const int64_t* totals, int64_t* above, int64_t* ties,
    int64_t num_groups, int64_t num_rows, int64_t kv_len) {
  using namespace kvevict;
  const auto count_group = function_for<CountGroup>();
  const int64_t num_keys = num_rows * kv_len;
  return for_each(num_groups, num_keys, [&](int64_t group, int32_t* keys) {
    const int64_t first = group * num_rows;
    count_group({scores + group * num_keys, num_rows, kv_len, totals[group], above + first, ties + first}, keys);
  });
}
