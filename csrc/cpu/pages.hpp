// The pages that a cache is kept in, and how tokens are read out of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "element.hpp"
#include "vector.hpp"

namespace kvevict {

// Keys that a kernel loads as float32 at a time: 16 KiB for a head size of 64.
constexpr int64_t TILE_TOKENS = 64;

// K or V of a pool of pages; Data is void where a kernel writes, else const void. Strides count elements.
template <typename Data>
struct PagePool {
  Data* data;
  int64_t stride_page, stride_token, stride_dim;

  template <typename Element>
  KVEVICT_INLINE Element* at(int64_t page, int64_t offset) const {
    return static_cast<Element*>(data) + page * stride_page + offset * stride_token;
  }
};

// Consecutive tokens in the pages of one KV head: cache indices first .. first + count - 1.
struct Tokens {
  const int64_t* pages;
  int64_t block_size, first, count;
};

// Calls visit(offset of the run in the tokens, its length, its first element) for each run of tokens in one page.
template <typename Element, typename Visit>
KVEVICT_INLINE void for_each_run(const PagePool<const void>& pool, const Tokens& tokens, Visit visit) {
  for (int64_t done = 0; done < tokens.count;) {
    const int64_t offset = (tokens.first + done) % tokens.block_size;
    const int64_t length = std::min(tokens.block_size - offset, tokens.count - done);
    const int64_t page = tokens.pages[(tokens.first + done) / tokens.block_size];
    visit(done, length, pool.at<const Element>(page, offset));
    done += length;
  }
}

// The keys of one request, and the pages of each of its KV heads.
struct PagedKeys {
  PagePool<const void> pool;
  const int64_t* page_table;
  int64_t page_table_stride_head;
  int32_t dtype;
  int64_t block_size, head_size;

  bool transposed() const { return pool.stride_dim != 1; }
};

// Up to TILE_TOKENS consecutive keys of one KV head as float32, in the order they are stored in.
struct KeyTile {
  const float* data;
  int64_t token_stride, dim_stride;
  int64_t first, count;  // cache indices first .. first + count - 1
};

template <typename Element>
KVEVICT_INLINE KeyTile load_tile_of(const PagedKeys& keys, int64_t kv_head, int64_t first, int64_t count, float* data) {
  const bool transposed = keys.transposed();
  // Micro-tiles reach past `count`: what they read there must not be slow to multiply.
  if (count < TILE_TOKENS) std::fill(data, data + TILE_TOKENS * keys.head_size, 0.0f);
  const Tokens tokens{keys.page_table + kv_head * keys.page_table_stride_head, keys.block_size, first, count};
  for_each_run<Element>(keys.pool, tokens, [&](int64_t done, int64_t length, const Element* source) KVEVICT_INLINE_LAMBDA {
    if (transposed) {
      for (int64_t dim = 0; dim < keys.head_size; ++dim)
        for (int64_t token = 0; token < length; ++token)
          data[dim * TILE_TOKENS + done + token] = to_float(source[dim * keys.pool.stride_dim + token]);
    } else {
      for (int64_t token = 0; token < length; ++token)
        for (int64_t dim = 0; dim < keys.head_size; ++dim)
          data[(done + token) * keys.head_size + dim] = to_float(source[token * keys.pool.stride_token + dim]);
    }
  });
  return {data, transposed ? 1 : keys.head_size, transposed ? TILE_TOKENS : 1, first, count};
}

KVEVICT_INLINE KeyTile load_tile(const PagedKeys& keys, int64_t kv_head, int64_t first, int64_t count, float* data) {
  return with_cache_type(keys.dtype, [&](auto element) KVEVICT_INLINE_LAMBDA {
    return load_tile_of<decltype(element)>(keys, kv_head, first, count, data);
  });
}

}  // namespace kvevict
