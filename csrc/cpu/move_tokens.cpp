// In-place copies of cached tokens between slots. Contract: kernels/move_tokens.py.

#include <cstdint>
#include <cstring>

namespace {

// Below this many tokens per call the copies cost less than waking the threads.
constexpr int64_t MIN_PARALLEL_TOKENS = 64;

// K or V of a pool of pages. Strides count elements.
struct Pool {
  void* data;
  int64_t stride_page, stride_token, stride_dim, head_size;
};

template <typename Element>
inline void move_token(const Pool& pool, int64_t block_size, int64_t source, int64_t destination) {
  const auto slot = [&](int64_t id) {
    return static_cast<Element*>(pool.data) + id / block_size * pool.stride_page + id % block_size * pool.stride_token;
  };
  const Element* from = slot(source);
  Element* to = slot(destination);
  if (pool.stride_dim == 1) {
    std::memcpy(to, from, static_cast<size_t>(pool.head_size) * sizeof(Element));
  } else {
    for (int64_t dim = 0; dim < pool.head_size; ++dim) to[dim * pool.stride_dim] = from[dim * pool.stride_dim];
  }
}

// A static schedule gives each thread a run of moves: neighbours in the list share pages, and with transposed keys
// also cache lines.
template <typename Element>
void move_tokens(const Pool& keys, const Pool& values, const int64_t* source, const int64_t* destination,
                 int64_t num_tokens, int64_t block_size) {
#pragma omp parallel for schedule(static) if (num_tokens >= MIN_PARALLEL_TOKENS)
  for (int64_t i = 0; i < num_tokens; ++i) {
    move_token<Element>(keys, block_size, source[i], destination[i]);
    move_token<Element>(values, block_size, source[i], destination[i]);
  }
}

}  // namespace

// Returns 0, or 1 for an element size other than 1, 2 or 4 bytes. The caller has checked shapes, strides and slots.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_move_tokens(
    void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim, int64_t key_head_size,
    void* values, int64_t value_stride_page, int64_t value_stride_token, int64_t value_stride_dim,
    int64_t value_head_size,
    const int64_t* source, const int64_t* destination, int64_t num_tokens,
    int64_t block_size, int64_t element_bytes) {
  const Pool key_pool{keys, key_stride_page, key_stride_token, key_stride_dim, key_head_size};
  const Pool value_pool{values, value_stride_page, value_stride_token, value_stride_dim, value_head_size};
  switch (element_bytes) {
    case 1: move_tokens<uint8_t>(key_pool, value_pool, source, destination, num_tokens, block_size); return 0;
    case 2: move_tokens<uint16_t>(key_pool, value_pool, source, destination, num_tokens, block_size); return 0;
    case 4: move_tokens<uint32_t>(key_pool, value_pool, source, destination, num_tokens, block_size); return 0;
    default: return 1;
  }
}
