#include "isa.hpp"

#include "tiles.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvevict {
namespace {

bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  uint32_t eax, ebx, ecx, edx;
  constexpr uint32_t amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & amx_bf16) == 0 || (edx & amx_tile) == 0) return false;
  // Linux hands out the registers on request only: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA, once per process.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

}  // namespace

bool usable_tiles() {
  static const bool found = has_tiles();
  return found && may_use_tiles && usable_lanes() == 16;
}

}  // namespace kvevict

// Limits later calls to vectors of this many floats (4 is always there) and returns the width they will use, so that
// tests can run what narrower machines run.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_limit_lanes(int32_t most_lanes) {
  kvevict::most_lanes = most_lanes;
  return kvevict::usable_lanes();
}

// Allows or forbids AMX to later calls, for tests, and returns whether they will use it.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_allow_tiles(int32_t allow) {
  kvevict::may_use_tiles = allow != 0;
  return kvevict::usable_tiles();
}

// Allows or forbids later calls to multiply bfloat16 in pairs, for tests, and returns whether they will.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_allow_pairs(int32_t allow) {
  kvevict::may_use_pairs = allow != 0;
  return kvevict::usable_pairs();
}
