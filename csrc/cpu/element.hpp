// The types of stored elements and their conversion to float, written so that loops over it vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.hpp"

namespace kvevict {

// The numbers are shared with DTYPE_CODES in vllm_kvevict/kernels/paged.py.
enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT8_E4M3 = 3, FLOAT8_E5M2 = 4 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

struct Float8E4M3 {
  uint8_t bits;
};

struct Float8E5M2 {
  uint8_t bits;
};

KVEVICT_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

KVEVICT_INLINE float to_float(float value) { return value; }

KVEVICT_INLINE float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

KVEVICT_INLINE float to_float(Float16 value) {
  const uint32_t bits = value.bits;
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  // 2^112 is the difference of the exponent biases; the product is exact, also for subnormal halves.
  const float finite = float_from_bits(magnitude) * 0x1p112f;
  const float special = float_from_bits(magnitude | 0x7f800000u);
  const float result = (bits & 0x7c00u) == 0x7c00u ? special : finite;
  return (bits & 0x8000u) ? -result : result;
}

// Without infinities; the largest magnitude is NaN.
KVEVICT_INLINE float to_float(Float8E4M3 value) {
  const uint32_t magnitude = value.bits & 0x7fu;
  // Not by a product as above: subnormals are common here, and those of float are slow. With 1 in front of its
  // fraction a subnormal is too large by 2^-6. Only integers are selected: a choice of floats does not vectorise.
  const uint32_t excess = magnitude < 8u ? 121u << 23 : 0u;
  const uint32_t finite = (magnitude << 20) + (magnitude < 8u ? 121u << 23 : 120u << 23);
  const float result = float_from_bits(magnitude == 0x7fu ? 0x7fc00000u : finite) - float_from_bits(excess);
  return (value.bits & 0x80u) ? -result : result;
}

KVEVICT_INLINE float to_float(Float8E5M2 value) {
  return to_float(Float16{static_cast<uint16_t>(value.bits << 8)});
}

// Calls with an element of the type that a model computes in.
template <typename Call>
KVEVICT_INLINE auto with_model_type(int32_t dtype, Call call) {
  if (dtype == BFLOAT16) return call(BFloat16{});
  if (dtype == FLOAT16) return call(Float16{});
  return call(float{});
}

// Calls with an element of the type that a cache holds.
template <typename Call>
KVEVICT_INLINE auto with_cache_type(int32_t dtype, Call call) {
  if (dtype == FLOAT8_E4M3) return call(Float8E4M3{});
  if (dtype == FLOAT8_E5M2) return call(Float8E5M2{});
  return with_model_type(dtype, call);
}

template <int LANES, typename Element>
KVEVICT_INLINE Float<LANES> convert(const Element* from) {
  float to[LANES];
  for (int lane = 0; lane < LANES; ++lane) to[lane] = to_float(from[lane]);
  return load<LANES>(to);
}

// Without the way through memory that the loop above takes.
template <int LANES>
KVEVICT_INLINE Float<LANES> convert(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Float<LANES>>(__builtin_convertvector(halves, Bits<LANES>) << 16);
}

template <int LANES>
KVEVICT_INLINE Float<LANES> convert(const float* from) {
  return load<LANES>(from);
}

}  // namespace kvevict
