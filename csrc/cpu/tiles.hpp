// Products of bfloat16 matrices by AMX: 16 rows times 16 columns, accumulated in float32.
//
// Instructions are spelled out: the compiler's intrinsics need a target of their own, and a caller that has it.
#pragma once

#include <cstdint>

#include "vector.hpp"

namespace kvevict {

constexpr int64_t TILE_ROWS = 16, TILE_COLUMNS = 16;
constexpr int64_t TILE_DEPTH = 32;                      // bfloat16 numbers of a row, which are multiplied and summed
constexpr int64_t TILE_BYTES = 64 * TILE_ROWS;          // of any operand
constexpr int64_t TILE_ELEMENTS = TILE_ROWS * TILE_DEPTH;

// Whether tests want tiles to be used where there are any.
inline bool may_use_tiles = true;

// Whether this machine multiplies tiles, and the kernel lets this process do so.
bool usable_tiles();

#if defined(__x86_64__)
// While it lives this thread may multiply tiles. It leaves the configuration it found: other libraries remember theirs.
class TileConfig {
 public:
  TileConfig() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } ours;
    __asm__ volatile("sttilecfg %0" : "=m"(found_));
    __asm__ volatile("ldtilecfg %0" : : "m"(ours));
  }
  ~TileConfig() { __asm__ volatile("ldtilecfg %0" : : "m"(found_)); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;

 private:
  struct alignas(64) {
    uint8_t bytes[64];
  } found_;
};

// out = a * b for 16 rows and four tiles of columns; `out` is float32 [16, 64].
// a: [depth / TILE_DEPTH, 16 rows, TILE_DEPTH]
// b: [4, depth / TILE_DEPTH, TILE_DEPTH / 2, 16 columns, 2]
KVEVICT_INLINE void multiply_tiles(const uint16_t* a, const uint16_t* b, int64_t depth, float* out) {
  const int64_t steps = depth / TILE_DEPTH, next_column = steps * TILE_BYTES, row_bytes = 64;
  __asm__ volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" : : : "memory");
  for (int64_t step = 0; step < steps; ++step) {
    const char* columns = reinterpret_cast<const char*>(b) + step * TILE_BYTES;
    __asm__ volatile(
        "tileloadd (%0,%2,1), %%tmm4\n\t"
        "tileloadd (%1,%2,1), %%tmm5\n\t"
        "tdpbf16ps %%tmm5, %%tmm4, %%tmm0\n\t"
        "tileloadd (%3,%2,1), %%tmm6\n\t"
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm1\n\t"
        "tileloadd (%4,%2,1), %%tmm7\n\t"
        "tdpbf16ps %%tmm7, %%tmm4, %%tmm2\n\t"
        "tileloadd (%5,%2,1), %%tmm5\n\t"
        "tdpbf16ps %%tmm5, %%tmm4, %%tmm3"
        :
        : "r"(a + step * TILE_ELEMENTS), "r"(columns), "r"(row_bytes), "r"(columns + next_column),
          "r"(columns + 2 * next_column), "r"(columns + 3 * next_column)
        : "memory");
  }
  const int64_t out_bytes = 4 * 64;
  __asm__ volatile(
      "tilestored %%tmm0, (%0,%1,1)\n\t"
      "tilestored %%tmm1, 64(%0,%1,1)\n\t"
      "tilestored %%tmm2, 128(%0,%1,1)\n\t"
      "tilestored %%tmm3, 192(%0,%1,1)"
      :
      : "r"(out), "r"(out_bytes)
      : "memory");
}
#else
// Named by templates that are not instantiated here.
void multiply_tiles(const uint16_t* a, const uint16_t* b, int64_t depth, float* out);
#endif

}  // namespace kvevict
