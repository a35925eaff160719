// In-place copies of cached tokens between slots. Contract: vllm_kvevict/kernels/move_tokens.py. The tests run it on a
// GPU, or emulate it on a CPU where there is none.
//
// A block takes K or V of 32 moves. Where the elements of a token are contiguous a warp copies a token, 16 bytes a lane
// if they are aligned; else, with transposed keys, a lane takes a token: neighbours in the list then share sectors.
#pragma once

#include <cstdint>

namespace kvevict {

constexpr int MOVES_PER_BLOCK = 32;
constexpr int MOVE_WARPS = 4;
constexpr int MOVE_THREADS = MOVE_WARPS * 32;

// K or V of a pool of pages. Strides count elements. by_vectors: every token is a whole number of aligned uint4.
struct MovePool {
  void* data;
  int64_t stride_page, stride_token, stride_dim, head_size;
  bool by_vectors;
};

inline bool is_aligned(const MovePool& pool, int64_t element_bytes) {
  const int64_t odd = reinterpret_cast<int64_t>(pool.data) |
                      (pool.stride_page | pool.stride_token | pool.head_size) * element_bytes;
  return odd % static_cast<int64_t>(sizeof(uint4)) == 0;
}

__device__ inline int64_t offset_of(const MovePool& pool, int64_t slot, int64_t block_size) {
  const int64_t page = slot / block_size;
  return page * pool.stride_page + (slot - page * block_size) * pool.stride_token;
}

template <typename Element>
__global__ void __launch_bounds__(MOVE_THREADS) move_tokens_kernel(
    MovePool keys, MovePool values, const int64_t* source, const int64_t* destination, int64_t num_tokens,
    int64_t block_size) {
  const MovePool pool = blockIdx.y == 0 ? keys : values;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * MOVES_PER_BLOCK;
  const int64_t end = begin + MOVES_PER_BLOCK < num_tokens ? begin + MOVES_PER_BLOCK : num_tokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // one division for each slot, not one for each lane that copies some of it
  __shared__ int64_t offsets[2][MOVES_PER_BLOCK];
  if (warp < 2 && begin + lane < end) {
    const int64_t slot = (warp == 0 ? source : destination)[begin + lane];
    offsets[warp][lane] = slot < 0 ? -1 : offset_of(pool, slot, block_size);
  }
  __syncthreads();
  const auto is_gap = [&](int move) { return offsets[0][move] < 0 || offsets[1][move] < 0; };

  Element* data = static_cast<Element*>(pool.data);
  if (pool.stride_dim != 1) {
    if (begin + lane >= end || is_gap(lane)) return;
    const Element* from = data + offsets[0][lane];
    Element* to = data + offsets[1][lane];
    for (int64_t dim = warp; dim < pool.head_size; dim += MOVE_WARPS)
      to[dim * pool.stride_dim] = from[dim * pool.stride_dim];
    return;
  }
  for (int move = warp; move < end - begin; move += MOVE_WARPS) {
    if (is_gap(move)) continue;
    const Element* from = data + offsets[0][move];
    Element* to = data + offsets[1][move];
    if (pool.by_vectors) {
      const int64_t vectors = pool.head_size * static_cast<int64_t>(sizeof(Element)) / sizeof(uint4);
      for (int64_t i = lane; i < vectors; i += 32)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
      for (int64_t dim = lane; dim < pool.head_size; dim += 32) to[dim] = from[dim];
    }
  }
}

}  // namespace kvevict
