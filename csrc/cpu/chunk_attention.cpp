// The attention that the tokens of chunks receive from each other, uncausal. Contract: kernels/chunk_attention.py.

#include <omp.h>

#include "attention_block.hpp"
#include "buffer.hpp"
#include "isa.hpp"

namespace kvevict {
namespace {

// The blocks of rows of a head are dealt to this many sums, at most, which are added in a fixed order: results do not
// depend on the number of threads.
constexpr int64_t MOST_PARTS = 4;

int64_t num_blocks(int64_t chunk) { return (chunk + BLOCK_ROWS - 1) / BLOCK_ROWS; }
int64_t parts_per_head(int64_t chunk) { return std::min(MOST_PARTS, num_blocks(chunk)); }

// One chunk.
struct Job {
  const void* query;
  int64_t query_stride_token, query_stride_head;
  PagedKeys keys;
  int32_t query_dtype;
  int64_t start, first_query, chunk, num_heads, num_kv_heads;
  float scale;

  int64_t group() const { return num_heads / num_kv_heads; }
};

struct RunPart {
  template <int LANES>
  KVEVICT_INLINE static void run(const Job& job, int64_t part, const BlockScratch& scratch, float* columns) {
    const int64_t parts = parts_per_head(job.chunk), head = part / parts;
    std::fill(columns, columns + job.chunk, 0.0f);
    Rows rows;
    for (int64_t block = part % parts; block < num_blocks(job.chunk); block += parts) {
      rows.count = std::min(BLOCK_ROWS, job.chunk - block * BLOCK_ROWS);
      for (int64_t row = 0; row < rows.count; ++row) {
        const int64_t token = job.first_query + block * BLOCK_ROWS + row;
        rows.offset[row] = token * job.query_stride_token + head * job.query_stride_head;
        rows.last_seen[row] = static_cast<int32_t>(job.start + job.chunk - 1);
      }
      pack_rows(job.query, job.query_dtype, rows, job.keys.head_size, job.scale, scratch.query);
      attend<LANES>(job.keys, head / job.group(), job.start, rows, 1.0f, scratch, columns);
    }
  }
};

void reduce_group(const Job& job, const float* columns, int64_t kv_head, bool take_max, float* received) {
  const int64_t parts = parts_per_head(job.chunk);
  for (int64_t token = 0; token < job.chunk; ++token) {
    float reduced = 0.0f;
    for (int64_t head = kv_head * job.group(); head < (kv_head + 1) * job.group(); ++head) {
      float sum = 0.0f;
      for (int64_t part = 0; part < parts; ++part) sum += columns[(head * parts + part) * job.chunk + token];
      reduced = take_max ? larger_or_nan(reduced, sum) : reduced + sum;
    }
    received[token] = take_max ? reduced : reduced / static_cast<float>(job.group());
  }
}

}  // namespace
}  // namespace kvevict

// Returns 0, or 1 when scratch memory could not be allocated. Strides count elements; the caller has checked shapes,
// strides, chunks and page ids. `chunks` is [num_chunks, 4], `received` [num_kv_heads, num_tokens], both contiguous.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_chunk_attention(
    const void* query, int64_t query_stride_token, int64_t query_stride_head,
    const void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim,
    const int64_t* page_table, int64_t page_table_stride_req, int64_t page_table_stride_head,
    const int64_t* chunks, float* received,
    int32_t query_dtype, int32_t key_dtype, int64_t num_chunks, int64_t max_chunk, int64_t num_tokens,
    int64_t num_heads, int64_t num_kv_heads, int64_t head_size, int64_t block_size, float scale, int32_t take_max) {
  using namespace kvevict;
  const auto job_of = [&](const int64_t* chunk) {  // row of the page table, first token, first query, length
    const PagedKeys paged{{keys, key_stride_page, key_stride_token, key_stride_dim},
                          page_table + chunk[0] * page_table_stride_req, page_table_stride_head,
                          key_dtype, block_size, head_size};
    return Job{query, query_stride_token, query_stride_head, paged, query_dtype,
               chunk[1], chunk[2], chunk[3], num_heads, num_kv_heads, scale};
  };
  const auto run = function_for<RunPart>();
  const int64_t thread_floats = BlockScratch::size(head_size, max_chunk);
  const Buffer<float> columns = allocate<float>(num_heads * parts_per_head(max_chunk) * max_chunk);
  const Buffer<float> scratch = allocate<float>(omp_get_max_threads() * thread_floats);
  if (!columns || !scratch) return 1;
#pragma omp parallel
  {
    const BlockScratch own(scratch.get() + omp_get_thread_num() * thread_floats, head_size, max_chunk);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const Job job = job_of(chunks + 4 * chunk);
#pragma omp for schedule(dynamic)
      for (int64_t part = 0; part < num_heads * parts_per_head(job.chunk); ++part)
        run(job, part, own, columns.get() + part * job.chunk);
#pragma omp for
      for (int64_t kv_head = 0; kv_head < num_kv_heads; ++kv_head)
        reduce_group(job, columns.get(), kv_head, take_max != 0, received + kv_head * num_tokens + job.first_query);
    }
  }
  return 0;
}
