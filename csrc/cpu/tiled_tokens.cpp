// Copies of tokens out of tiled pages and between them. Contract: vllm_kvevict/kernels/tiled_tokens.py.
//
// Keys: tiles of 16 tokens, in which pairs of dimensions of the 16 tokens follow each other. Values: tiles of 16
// dimensions, in which pairs of tokens follow each other. These are the operands that AMX multiplies.

#include <cstdint>

#include "copies.hpp"
#include "vector.hpp"

namespace kvevict {
namespace {

constexpr int64_t TILE = 16;
constexpr int64_t PAIR = 2;

template <typename Element>
struct TiledPages {
  Element *keys, *values;
  int64_t stride_page, block_size, head_size;

  // The first element of a token's keys; the pair of dimensions d and d + 1 is d / 2 * TILE * PAIR further on.
  KVEVICT_INLINE Element* key(int64_t slot) const {
    const int64_t page = slot / block_size, token = slot - page * block_size;
    return keys + page * stride_page + token / TILE * TILE * head_size + token % TILE * PAIR;
  }

  // The first element of a token's values; dimension d is d / TILE * TILE * block_size + d % TILE * PAIR further on.
  KVEVICT_INLINE Element* value(int64_t slot) const {
    const int64_t page = slot / block_size, token = slot - page * block_size;
    return values + page * stride_page + token / PAIR * TILE * PAIR + token % PAIR;
  }
};

template <typename Element>
KVEVICT_INLINE void gather_token(const TiledPages<Element>& pages, int64_t slot, Element* keys, Element* values) {
  const Element* from = pages.key(slot);
  for (int64_t pair = 0; pair < pages.head_size / PAIR; ++pair)
    for (int64_t i = 0; i < PAIR; ++i) keys[pair * PAIR + i] = from[pair * TILE * PAIR + i];
  from = pages.value(slot);
  for (int64_t tile = 0; tile < pages.head_size / TILE; ++tile)
    for (int64_t i = 0; i < TILE; ++i) values[tile * TILE + i] = from[tile * TILE * pages.block_size + i * PAIR];
}

template <typename Element>
KVEVICT_INLINE void move_token(const TiledPages<Element>& pages, int64_t source, int64_t destination) {
  const Element* from = pages.key(source);
  Element* to = pages.key(destination);
  for (int64_t pair = 0; pair < pages.head_size / PAIR; ++pair)
    for (int64_t i = 0; i < PAIR; ++i) to[pair * TILE * PAIR + i] = from[pair * TILE * PAIR + i];
  from = pages.value(source);
  to = pages.value(destination);
  for (int64_t tile = 0; tile < pages.head_size / TILE; ++tile)
    for (int64_t i = 0; i < TILE; ++i) {
      const int64_t offset = tile * TILE * pages.block_size + i * PAIR;
      to[offset] = from[offset];
    }
}

template <typename Element>
TiledPages<Element> make_pages(void* keys, void* values, int64_t stride_page, int64_t block_size, int64_t head_size) {
  return {static_cast<Element*>(keys), static_cast<Element*>(values), stride_page, block_size, head_size};
}

template <typename Element>
void gather(const TiledPages<Element>& pages, const int64_t* slots, void* keys, void* values, int64_t num_tokens) {
  Element *key_rows = static_cast<Element*>(keys), *value_rows = static_cast<Element*>(values);
  for_each_part(num_tokens, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      gather_token(pages, slots[i], key_rows + i * pages.head_size, value_rows + i * pages.head_size);
  });
}

template <typename Element>
void move(const TiledPages<Element>& pages, const int64_t* source, const int64_t* destination, int64_t num_tokens) {
  for_each_part(num_tokens, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (source[i] >= 0 && destination[i] >= 0) move_token(pages, source[i], destination[i]);
  });
}

}  // namespace
}  // namespace kvevict

// Both return 0, or 1 for an element size other than 1, 2 or 4 bytes. The caller has checked sizes and slots.

// keys, values: [num_tokens, head_size]
extern "C" __attribute__((visibility("default"))) int32_t kvevict_gather_tiled_tokens(
    void* key_pages, void* value_pages, int64_t stride_page, int64_t block_size, int64_t head_size,
    const int64_t* slots, void* keys, void* values, int64_t num_tokens, int64_t element_bytes) {
  using namespace kvevict;
  return with_bits(element_bytes, [&](auto element) {
    gather(make_pages<decltype(element)>(key_pages, value_pages, stride_page, block_size, head_size), slots, keys,
           values, num_tokens);
  });
}

extern "C" __attribute__((visibility("default"))) int32_t kvevict_move_tiled_tokens(
    void* key_pages, void* value_pages, int64_t stride_page, int64_t block_size, int64_t head_size,
    const int64_t* source, const int64_t* destination, int64_t num_tokens, int64_t element_bytes) {
  using namespace kvevict;
  return with_bits(element_bytes, [&](auto element) {
    move(make_pages<decltype(element)>(key_pages, value_pages, stride_page, block_size, head_size), source, destination,
         num_tokens);
  });
}
