// What kernels share that copy tokens.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvevict {

// Below this many tokens per call the copies cost less than waking the threads.
constexpr int64_t MIN_PARALLEL_TOKENS = 64;

// Calls copy(begin, end) for stretches of the tokens, on all threads if there are enough.
template <typename Copy>
void for_each_part(int64_t num_tokens, const Copy& copy) {
  const int64_t parts = std::max<int64_t>(num_tokens / MIN_PARALLEL_TOKENS, 1);
#pragma omp parallel for schedule(static) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) copy(num_tokens * part / parts, num_tokens * (part + 1) / parts);
}

// Calls with an integer of the size of an element; returns 1 where there is none.
template <typename Call>
int32_t with_bits(int64_t element_bytes, const Call& call) {
  switch (element_bytes) {
    case 1: call(uint8_t{}); return 0;
    case 2: call(uint16_t{}); return 0;
    case 4: call(uint32_t{}); return 0;
    default: return 1;
  }
}

}  // namespace kvevict
