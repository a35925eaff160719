// Launcher of move_tokens.cuh, without torch: arrays on the device of the current context.
#include <cuda_runtime.h>

#include "move_tokens.cuh"

namespace {

template <typename Element>
int32_t launch(const kvevict::MovePool& keys, const kvevict::MovePool& values, const int64_t* source,
               const int64_t* destination, int64_t num_tokens, int64_t block_size, cudaStream_t stream) {
  const int64_t blocks = (num_tokens + kvevict::MOVES_PER_BLOCK - 1) / kvevict::MOVES_PER_BLOCK;
  const dim3 grid(static_cast<unsigned>(blocks), 2);
  kvevict::move_tokens_kernel<Element>
      <<<grid, kvevict::MOVE_THREADS, 0, stream>>>(keys, values, source, destination, num_tokens, block_size);
  return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace

// Returns a cudaError_t. The caller has checked shapes, strides and slots, and that there is a token to move.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_cuda_move_tokens(
    void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim, int64_t key_head_size,
    void* values, int64_t value_stride_page, int64_t value_stride_token, int64_t value_stride_dim,
    int64_t value_head_size,
    const int64_t* source, const int64_t* destination, int64_t num_tokens,
    int64_t block_size, int64_t element_bytes, cudaStream_t stream) {
  kvevict::MovePool key_pool{keys, key_stride_page, key_stride_token, key_stride_dim, key_head_size, false};
  kvevict::MovePool value_pool{values, value_stride_page, value_stride_token, value_stride_dim, value_head_size, false};
  key_pool.by_vectors = kvevict::is_aligned(key_pool, element_bytes);
  value_pool.by_vectors = kvevict::is_aligned(value_pool, element_bytes);
  switch (element_bytes) {
    case 1: return launch<uint8_t>(key_pool, value_pool, source, destination, num_tokens, block_size, stream);
    case 2: return launch<uint16_t>(key_pool, value_pool, source, destination, num_tokens, block_size, stream);
    case 4: return launch<uint32_t>(key_pool, value_pool, source, destination, num_tokens, block_size, stream);
    default: return static_cast<int32_t>(cudaErrorInvalidValue);
  }
}
