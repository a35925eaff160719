// Softmax attention of a block of query rows over paged keys, added up per key: what streaming_sums.cpp and
// chunk_attention.cpp share.
//
// Rows are visited tile by tile of keys with a running maximum, and the exponentials of the first KEPT_TILES tiles are
// kept until the sums of the softmax are known; tiles past those are computed again. So nothing grows with the cache.
//
// Vector lanes are rows and keys are broadcast: row maxima need no shuffles, and keys stored as [head_size, block_size]
// and as [block_size, head_size] cost the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "element.hpp"
#include "pages.hpp"
#include "vector.hpp"

namespace kvevict {

constexpr int64_t BLOCK_ROWS = 64;
// 64 rows of 8,192 tokens: 2 MiB; half as many tiles are as fast where they suffice, and slower past them.
constexpr int64_t KEPT_TILES = 128;
constexpr int64_t TILE_LOGITS = TILE_TOKENS * BLOCK_ROWS;

// Which query a row is, and the last key that it sees; `offset` counts elements.
struct Rows {
  int64_t count = 0;
  int64_t offset[BLOCK_ROWS];
  alignas(64) int32_t last_seen[BLOCK_ROWS];
  alignas(64) float max[BLOCK_ROWS], sum[BLOCK_ROWS];
  float softcap = 0;             // of logits in units of log 2; 0: none
  const float* sinks = nullptr;  // [num_heads], the logit of a sink of each query head; null: none
  int32_t head[BLOCK_ROWS];      // of each row, if there are sinks
};

// Scratch of one thread.
struct BlockScratch {
  float* query;         // [head_size, BLOCK_ROWS]
  float* keys;          // [TILE_TOKENS, head_size] or transposed
  float* exponentials;  // [KEPT_TILES + 1, TILE_TOKENS, BLOCK_ROWS], the last for tiles that are not kept
  float* maxima;        // [KEPT_TILES + 1, BLOCK_ROWS], what the exponentials of a tile are relative to

  static int64_t kept_tiles(int64_t num_tokens) {
    return std::min(KEPT_TILES, (num_tokens + TILE_TOKENS - 1) / TILE_TOKENS) + 1;
  }
  static int64_t size(int64_t head_size, int64_t num_tokens) {
    return (BLOCK_ROWS + TILE_TOKENS) * head_size + kept_tiles(num_tokens) * (TILE_LOGITS + BLOCK_ROWS);
  }
  BlockScratch(float* data, int64_t head_size, int64_t num_tokens)
      : query(data),
        keys(query + BLOCK_ROWS * head_size),
        exponentials(keys + TILE_TOKENS * head_size),
        maxima(exponentials + kept_tiles(num_tokens) * TILE_LOGITS) {}
};

template <typename Element>
KVEVICT_INLINE void pack_rows_of(const void* query, const Rows& rows, int64_t head_size, float scale, float* packed) {
  constexpr int64_t STEP = 8;  // dimensions whose rows are packed together: 2 KiB
  for (int64_t first = 0; first < head_size; first += STEP) {
    for (int64_t row = 0; row < BLOCK_ROWS; ++row) {
      // Rows past the last have its query and no weight: they are NaN only where it is.
      const Element* source = static_cast<const Element*>(query) + rows.offset[std::min(row, rows.count - 1)];
      for (int64_t dim = first; dim < std::min(first + STEP, head_size); ++dim)
        packed[dim * BLOCK_ROWS + row] = to_float(source[dim]) * scale;
    }
  }
}

KVEVICT_INLINE void pack_rows(const void* query, int32_t dtype, const Rows& rows, int64_t head_size, float scale,
                              float* packed) {
  scale *= LOG2_E;
  with_model_type(dtype, [&](auto element) KVEVICT_INLINE_LAMBDA {
    pack_rows_of<decltype(element)>(query, rows, head_size, scale, packed);
  });
}

template <int LANES>
KVEVICT_INLINE void compute_logits(const float* query, int64_t head_size, const KeyTile& tile, float* logits) {
  constexpr int TOKENS = LANES == 16 ? 8 : 4;  // twice as many accumulators and 2 vectors must fit in the registers
  for (int64_t row = 0; row < BLOCK_ROWS; row += 2 * LANES) {
    for (int64_t token = 0; token < tile.count; token += TOKENS) {
      Float<LANES> sums[TOKENS][2] = {};
      const float* keys = tile.data + token * tile.token_stride;
      for (int64_t dim = 0; dim < head_size; ++dim) {
        const Float<LANES> first = load<LANES>(query + dim * BLOCK_ROWS + row);
        const Float<LANES> second = load<LANES>(query + dim * BLOCK_ROWS + row + LANES);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t) {
          const float key = keys[t * tile.token_stride + dim * tile.dim_stride];
          sums[t][0] += first * key;
          sums[t][1] += second * key;
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; ++t) {
        store<LANES>(logits + (token + t) * BLOCK_ROWS + row, sums[t][0]);
        store<LANES>(logits + (token + t) * BLOCK_ROWS + row + LANES, sums[t][1]);
      }
    }
  }
}

template <int LANES>
KVEVICT_INLINE void cap_logits(float cap, int64_t count, float* logits) {
  for (int64_t at = 0; at < count * BLOCK_ROWS; at += LANES)
    store<LANES>(logits + at, soft_capped<LANES>(load<LANES>(logits + at), cap));
}

// Keys that a row does not see get the lowest logit.
template <int LANES>
KVEVICT_INLINE void hide_unseen(const Rows& rows, const KeyTile& tile, float* logits) {
  const Float<LANES> hidden = broadcast<LANES>(-std::numeric_limits<float>::infinity());
  for (int64_t token = 0; token < tile.count; ++token) {
    const int32_t index = static_cast<int32_t>(tile.first + token);
    for (int64_t row = 0; row < BLOCK_ROWS; row += LANES) {
      Int<LANES> last_seen;
      std::memcpy(&last_seen, rows.last_seen + row, sizeof(last_seen));
      float* at = logits + token * BLOCK_ROWS + row;
      store<LANES>(at, last_seen >= index ? load<LANES>(at) : hidden);
    }
  }
}

// Brings the running maximum and sum of each row up to date and turns logits into exponentials, in place.
template <int LANES>
KVEVICT_INLINE void update_softmax(Rows& rows, int64_t count, float* logits) {
  for (int64_t row = 0; row < BLOCK_ROWS; row += LANES) {
    const Float<LANES> old_max = load<LANES>(rows.max + row);
    Float<LANES> max = old_max;
    for (int64_t t = 0; t < count; ++t) max = larger<LANES>(load<LANES>(logits + t * BLOCK_ROWS + row), max);
    Float<LANES> sum = load<LANES>(rows.sum + row) * exp2_limited<LANES>(old_max - max);
    for (int64_t t = 0; t < count; ++t) {
      float* at = logits + t * BLOCK_ROWS + row;
      const Float<LANES> exponential = exp2_limited<LANES>(load<LANES>(at) - max);
      store<LANES>(at, exponential);
      sum += exponential;
    }
    store<LANES>(rows.max + row, max);
    store<LANES>(rows.sum + row, sum);
  }
}

// Adds the probabilities of a tile, times `weight`, to its columns.
template <int LANES>
KVEVICT_INLINE void add_columns(const Rows& rows, const float* maxima, const float* exponentials, int64_t count,
                                float weight, float* columns) {
  constexpr int VECS = BLOCK_ROWS / LANES;
  alignas(64) float factors[BLOCK_ROWS];
  for (int64_t row = 0; row < BLOCK_ROWS; row += LANES) {
    const Float<LANES> relative = exp2_limited<LANES>(load<LANES>(maxima + row) - load<LANES>(rows.max + row));
    store<LANES>(factors + row, relative * weight / load<LANES>(rows.sum + row));
  }
  std::fill(factors + rows.count, factors + BLOCK_ROWS, 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    Float<LANES> sum = {};
    for (int v = 0; v < VECS; ++v)
      sum += load<LANES>(exponentials + t * BLOCK_ROWS + v * LANES) * load<LANES>(factors + v * LANES);
    columns[t] += sum_lanes<LANES>(sum);
  }
}

// Adds to columns[i] what the rows pay to token begin + i, times `weight`. The softmax of a row runs over the tokens
// from `begin` to the last that it sees; every row sees the first.
template <int LANES>
KVEVICT_INLINE void attend(const PagedKeys& keys, int64_t kv_head, int64_t begin, Rows& rows, float weight,
                           const BlockScratch& scratch, float* columns) {
  const auto [first_hidden, last] = std::minmax_element(rows.last_seen, rows.last_seen + rows.count);
  const int64_t end = *last + 1;
  std::fill(rows.last_seen + rows.count, rows.last_seen + BLOCK_ROWS, rows.last_seen[rows.count - 1]);
  std::fill(rows.max, rows.max + BLOCK_ROWS, std::numeric_limits<float>::lowest());
  std::fill(rows.sum, rows.sum + BLOCK_ROWS, 0.0f);
  if (rows.sinks != nullptr)
    for (int64_t row = 0; row < rows.count; ++row) rows.max[row] = rows.sinks[rows.head[row]] * LOG2_E, rows.sum[row] = 1.0f;

  const auto place = [](int64_t tile) { return std::min(tile, KEPT_TILES); };
  const auto visit = [&](int64_t tile) KVEVICT_INLINE_LAMBDA {
    const int64_t first = begin + tile * TILE_TOKENS;
    const KeyTile loaded = load_tile(keys, kv_head, first, std::min(TILE_TOKENS, end - first), scratch.keys);
    float* logits = scratch.exponentials + place(tile) * TILE_LOGITS;
    compute_logits<LANES>(scratch.query, keys.head_size, loaded, logits);
    if (rows.softcap > 0) cap_logits<LANES>(rows.softcap, loaded.count, logits);
    if (first + loaded.count - 1 > *first_hidden) hide_unseen<LANES>(rows, loaded, logits);
  };
  const int64_t num_tiles = (end - begin + TILE_TOKENS - 1) / TILE_TOKENS;
  const auto count = [&](int64_t tile) { return std::min(TILE_TOKENS, end - begin - tile * TILE_TOKENS); };
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    visit(tile);
    update_softmax<LANES>(rows, count(tile), scratch.exponentials + place(tile) * TILE_LOGITS);
    std::copy(rows.max, rows.max + BLOCK_ROWS, scratch.maxima + place(tile) * BLOCK_ROWS);
  }
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    float* exponentials = scratch.exponentials + place(tile) * TILE_LOGITS;
    if (tile >= KEPT_TILES) {
      visit(tile);
      for (int64_t at = 0; at < count(tile) * BLOCK_ROWS; at += LANES)
        store<LANES>(exponentials + at,
                     exp2_limited<LANES>(load<LANES>(exponentials + at) - load<LANES>(rows.max + at % BLOCK_ROWS)));
      std::copy(rows.max, rows.max + BLOCK_ROWS, scratch.maxima + place(tile) * BLOCK_ROWS);
    }
    add_columns<LANES>(rows, scratch.maxima + place(tile) * BLOCK_ROWS, exponentials, count(tile), weight,
                       columns + tile * TILE_TOKENS);
  }
}

}  // namespace kvevict
