// Which of the instruction sets that a kernel is compiled for a call uses, named by its vector width in floats.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvevict {

// Tests lower it to run what narrower machines run.
inline int32_t most_lanes = 16;

#if defined(__x86_64__)
#define KVEVICT_TARGET_V4 __attribute__((target("arch=x86-64-v4")))
#define KVEVICT_TARGET_V3 __attribute__((target("arch=x86-64-v3")))

inline int32_t usable_lanes() {
  const int32_t widest = __builtin_cpu_supports("x86-64-v4") ? 16 : __builtin_cpu_supports("x86-64-v3") ? 8 : 4;
  return std::min(widest, most_lanes);
}
#else
inline int32_t usable_lanes() { return 4; }
#endif

}  // namespace kvevict
