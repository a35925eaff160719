// As much of CUDA as the kernels of csrc/cuda use, on a CPU: the threads of a block are coroutines of one thread, which
// switch at barriers only, and blocks follow each other. It shows that the arithmetic and the barriers are right; it
// shows nothing about races between barriers, about memory or about speed.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  uint32_t x, y;
};
inline Index threadIdx, blockIdx;

namespace emulation {

constexpr size_t STACK_BYTES = 64 << 10;

struct Barrier {
  int expected = 0, waiting = 0;
  int64_t generation = 0;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  bool is_done = false;
};

inline std::vector<Thread> threads;
inline std::vector<Barrier> warps;
inline Barrier block;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline int64_t exchanged[64][32];

inline void open_if_full(Barrier& barrier) {
  if (barrier.waiting < barrier.expected) return;
  barrier.waiting = 0;
  ++barrier.generation;
}

inline void wait(Barrier& barrier) {
  const int64_t generation = barrier.generation;
  const Index self = threadIdx;
  ++barrier.waiting;
  open_if_full(barrier);
  while (barrier.generation == generation) swapcontext(&threads[self.x].context, &scheduler);
}

inline void run_thread() {
  const uint32_t self = threadIdx.x;
  kernel();
  threads[self].is_done = true;
  for (Barrier* barrier : {&block, &warps[self / 32]}) {  // who has left is not waited for
    --barrier->expected;
    open_if_full(*barrier);
  }
}

inline void launch(uint32_t grid_x, uint32_t grid_y, int num_threads, std::function<void()> call) {
  kernel = std::move(call);
  threads.resize(static_cast<size_t>(num_threads));
  for (uint32_t id = 0; id < grid_x * grid_y; ++id) {
    block = Barrier{num_threads};
    warps.assign(static_cast<size_t>(num_threads) / 32, Barrier{32});
    for (Thread& thread : threads) {
      thread.is_done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = STACK_BYTES;
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, run_thread, 0);
    }
    for (bool is_running = true; is_running;) {
      is_running = false;
      for (uint32_t thread = 0; thread < threads.size(); ++thread) {
        if (threads[thread].is_done) continue;
        is_running = true;
        threadIdx = {thread, 0};
        blockIdx = {id % grid_x, id / grid_x};
        swapcontext(&scheduler, &threads[thread].context);
      }
    }
  }
}

// Every lane of the warp gives a value, and then calls `combine` with all of them.
template <typename Combine>
auto exchange(int64_t value, const Combine& combine) {
  const uint32_t warp = threadIdx.x / 32;
  exchanged[warp][threadIdx.x % 32] = value;
  wait(warps[warp]);
  const auto result = combine(exchanged[warp], static_cast<int>(threadIdx.x % 32));
  wait(warps[warp]);
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block); }
inline void __syncwarp() { emulation::wait(emulation::warps[threadIdx.x / 32]); }

inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
  return emulation::exchange(value, [](const int64_t* values, int self) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<uint32_t>(values[lane] == values[self]) << lane;
    return mask;
  });
}

inline uint32_t __ballot_sync(uint32_t, bool is_set) {
  return emulation::exchange(is_set, [](const int64_t* values, int) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<uint32_t>(values[lane]) << lane;
    return mask;
  });
}

inline int64_t __shfl_up_sync(uint32_t, int64_t value, int offset) {
  return emulation::exchange(
      value, [=](const int64_t* values, int self) { return values[self >= offset ? self - offset : self]; });
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline int __ffs(uint32_t mask) { return __builtin_ffs(static_cast<int>(mask)); }
inline int __popc(uint32_t mask) { return __builtin_popcount(mask); }
inline void atomicAdd(int32_t* sum, int32_t value) { *sum += value; }
