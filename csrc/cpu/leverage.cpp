// Moments of keys before their rotation, and the norms of such keys after a linear map. Contract: kernels/leverage.py.
//
// Keys are turned back in float32, as the reference does it, and multiplied and added in float64.

#include <omp.h>

#include "buffer.hpp"
#include "isa.hpp"
#include "pages.hpp"

namespace kvevict {
namespace {

// Work is split by token count only, and added in a fixed order, so results do not depend on the number of threads.
constexpr int64_t LEAST_PARTS = 16;

template <int LANES>
struct DoubleTypes {
  typedef double Vector __attribute__((vector_size(LANES * 8)));
};
template <int LANES>
using Double = typename DoubleTypes<LANES>::Vector;

template <int LANES>
KVEVICT_INLINE Double<LANES> load_doubles(const double* from) {
  Double<LANES> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <int LANES>
KVEVICT_INLINE double sum_doubles(Double<LANES> value) {
  double sum = 0.0;
  for (int lane = 0; lane < LANES; ++lane) sum += value[lane];
  return sum;
}

// What is to be done for the tokens of one block.
struct Job {
  PagedKeys keys;
  // [max_position, rotary_dim], cosines, then sines; token and position are the same.
  const void* cos_sin;
  int64_t cos_sin_stride;
  int32_t cos_sin_dtype;
  int64_t rotary_dim;
  bool is_neox_style;
  int64_t num_kv_heads, start, num_tokens;
  float key_scale;

  // First pass: [num_kv_heads * parts_per_head, width * (width + 1)], the moments of a part, then its sum.
  double* moments = nullptr;
  // Second pass: [num_kv_heads, head_size], [num_kv_heads, head_size, columns], [num_kv_heads, max_tokens].
  const double *mean = nullptr, *map = nullptr;
  int64_t columns = 0;
  float* norms = nullptr;
  int64_t max_tokens = 0;

  // Rows of doubles are whole vectors, two at a time; what lies past their ends is zero.
  static int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }
  int64_t width() const { return padded(keys.head_size); }
  int64_t part_size() const { return width() * (width() + 1); }
  int64_t num_tiles() const { return (num_tokens + TILE_TOKENS - 1) / TILE_TOKENS; }
  int64_t parts_per_head() const { return std::min((LEAST_PARTS + num_kv_heads - 1) / num_kv_heads, num_tiles()); }
};

// Scratch of one thread.
struct Scratch {
  double* rows;  // [TILE_TOKENS, width], keys before their rotation
  float* keys;   // [TILE_TOKENS, head_size] or transposed
  float* turn;   // [rotary_dim], cosines and sines of the rotation back

  static int64_t size(const Job& job) { return TILE_TOKENS * (2 * job.width() + job.width()) + job.width(); }
  // A double takes the room of two floats.
  Scratch(float* data, const Job& job)
      : rows(reinterpret_cast<double*>(data)),
        keys(data + 2 * TILE_TOKENS * job.width()),
        turn(keys + TILE_TOKENS * job.width()) {}
};

// Turns back by the same angle and divides by the magnitude.
template <typename Element>
KVEVICT_INLINE void invert_turn(const Job& job, int64_t position, float* turn) {
  const Element* row = static_cast<const Element*>(job.cos_sin) + position * job.cos_sin_stride;
  const int64_t half = job.rotary_dim / 2;
  for (int64_t pair = 0; pair < half; ++pair) {
    const float cos = to_float(row[pair]), sin = to_float(row[half + pair]);
    const float squared_magnitude = cos * cos + sin * sin;
    turn[pair] = cos / squared_magnitude;
    turn[half + pair] = -sin / squared_magnitude;
  }
}

// Writes a tile of keys as they were before their rotation; returns how many there are. Tokens and dimensions past the
// last are zero.
KVEVICT_INLINE int64_t load_unrotated(const Job& job, int64_t kv_head, int64_t tile, const Scratch& scratch) {
  const int64_t first = tile * TILE_TOKENS, count = std::min(TILE_TOKENS, job.num_tokens - first);
  const int64_t head_size = job.keys.head_size, half = job.rotary_dim / 2;
  const int64_t step = job.is_neox_style ? 1 : 2, partner = job.is_neox_style ? half : 1;
  const KeyTile loaded = load_tile(job.keys, kv_head, job.start + first, count, scratch.keys);
  std::fill(scratch.rows, scratch.rows + TILE_TOKENS * job.width(), 0.0);
  for (int64_t token = 0; token < count; ++token) {
    const float* key = loaded.data + token * loaded.token_stride;
    const float *cos = scratch.turn, *sin = scratch.turn + half;
    const int64_t position = job.start + first + token;
    with_model_type(job.cos_sin_dtype, [&](auto element) KVEVICT_INLINE_LAMBDA {
      invert_turn<decltype(element)>(job, position, scratch.turn);
    });
    double* row = scratch.rows + token * job.width();
    for (int64_t pair = 0; pair < half; ++pair) {
      const float a = key[pair * step * loaded.dim_stride] * job.key_scale;
      const float b = key[(pair * step + partner) * loaded.dim_stride] * job.key_scale;
      row[pair * step] = a * cos[pair] - b * sin[pair];
      row[pair * step + partner] = b * cos[pair] + a * sin[pair];
    }
    for (int64_t dim = job.rotary_dim; dim < head_size; ++dim) row[dim] = key[dim * loaded.dim_stride] * job.key_scale;
  }
  return count;
}

// out[i][j] += sum over k of left[k * left_step + i * left_stride] * right[k][j], ROWS rows by 2 vectors
template <int LANES, int ROWS>
KVEVICT_INLINE void multiply_add(const double* left, int64_t left_step, int64_t left_stride, const double* right,
                                 int64_t right_width, int64_t depth, double* out, int64_t out_width) {
  Double<LANES> sums[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    sums[i][0] = load_doubles<LANES>(out + i * out_width);
    sums[i][1] = load_doubles<LANES>(out + i * out_width + LANES);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Double<LANES> first = load_doubles<LANES>(right + k * right_width);
    const Double<LANES> second = load_doubles<LANES>(right + k * right_width + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const double factor = left[k * left_step + i * left_stride];
      sums[i][0] += first * factor;
      sums[i][1] += second * factor;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    std::memcpy(out + i * out_width, &sums[i][0], sizeof(sums[i][0]));
    std::memcpy(out + i * out_width + LANES, &sums[i][1], sizeof(sums[i][1]));
  }
}

// Adds up the tiles part, part + parts_per_head, ...; the lower half of the moments is left alone.
template <int LANES, int ROWS>
KVEVICT_INLINE void add_moments(const Job& job, int64_t part, const Scratch& scratch) {
  const int64_t kv_head = part / job.parts_per_head(), width = job.width();
  double *moment = job.moments + part * job.part_size(), *total = moment + width * width;
  std::fill(moment, moment + job.part_size(), 0.0);
  for (int64_t tile = part % job.parts_per_head(); tile < job.num_tiles(); tile += job.parts_per_head()) {
    const int64_t count = load_unrotated(job, kv_head, tile, scratch);
    for (int64_t token = 0; token < count; ++token)
      for (int64_t dim = 0; dim < width; ++dim) total[dim] += scratch.rows[token * width + dim];
    for (int64_t i = 0; i < width; i += ROWS)
      for (int64_t j = i / (2 * LANES) * (2 * LANES); j < width; j += 2 * LANES)
        multiply_add<LANES, ROWS>(scratch.rows + i, width, 1, scratch.rows + j, width, count, moment + i * width + j,
                                  width);
  }
}

// The squared lengths of the keys of one tile after the map.
template <int LANES, int ROWS>
KVEVICT_INLINE void square_rows(const Job& job, int64_t item, const Scratch& scratch) {
  const int64_t kv_head = item / job.num_tiles(), tile = item % job.num_tiles();
  const int64_t head_size = job.keys.head_size, width = job.width();
  const int64_t count = load_unrotated(job, kv_head, tile, scratch);
  const double *mean = job.mean + kv_head * head_size, *map = job.map + kv_head * head_size * job.columns;
  for (int64_t token = 0; token < count; ++token)
    for (int64_t dim = 0; dim < head_size; ++dim) scratch.rows[token * width + dim] -= mean[dim];
  float* norms = job.norms + kv_head * job.max_tokens + tile * TILE_TOKENS;
  for (int64_t token = 0; token < count; token += ROWS) {
    Double<LANES> squares[ROWS] = {};
    for (int64_t j = 0; j < job.columns; j += 2 * LANES) {
      double mapped[ROWS * 2 * LANES] = {};
      multiply_add<LANES, ROWS>(scratch.rows + token * width, 1, width, map + j, job.columns, head_size, mapped,
                                2 * LANES);
      for (int row = 0; row < ROWS; ++row)
        for (int half = 0; half < 2; ++half) {
          const Double<LANES> value = load_doubles<LANES>(mapped + (2 * row + half) * LANES);
          squares[row] += value * value;
        }
    }
    for (int64_t row = 0; row < std::min<int64_t>(ROWS, count - token); ++row)
      norms[token + row] = static_cast<float>(sum_doubles<LANES>(squares[row]));
  }
}

struct RunItem {
  template <int LANES>
  KVEVICT_INLINE static void run(const Job& job, int64_t item, const Scratch& scratch) {
    constexpr int DOUBLES = LANES / 2;
    constexpr int ROWS = LANES == 16 ? 8 : 4;  // twice as many accumulators and 2 vectors must fit in the registers
    if (job.moments != nullptr) return add_moments<DOUBLES, ROWS>(job, item, scratch);
    square_rows<DOUBLES, ROWS>(job, item, scratch);
  }
};

// Whether there was memory for it.
bool run_items(const Job& job, int64_t num_items) {
  const auto run = function_for<RunItem>();
  const Buffer<float> buffer = allocate<float>(omp_get_max_threads() * Scratch::size(job));
  if (!buffer) return false;
#pragma omp parallel
  {
    const Scratch scratch(buffer.get() + omp_get_thread_num() * Scratch::size(job), job);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_items; ++item) run(job, item, scratch);
  }
  return true;
}

// total [num_kv_heads, head_size] and moment [num_kv_heads, head_size, head_size], contiguous.
void join_parts(const Job& job, double* total, double* moment) {
  const int64_t width = job.width(), head_size = job.keys.head_size, parts = job.parts_per_head();
  for (int64_t kv_head = 0; kv_head < job.num_kv_heads; ++kv_head) {
    const auto sum = [&](int64_t at) {
      double all = 0.0;
      for (int64_t part = 0; part < parts; ++part) all += job.moments[(kv_head * parts + part) * job.part_size() + at];
      return all;
    };
    for (int64_t i = 0; i < head_size; ++i) {
      total[kv_head * head_size + i] = sum(width * width + i);
      double* square = moment + kv_head * head_size * head_size;
      for (int64_t j = i; j < head_size; ++j)
        square[i * head_size + j] = square[j * head_size + i] = sum(i * width + j);
    }
  }
}

// Blocks of tokens of several requests.
struct Blocks {
  Job job;  // what they have in common
  int64_t page_table_stride_req;
  const int64_t* bounds;  // [.., 3], row of the page table, first token, one past the last

  Job of(int64_t index) const {
    const int64_t* block = bounds + 3 * index;
    Job own = job;
    own.keys.page_table += block[0] * page_table_stride_req;
    own.start = block[1];
    own.num_tokens = block[2] - block[1];
    return own;
  }
};

}  // namespace
}  // namespace kvevict

// Both functions return 0, or 1 when scratch memory could not be allocated. Strides count elements; the caller has
// checked shapes, strides, blocks and page ids. Everything but keys and page_table is contiguous.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_key_moments(
    const void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim,
    const int64_t* page_table, int64_t page_table_stride_req, int64_t page_table_stride_head, const int64_t* bounds,
    int32_t key_dtype, int64_t num_blocks, int64_t num_kv_heads, int64_t head_size, int64_t block_size, float key_scale,
    const void* cos_sin, int64_t cos_sin_stride, int32_t cos_sin_dtype, int64_t rotary_dim, int32_t is_neox_style,
    double* total, double* moment) {
  using namespace kvevict;
  const PagedKeys paged{{keys, key_stride_page, key_stride_token, key_stride_dim},
                        page_table, page_table_stride_head, key_dtype, block_size, head_size};
  const Blocks blocks{{paged, cos_sin, cos_sin_stride, cos_sin_dtype, rotary_dim, is_neox_style != 0,
                       num_kv_heads, 0, 0, key_scale},
                      page_table_stride_req, bounds};
  for (int64_t index = 0; index < num_blocks; ++index) {
    Job job = blocks.of(index);
    const int64_t num_parts = num_kv_heads * job.parts_per_head(), first = index * num_kv_heads * head_size;
    const Buffer<double> moments = allocate<double>(num_parts * job.part_size());
    if (!moments) return 1;
    job.moments = moments.get();
    if (!run_items(job, num_parts)) return 1;
    join_parts(job, total + first, moment + first * head_size);
  }
  return 0;
}

// `columns` is a multiple of 16.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_mapped_norms(
    const void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim,
    const int64_t* page_table, int64_t page_table_stride_req, int64_t page_table_stride_head, const int64_t* bounds,
    int32_t key_dtype, int64_t num_blocks, int64_t num_kv_heads, int64_t head_size, int64_t block_size, float key_scale,
    const void* cos_sin, int64_t cos_sin_stride, int32_t cos_sin_dtype, int64_t rotary_dim, int32_t is_neox_style,
    const double* mean, const double* map, int64_t columns, float* norms, int64_t max_tokens) {
  using namespace kvevict;
  const PagedKeys paged{{keys, key_stride_page, key_stride_token, key_stride_dim},
                        page_table, page_table_stride_head, key_dtype, block_size, head_size};
  const Blocks blocks{{paged, cos_sin, cos_sin_stride, cos_sin_dtype, rotary_dim, is_neox_style != 0,
                       num_kv_heads, 0, 0, key_scale},
                      page_table_stride_req, bounds};
  for (int64_t index = 0; index < num_blocks; ++index) {
    Job job = blocks.of(index);
    job.mean = mean + index * num_kv_heads * head_size;
    job.map = map + index * num_kv_heads * head_size * columns;
    job.columns = columns;
    job.norms = norms + index * num_kv_heads * max_tokens;
    job.max_tokens = max_tokens;
    if (!run_items(job, num_kv_heads * job.num_tiles())) return 1;
  }
  return 0;
}
