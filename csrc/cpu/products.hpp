// Products of queries with keys. Vector lanes are tokens and queries are broadcast: keys stored as
// [block_size, head_size] are transposed when they are loaded, once for all queries of their KV head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "element.hpp"
#include "pages.hpp"
#include "vector.hpp"

namespace kvevict {

// Rows that share a load of keys. With VECS vectors of keys each: ROWS * VECS accumulators, VECS keys and one query
// must fit in the registers, 32 with AVX-512 and NEON, else 16.
constexpr int ROWS = 4;
// Lowest finite float rather than -infinity: a row that sees no key must not compute inf - inf.
constexpr float NO_LOGIT = std::numeric_limits<float>::lowest();

template <typename Element, int LANES>
KVEVICT_INLINE void load_keys_of(const PagePool<const void>& keys, const Tokens& tokens, int64_t head_size, float* data) {
  // The last vector may reach past `count`: those products must be finite to be masked.
  if (tokens.count < TILE_TOKENS) std::fill(data, data + TILE_TOKENS * head_size, 0.0f);
  for_each_run<Element>(keys, tokens, [&](int64_t done, int64_t length, const Element* source) KVEVICT_INLINE_LAMBDA {
    if (keys.stride_token == 1) {
      for (int64_t dim = 0; dim < head_size; ++dim) {
        float* out = data + dim * TILE_TOKENS + done;
        const Element* from = source + dim * keys.stride_dim;
        int64_t token = 0;
        for (; token + LANES <= length; token += LANES) store<LANES>(out + token, convert<LANES>(from + token));
        for (; token < length; ++token) out[token] = to_float(from[token]);
      }
    } else {
      for (int64_t token = 0; token < length; ++token)
        for (int64_t dim = 0; dim < head_size; ++dim)
          data[dim * TILE_TOKENS + done + token] = to_float(source[token * keys.stride_token + dim * keys.stride_dim]);
    }
  });
}

// Writes at most TILE_TOKENS keys as float32 [head_size, TILE_TOKENS].
template <int LANES>
KVEVICT_INLINE void load_keys_by_dimension(const PagePool<const void>& keys, int32_t dtype, const Tokens& tokens,
                                           int64_t head_size, float* data) {
  with_cache_type(dtype, [&](auto element) KVEVICT_INLINE_LAMBDA {
    load_keys_of<decltype(element), LANES>(keys, tokens, head_size, data);
  });
}

// Products of a block of rows with VECS vectors of keys, the first of which is at `keys` in each dimension.
template <int LANES, int VECS>
KVEVICT_INLINE void multiply_rows(const float* query, const float* keys, int64_t head_size,
                                  Float<LANES> (&products)[ROWS][VECS]) {
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) products[r][v] = Float<LANES>{};
  for (int64_t dim = 0; dim < head_size; ++dim) {
    Float<LANES> lanes[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) lanes[v] = load<LANES>(keys + dim * TILE_TOKENS + v * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const float of_row = query[dim * ROWS + r];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) products[r][v] += lanes[v] * of_row;
    }
  }
}

#if defined(__x86_64__)
// Writes at most TILE_TOKENS keys of bfloat16 as pairs of dimensions [head_size / 2, TILE_TOKENS].
KVEVICT_INLINE void load_key_pairs(const PagePool<const void>& keys, const Tokens& tokens, int64_t head_size,
                                   uint32_t* data) {
  if (tokens.count < TILE_TOKENS) std::fill(data, data + TILE_TOKENS * head_size / 2, 0u);
  for_each_run<BFloat16>(keys, tokens, [&](int64_t done, int64_t length, const BFloat16* source) KVEVICT_INLINE_LAMBDA {
    for (int64_t pair = 0; pair < head_size / 2; ++pair) {
      uint32_t* out = data + pair * TILE_TOKENS + done;
      const BFloat16 *first = source + 2 * pair * keys.stride_dim, *second = first + keys.stride_dim;
      if (keys.stride_token == 1) {
        for (int64_t token = 0; token < length; ++token)
          out[token] = first[token].bits | static_cast<uint32_t>(second[token].bits) << 16;
      } else {
        for (int64_t token = 0; token < length; ++token)
          out[token] = first[token * keys.stride_token].bits |
                       static_cast<uint32_t>(second[token * keys.stride_token].bits) << 16;
      }
    }
  });
}

// As `multiply_rows`, of pairs: query [num_pairs, ROWS], keys [num_pairs, TILE_TOKENS]. Spelled out since intrinsics need
// a target of their own.
template <int LANES, int VECS>
KVEVICT_INLINE void multiply_pairs(const uint32_t* query, const uint32_t* keys, int64_t num_pairs,
                                   Float<LANES> (&products)[ROWS][VECS]) {
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) products[r][v] = Float<LANES>{};
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    Bits<LANES> lanes[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) std::memcpy(&lanes[v], keys + pair * TILE_TOKENS + v * LANES, sizeof(lanes[v]));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Bits<LANES> of_row = query[pair * ROWS + r] - Bits<LANES>{};
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v)
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(products[r][v]) : "v"(lanes[v]), "v"(of_row));
    }
  }
}
#endif

}  // namespace kvevict
