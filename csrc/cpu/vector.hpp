// Fixed-width float vectors on the compiler's own vector types, so one source serves AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstdint>
#include <cstring>

// Instruction sets are chosen per function, and only what is inlined into such a function is compiled for its set.
#define KVEVICT_INLINE inline __attribute__((always_inline))
// Of a lambda, between its parameters and its body.
#define KVEVICT_INLINE_LAMBDA __attribute__((always_inline))

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
using Int = typename VectorTypes<LANES>::Int;
template <int LANES>
using Bits = typename VectorTypes<LANES>::Bits;

// Logits in units of log 2 make the exponential a power of two.
constexpr float LOG2_E = 1.4426950408889634f;

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

// NaN if either is; of finite numbers otherwise. Without further comparisons: GCC takes those of vectors apart.
template <typename Value>
KVEVICT_INLINE Value larger_or_nan(Value a, Value b) {
  return (a > b ? a : b) + (a - a);
}

template <int LANES>
KVEVICT_INLINE Float<LANES> magnitude(Float<LANES> value) {
  return reinterpret_cast<Float<LANES>>(reinterpret_cast<Bits<LANES>>(value) & 0x7fffffffu);
}

// -infinity in the lanes where `room` is negative.
template <int LANES>
KVEVICT_INLINE Float<LANES> keep_where_room(Float<LANES> value, Int<LANES> room) {
  const Int<LANES> hidden = room >> 31;
  return reinterpret_cast<Float<LANES>>((reinterpret_cast<Int<LANES>>(value) & ~hidden) | (hidden & static_cast<int32_t>(0xff800000)));
}

// -infinity in the lanes from `count` on, which may be negative.
template <int LANES>
KVEVICT_INLINE Float<LANES> keep_first(Float<LANES> value, int32_t count) {
  Int<LANES> lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  return keep_where_room<LANES>(value, count - 1 - lane);
}

// 2^x for x from -0.5 to 0.5.
template <int LANES>
KVEVICT_INLINE Float<LANES> exp2_of_fraction(Float<LANES> x) {
  Float<LANES> power = x * 0.0013276472454890609f + 0.009675541892647743f;
  power = power * x + 0.05550713092088699f;
  power = power * x + 0.24022120237350464f;
  power = power * x + 0.6931469440460205f;
  return power * x + 1.0000001192092896f;
}

// 2^x for x <= 100, relative error below 3e-7. Anything under -125 returns at most 2^-125: as good as zero, since the
// largest term of a softmax is about 1. NaN stays NaN.
template <int LANES>
KVEVICT_INLINE Float<LANES> exp2_limited(Float<LANES> x) {
  Float<LANES> fraction;  // x less the nearest integer
#if defined(__x86_64__)
  // AVX-512 has instructions for both ends of this; they are spelled out since intrinsics need a target of their own.
  if constexpr (LANES == 16) {
    __asm__("vreduceps $0, %1, %0" : "=v"(fraction) : "v"(x));
    const Float<LANES> power = exp2_of_fraction<LANES>(fraction), exponent = x - fraction;
    Float<LANES> scaled;
    __asm__("vscalefps %2, %1, %0" : "=v"(scaled) : "v"(power), "v"(exponent));
    return scaled;
  }
#endif
  constexpr float lowest = -125.0f;
  x = x < lowest ? broadcast<LANES>(lowest) : x;
  // Adding 1.5 * 2^23 leaves round(x) in the low mantissa bits.
  constexpr float rounder = 12582912.0f;
  const Float<LANES> rounded = x + rounder;
  fraction = x - (rounded - rounder);
  const Bits<LANES> power = reinterpret_cast<Bits<LANES>>(exp2_of_fraction<LANES>(fraction));
  return reinterpret_cast<Float<LANES>>(power + (reinterpret_cast<Bits<LANES>>(rounded) << 23));
}

// cap * tanh(x / cap), absolute error below 3e-7 * cap. NaN stays NaN.
template <int LANES>
KVEVICT_INLINE Float<LANES> soft_capped(Float<LANES> x, float cap) {
  constexpr float most = 15.0f;  // of which tanh is 1 in float
  x /= cap;
  x = x > most ? broadcast<LANES>(most) : x;
  x = x < -most ? broadcast<LANES>(-most) : x;
  return cap - 2.0f * cap / (1.0f + exp2_limited<LANES>(x * (2.0f * LOG2_E)));
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

template <int LANES>
KVEVICT_INLINE float largest_lane(Float<LANES> value) {
  if constexpr (LANES == 1) {
    return value[0];
  } else if constexpr (LANES == 2) {
    return value[0] > value[1] ? value[0] : value[1];
  } else {
    Float<LANES / 2> low, high;
    std::memcpy(&low, &value, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof(low), sizeof(high));
    return largest_lane<LANES / 2>(larger<LANES / 2>(low, high));
  }
}

}  // namespace kvevict
