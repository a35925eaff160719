// The kernels of csrc/cuda as functions of a library that runs on the CPU.
#include "cuda_emulation.hpp"

#include "../../csrc/cuda/move_tokens.cuh"
#include "../../csrc/cuda/select.cuh"

extern "C" void emulated_select(const float* scores, const int64_t* num_kept, const int64_t* kv_lens, bool* kept,
                                int64_t num_rows, int64_t max_kv_len, int64_t num_sink, int64_t num_recent) {
  emulation::launch(static_cast<uint32_t>(num_rows), 1, kvevict::SELECT_THREADS, [=] {
    kvevict::select_kernel(scores, num_kept, kv_lens, kept, max_kv_len, num_sink, num_recent);
  });
}

template <typename Element>
void move_tokens(const kvevict::MovePool& keys, const kvevict::MovePool& values, const int64_t* source,
                 const int64_t* destination, int64_t num_tokens, int64_t block_size) {
  const auto blocks = static_cast<uint32_t>((num_tokens + kvevict::MOVES_PER_BLOCK - 1) / kvevict::MOVES_PER_BLOCK);
  emulation::launch(blocks, 2, kvevict::MOVE_THREADS, [=] {
    kvevict::move_tokens_kernel<Element>(keys, values, source, destination, num_tokens, block_size);
  });
}

extern "C" void emulated_move_tokens(
    void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim, int64_t key_head_size,
    void* values, int64_t value_stride_page, int64_t value_stride_token, int64_t value_stride_dim,
    int64_t value_head_size,
    const int64_t* source, const int64_t* destination, int64_t num_tokens, int64_t block_size, int64_t element_bytes) {
  kvevict::MovePool key_pool{keys, key_stride_page, key_stride_token, key_stride_dim, key_head_size, false};
  kvevict::MovePool value_pool{values, value_stride_page, value_stride_token, value_stride_dim, value_head_size, false};
  key_pool.by_vectors = kvevict::is_aligned(key_pool, element_bytes);
  value_pool.by_vectors = kvevict::is_aligned(value_pool, element_bytes);
  if (element_bytes == 1) move_tokens<uint8_t>(key_pool, value_pool, source, destination, num_tokens, block_size);
  if (element_bytes == 2) move_tokens<uint16_t>(key_pool, value_pool, source, destination, num_tokens, block_size);
  if (element_bytes == 4) move_tokens<uint32_t>(key_pool, value_pool, source, destination, num_tokens, block_size);
}
