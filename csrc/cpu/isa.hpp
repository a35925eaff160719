// Which of the instruction sets that a kernel is compiled for a call uses, named by its vector width in floats.
//
// A kernel is a struct with a template run<LANES>, inlined and without a result. function_for<Kernel>() is this function for
// the widest vectors that there are, compiled for their instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvevict {

// Tests lower it to run what narrower machines run.
inline int32_t most_lanes = 16;
// Whether tests want bfloat16 to be multiplied in pairs where that can be.
inline bool may_use_pairs = true;

#if defined(__x86_64__)
inline int32_t usable_lanes() {
  const int32_t widest = __builtin_cpu_supports("x86-64-v4") ? 16 : __builtin_cpu_supports("x86-64-v3") ? 8 : 4;
  return std::min(widest, most_lanes);
}
// Whether vectors of pairs of bfloat16 are multiplied by one instruction (AVX512_BF16).
inline bool usable_pairs() { return may_use_pairs && usable_lanes() == 16 && __builtin_cpu_supports("avx512bf16"); }
// AVX-512 has 32 of them.
template <int LANES>
constexpr int VECTOR_REGISTERS = LANES == 16 ? 32 : 16;
#else
inline int32_t usable_lanes() { return 4; }
inline bool usable_pairs() { return false; }
template <int LANES>
constexpr int VECTOR_REGISTERS = 32;
#endif

template <typename Kernel, typename Function = decltype(&Kernel::template run<4>)>
struct Compiled;

template <typename Kernel, typename... Arguments>
struct Compiled<Kernel, void (*)(Arguments...)> {
  static void baseline(Arguments... arguments) { Kernel::template run<4>(arguments...); }
#if defined(__x86_64__)
  __attribute__((target("arch=x86-64-v3"))) static void v3(Arguments... arguments) {
    Kernel::template run<8>(arguments...);
  }
  __attribute__((target("arch=x86-64-v4"))) static void v4(Arguments... arguments) {
    Kernel::template run<16>(arguments...);
  }
#endif
};

template <typename Kernel>
auto function_for(int32_t lanes = usable_lanes()) {
#if defined(__x86_64__)
  if (lanes == 16) return &Compiled<Kernel>::v4;
  if (lanes == 8) return &Compiled<Kernel>::v3;
#endif
  return &Compiled<Kernel>::baseline;
}

}  // namespace kvevict
