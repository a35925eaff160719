#include "isa.hpp"

// Limits later calls to vectors of this many floats (4 is always there) and returns the width they will use, so that
// tests can run what narrower machines run.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_limit_lanes(int32_t most_lanes) {
  kvevict::most_lanes = most_lanes;
  return kvevict::usable_lanes();
}
