// In-place copies of cached tokens between slots. Contract: kernels/move_tokens.py.
//
// Moves from one page to another go together. With transposed keys one element of a token is in each line of its page:
// a line is then read once for all tokens of it, and permuted into the lanes of the line that they go to.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "copies.hpp"
#include "isa.hpp"
#include "pages.hpp"
#include "vector.hpp"

namespace kvevict {
namespace {

constexpr int64_t LINE_BYTES = 64;

struct SizedPool : PagePool<void> {
  int64_t head_size;
};

struct Moves {
  const int64_t *source, *destination;
  int64_t block_size;

  KVEVICT_INLINE bool is_gap(int64_t i) const { return source[i] < 0 || destination[i] < 0; }
};

// Moves first .. last - 1, all from one line's worth of tokens of a page to one of another page.
struct Run {
  int64_t first, last;
  int64_t source_page, destination_page;
  int64_t source_part, destination_part;  // offsets of the first tokens of these lines
};

template <typename Element>
KVEVICT_INLINE Run find_run(const Moves& moves, int64_t first, int64_t end) {
  constexpr int64_t tokens = LINE_BYTES / sizeof(Element);
  const int64_t source_page = moves.source[first] / moves.block_size;
  const int64_t destination_page = moves.destination[first] / moves.block_size;
  const int64_t source_slot = source_page * moves.block_size, destination_slot = destination_page * moves.block_size;
  const int64_t source_part = (moves.source[first] - source_slot) / tokens * tokens;
  const int64_t destination_part = (moves.destination[first] - destination_slot) / tokens * tokens;
  const int64_t length = std::min(tokens, moves.block_size);
  const auto is_within = [&](int64_t slot, int64_t start) { return slot >= start && slot < start + length; };
  int64_t last = first + 1;
  while (last < end && !moves.is_gap(last) && is_within(moves.source[last], source_slot + source_part) &&
         is_within(moves.destination[last], destination_slot + destination_part) &&
         moves.source[last] < source_slot + moves.block_size &&
         moves.destination[last] < destination_slot + moves.block_size)
    ++last;
  return {first, last, source_page, destination_page, source_part, destination_part};
}

template <typename Element>
KVEVICT_INLINE void copy_tokens(const SizedPool& pool, const Moves& moves, const Run& run) {
  for (int64_t i = run.first; i < run.last; ++i) {
    const int64_t source = moves.source[i] - run.source_page * moves.block_size;
    const int64_t destination = moves.destination[i] - run.destination_page * moves.block_size;
    const Element* from = pool.at<Element>(run.source_page, source);
    Element* to = pool.at<Element>(run.destination_page, destination);
    if (pool.stride_dim == 1) {
      std::memcpy(to, from, static_cast<size_t>(pool.head_size) * sizeof(Element));
    } else {
      for (int64_t dim = 0; dim < pool.head_size; ++dim) to[dim * pool.stride_dim] = from[dim * pool.stride_dim];
    }
  }
}

#if defined(__x86_64__)
#define KVEVICT_TARGET_PERMUTE __attribute__((target("arch=x86-64-v4,avx512vbmi")))

template <typename Element>
struct Lanes;
template <>
struct Lanes<uint8_t> {
  KVEVICT_TARGET_PERMUTE static inline __m512i load(uint64_t mask, const void* from) {
    return _mm512_maskz_loadu_epi8(mask, from);
  }
  KVEVICT_TARGET_PERMUTE static inline __m512i permute(uint64_t mask, __m512i from, __m512i line) {
    return _mm512_maskz_permutexvar_epi8(mask, from, line);
  }
  KVEVICT_TARGET_PERMUTE static inline void store(void* to, uint64_t mask, __m512i line) {
    _mm512_mask_storeu_epi8(to, mask, line);
  }
};
template <>
struct Lanes<uint16_t> {
  KVEVICT_TARGET_PERMUTE static inline __m512i load(uint64_t mask, const void* from) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), from);
  }
  KVEVICT_TARGET_PERMUTE static inline __m512i permute(uint64_t mask, __m512i from, __m512i line) {
    return _mm512_maskz_permutexvar_epi16(static_cast<__mmask32>(mask), from, line);
  }
  KVEVICT_TARGET_PERMUTE static inline void store(void* to, uint64_t mask, __m512i line) {
    _mm512_mask_storeu_epi16(to, static_cast<__mmask32>(mask), line);
  }
};
template <>
struct Lanes<uint32_t> {
  KVEVICT_TARGET_PERMUTE static inline __m512i load(uint64_t mask, const void* from) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
  }
  KVEVICT_TARGET_PERMUTE static inline __m512i permute(uint64_t mask, __m512i from, __m512i line) {
    return _mm512_maskz_permutexvar_epi32(static_cast<__mmask16>(mask), from, line);
  }
  KVEVICT_TARGET_PERMUTE static inline void store(void* to, uint64_t mask, __m512i line) {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), line);
  }
};

// Transposed keys, line by line. Other lanes of the lines are neither written nor, past the page's end, read: other
// threads may be at work on them.
template <typename Element>
KVEVICT_TARGET_PERMUTE void permute_tokens(const SizedPool& pool, const Moves& moves, const Run& run, const Run& next) {
  constexpr int64_t tokens = LINE_BYTES / sizeof(Element);
  alignas(LINE_BYTES) Element lanes[tokens] = {};
  uint64_t read = 0, written = 0;
  for (int64_t i = run.first; i < run.last; ++i) {
    const int64_t from = moves.source[i] - run.source_page * moves.block_size - run.source_part;
    const int64_t to = moves.destination[i] - run.destination_page * moves.block_size - run.destination_part;
    lanes[to] = static_cast<Element>(from);
    read |= uint64_t{1} << from;
    written |= uint64_t{1} << to;
  }
  const __m512i from_lane = _mm512_load_si512(lanes);
  const Element* from = pool.at<Element>(run.source_page, run.source_part);
  const Element* soon = pool.at<Element>(next.source_page, next.source_part);
  Element* to = pool.at<Element>(run.destination_page, run.destination_part);
  for (int64_t dim = 0; dim < pool.head_size; ++dim) {
    _mm_prefetch(reinterpret_cast<const char*>(soon + dim * pool.stride_dim), _MM_HINT_T0);
    const __m512i line = Lanes<Element>::load(read, from + dim * pool.stride_dim);
    Lanes<Element>::store(to + dim * pool.stride_dim, written, Lanes<Element>::permute(written, from_lane, line));
  }
}

bool can_permute() { return usable_lanes() == 16 && __builtin_cpu_supports("avx512vbmi"); }
#else
template <typename Element>
void permute_tokens(const SizedPool& pool, const Moves& moves, const Run& run, const Run&) {
  copy_tokens<Element>(pool, moves, run);
}
bool can_permute() { return false; }
#endif

template <typename Element>
KVEVICT_INLINE void prefetch_tokens(const SizedPool& pool, const Moves& moves, const Run& run) {
  if (pool.stride_dim != 1) return;
  for (int64_t i = run.first; i < run.last; ++i) {
    const char* from = reinterpret_cast<const char*>(
        pool.at<Element>(run.source_page, moves.source[i] - run.source_page * moves.block_size));
    for (int64_t byte = 0; byte < pool.head_size * int64_t{sizeof(Element)}; byte += LINE_BYTES)
      __builtin_prefetch(from + byte);
  }
}

// The moves of one thread. A run is looked up one ahead, to ask memory for what it reads.
template <typename Element>
void move_range(const SizedPool& keys, const SizedPool& values, const Moves& moves, int64_t begin, int64_t end) {
  const bool permutes = can_permute();
  const auto next_move = [&](int64_t i) {
    while (i < end && moves.is_gap(i)) ++i;
    return i;
  };
  begin = next_move(begin);
  if (begin == end) return;
  for (Run run = find_run<Element>(moves, begin, end);;) {
    const int64_t following = next_move(run.last);
    const bool is_last = following == end;
    const Run next = is_last ? run : find_run<Element>(moves, following, end);
    for (const SizedPool* pool : {&keys, &values}) {
      prefetch_tokens<Element>(*pool, moves, next);
      if (permutes && pool->stride_token == 1 && pool->stride_dim != 1)
        permute_tokens<Element>(*pool, moves, run, next);
      else
        copy_tokens<Element>(*pool, moves, run);
    }
    if (is_last) return;
    run = next;
  }
}

}  // namespace
}  // namespace kvevict

// Returns 0, or 1 for an element size other than 1, 2 or 4 bytes. The caller has checked shapes, strides and slots.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_move_tokens(
    void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim, int64_t key_head_size,
    void* values, int64_t value_stride_page, int64_t value_stride_token, int64_t value_stride_dim,
    int64_t value_head_size,
    const int64_t* source, const int64_t* destination, int64_t num_tokens,
    int64_t block_size, int64_t element_bytes) {
  using namespace kvevict;
  const SizedPool key_pool{{keys, key_stride_page, key_stride_token, key_stride_dim}, key_head_size};
  const SizedPool value_pool{{values, value_stride_page, value_stride_token, value_stride_dim}, value_head_size};
  const Moves moves{source, destination, block_size};
  return with_bits(element_bytes, [&](auto element) {
    // A thread gets a stretch of moves: neighbours in the list share pages, and with transposed keys also cache lines.
    for_each_part(num_tokens, [&](int64_t begin, int64_t end) {
      move_range<decltype(element)>(key_pool, value_pool, moves, begin, end);
    });
  });
}
