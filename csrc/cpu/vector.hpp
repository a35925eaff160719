// Fixed-width float vectors on the compiler's own vector types, so one source serves AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstdint>
#include <cstring>

// Instruction sets are chosen per function, and only what is inlined into such a function is compiled for its set.
#define KVEVICT_INLINE inline __attribute__((always_inline))

namespace kvevict {

template <int LANES>
struct VectorTypes {
  typedef float Float __attribute__((vector_size(LANES * 4)));
  typedef int32_t Int __attribute__((vector_size(LANES * 4)));
  typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
};

template <int LANES>
using Float = typename VectorTypes<LANES>::Float;

template <int LANES>
KVEVICT_INLINE Float<LANES> load(const float* from) {
  Float<LANES> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <int LANES>
KVEVICT_INLINE void store(float* to, Float<LANES> value) {
  std::memcpy(to, &value, sizeof(value));
}

template <int LANES>
KVEVICT_INLINE Float<LANES> broadcast(float value) {
  return value - Float<LANES>{};
}

template <int LANES>
KVEVICT_INLINE Float<LANES> larger(Float<LANES> a, Float<LANES> b) {
  return a > b ? a : b;
}

// 2^x for x <= 0, relative error below 3e-7. Anything under -125 returns 2^-125: as good as zero, since the largest
// term of a softmax is 1. NaN stays NaN.
template <int LANES>
KVEVICT_INLINE Float<LANES> exp2_nonpositive(Float<LANES> x) {
  using Bits = typename VectorTypes<LANES>::Bits;
  constexpr float lowest = -125.0f;
  x = x < lowest ? broadcast<LANES>(lowest) : x;
  // Adding 1.5 * 2^23 leaves round(x) in the low mantissa bits.
  constexpr float rounder = 12582912.0f;
  const Float<LANES> rounded = x + rounder;
  const Float<LANES> fraction = x - (rounded - rounder);
  Float<LANES> power = fraction * 0.0013276472454890609f + 0.009675541892647743f;
  power = power * fraction + 0.05550713092088699f;
  power = power * fraction + 0.24022120237350464f;
  power = power * fraction + 0.6931469440460205f;
  power = power * fraction + 1.0000001192092896f;
  Bits power_bits, rounded_bits;
  std::memcpy(&power_bits, &power, sizeof(power));
  std::memcpy(&rounded_bits, &rounded, sizeof(rounded));
  power_bits += rounded_bits << 23;
  std::memcpy(&power, &power_bits, sizeof(power));
  return power;
}

template <int LANES>
KVEVICT_INLINE float sum_lanes(Float<LANES> value) {
  if constexpr (LANES == 1) {
    return value[0];
  } else if constexpr (LANES == 2) {
    return value[0] + value[1];
  } else {
    Float<LANES / 2> low, high;
    std::memcpy(&low, &value, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof(low), sizeof(high));
    return sum_lanes<LANES / 2>(low + high);
  }
}

}  // namespace kvevict
