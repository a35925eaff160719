// Marks the highest scores of every row. Contract: vllm_kvevict/kernels/select.py. The tests run it on a GPU, or
// emulate it on a CPU where there is none.
//
// One block takes one row: four passes of a radix select over integer keys that sort like the scores, 8 bits each, and
// one that marks. The row is read five times; after the first it comes from L2, or L1 where it is short.
#pragma once

#include <cstdint>

namespace kvevict {

constexpr int SELECT_THREADS = 512;
constexpr int NUM_DIGITS = 256;
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct SelectRow {
  const float* scores;
  int64_t kv_len, first, last;  // tokens outside of first .. last - 1 are protected
};

// NaN is 0, below -infinity, and both zeros are alike. A protected token has a key that no score has.
__device__ inline uint32_t select_key(const SelectRow& row, int64_t index) {
  if (index < row.first || index >= row.last) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(row.scores[index]);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0;
  return bits > 0x7fffffffu ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}

struct SelectState {
  int32_t counts[NUM_DIGITS];
  int32_t ties_of_warp[SELECT_THREADS / WARP];
  uint32_t threshold;  // the digits found so far, zeros below
  int64_t remaining;   // keys still wanted among those that begin with these digits
  int64_t candidates;  // how many there are
};

// Counts the digits at `shift` of the keys that begin with the threshold.
__device__ inline void count_digits(const SelectRow& row, int shift, SelectState& state) {
  for (int digit = threadIdx.x; digit < NUM_DIGITS; digit += SELECT_THREADS) state.counts[digit] = 0;
  __syncthreads();
  const uint32_t found = shift == 24 ? 0 : ~0u << (shift + 8);
  for (int64_t start = 0; start < row.kv_len; start += SELECT_THREADS) {
    const int64_t index = start + threadIdx.x;
    uint32_t digit = NUM_DIGITS;
    if (index < row.kv_len) {
      const uint32_t key = select_key(row, index);
      if ((key & found) == state.threshold) digit = key >> shift & 0xffu;
    }
    // lanes with the same digit add once: the first digits of scores are few, and atomics on one word wait
    const unsigned peers = __match_any_sync(ALL_LANES, digit);
    const bool is_leader = __ffs(peers) - 1 == static_cast<int>(threadIdx.x % WARP);
    if (digit < NUM_DIGITS && is_leader) atomicAdd(&state.counts[digit], __popc(peers));
  }
  __syncthreads();
}

// The digit in which the wanted keys end. One warp; each lane takes eight digits, the first lane the highest.
__device__ inline void choose_digit(int shift, SelectState& state) {
  if (threadIdx.x < WARP) {
    constexpr int digits = NUM_DIGITS / WARP;
    const int highest = NUM_DIGITS - 1 - static_cast<int>(threadIdx.x) * digits;
    int64_t sum = 0;
    for (int i = 0; i < digits; ++i) sum += state.counts[highest - i];
    int64_t through = sum;
    for (int offset = 1; offset < WARP; offset *= 2) {
      const int64_t other = __shfl_up_sync(ALL_LANES, through, offset);
      if (static_cast<int>(threadIdx.x) >= offset) through += other;
    }
    const int64_t remaining = state.remaining;
    __syncwarp();  // all have read it before one writes
    int64_t above = through - sum;
    if (above < remaining && remaining <= through) {
      int digit = highest;
      while (above + state.counts[digit] < remaining) above += state.counts[digit--];
      state.threshold |= static_cast<uint32_t>(digit) << shift;
      state.remaining = remaining - above;
      state.candidates = state.counts[digit];
    }
  }
  __syncthreads();
}

// Of the keys equal to the threshold the first `remaining` stay.
__device__ inline void mark(const SelectRow& row, SelectState& state, bool* kept) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const bool are_split = state.candidates > state.remaining;
  int64_t ties_before = 0;
  for (int64_t start = 0; start < row.kv_len; start += SELECT_THREADS) {
    const int64_t index = start + threadIdx.x;
    const bool is_token = index < row.kv_len;
    const uint32_t key = is_token ? select_key(row, index) : 0;
    if (!are_split) {
      if (is_token) kept[index] = key >= state.threshold;
      continue;
    }
    const bool is_tie = is_token && key == state.threshold;
    const unsigned ties = __ballot_sync(ALL_LANES, is_tie);
    if (lane == 0) state.ties_of_warp[warp] = __popc(ties);
    __syncthreads();
    int64_t rank = ties_before + __popc(ties & ((1u << lane) - 1));
    for (int other = 0; other < SELECT_THREADS / WARP; ++other) {
      if (other < warp) rank += state.ties_of_warp[other];
      ties_before += state.ties_of_warp[other];
    }
    if (is_token) kept[index] = key > state.threshold || (is_tie && rank < state.remaining);
    __syncthreads();  // before the next tile's counts
  }
}

// kv_lens: tokens of each row, null if all have max_kv_len.
__global__ void __launch_bounds__(SELECT_THREADS) select_kernel(
    const float* scores, const int64_t* num_kept, const int64_t* kv_lens, bool* kept, int64_t max_kv_len,
    int64_t num_sink, int64_t num_recent) {
  __shared__ SelectState state;
  const int64_t head = blockIdx.x;
  const int64_t kv_len = kv_lens == nullptr ? max_kv_len : kv_lens[head];
  const int64_t first = num_sink < kv_len ? num_sink : kv_len;
  const int64_t last = kv_len - num_recent > first ? kv_len - num_recent : first;
  const SelectRow row{scores + head * max_kv_len, kv_len, first, last};
  bool* kept_of_row = kept + head * max_kv_len;
  const int64_t wanted = num_kept[head];
  // what stands behind the tokens of a row is not kept, and of a row that keeps nothing all the rest
  for (int64_t index = (wanted == 0 ? 0 : kv_len) + threadIdx.x; index < max_kv_len; index += SELECT_THREADS)
    kept_of_row[index] = false;
  if (wanted == 0) return;
  if (threadIdx.x == 0) {
    state.threshold = 0;
    state.remaining = wanted;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    count_digits(row, shift, state);
    choose_digit(shift, state);
  }
  mark(row, state, kept_of_row);
}

}  // namespace kvevict
