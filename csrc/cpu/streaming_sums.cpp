// The attention that consecutive queries of several requests pay to the keys they see, added up per KV head. Contract:
// kernels/streaming_sums.py.
//
// A row is one query of one head, the heads of a group side by side, so that 64 rows share keys and much of their past.

#include <omp.h>

#include "attention_block.hpp"
#include "buffer.hpp"
#include "isa.hpp"

namespace kvevict {
namespace {

// One request.
struct Job {
  const void* query;
  int64_t query_stride_token, query_stride_head;
  PagedKeys keys;
  int32_t query_dtype;
  int64_t first_query, num_queries, num_heads, num_kv_heads, kv_len;
  // The blocks of rows of a KV head are dealt to this many sums, which are added in a fixed order: results do not
  // depend on the number of threads.
  int64_t parts_per_head;
  float scale, softcap;
  const float* sinks;  // [num_heads] or null

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t num_rows() const { return num_queries * group(); }
  int64_t num_blocks() const { return (num_rows() + BLOCK_ROWS - 1) / BLOCK_ROWS; }
};

struct RunPart {
  template <int LANES>
  KVEVICT_INLINE static void run(const Job& job, int64_t part, const BlockScratch& scratch, float* columns) {
    const int64_t kv_head = part / job.parts_per_head;
    std::fill(columns, columns + job.kv_len, 0.0f);
    Rows rows;
    rows.softcap = job.softcap * LOG2_E;
    rows.sinks = job.sinks;
    for (int64_t block = part % job.parts_per_head; block < job.num_blocks(); block += job.parts_per_head) {
      rows.count = std::min(BLOCK_ROWS, job.num_rows() - block * BLOCK_ROWS);
      for (int64_t row = 0; row < rows.count; ++row) {
        const int64_t token = (block * BLOCK_ROWS + row) / job.group();
        const int64_t head = kv_head * job.group() + (block * BLOCK_ROWS + row) % job.group();
        rows.offset[row] = (job.first_query + token) * job.query_stride_token + head * job.query_stride_head;
        rows.last_seen[row] = static_cast<int32_t>(job.kv_len - job.num_queries + token);
        rows.head[row] = static_cast<int32_t>(head);
      }
      pack_rows(job.query, job.query_dtype, rows, job.keys.head_size, job.scale, scratch.query);
      attend<LANES>(job.keys, kv_head, 0, rows, 1.0f / static_cast<float>(job.group()), scratch, columns);
    }
  }
};

}  // namespace
}  // namespace kvevict

// Returns 0, or 1 when scratch memory could not be allocated. Strides count elements; the caller has checked shapes,
// strides, lengths and page ids. `columns` is scratch memory, [num_kv_heads, parts_per_head, max_kv_len], contiguous.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_streaming_sums(
    const void* query, int64_t query_stride_token, int64_t query_stride_head,
    const void* keys, int64_t key_stride_page, int64_t key_stride_token, int64_t key_stride_dim,
    const int64_t* page_table, int64_t page_table_stride_req, int64_t page_table_stride_head,
    const int64_t* query_start_loc, const int64_t* kv_start_loc,
    float* sums, int64_t sums_stride_head, float* columns, int64_t parts_per_head,
    int32_t query_dtype, int32_t key_dtype, int64_t num_reqs, int64_t num_heads, int64_t num_kv_heads,
    int64_t head_size, int64_t block_size, int64_t max_kv_len, float scale,
    float softcap, const float* sinks) {
  using namespace kvevict;
  const auto run = function_for<RunPart>();
  const int64_t thread_floats = BlockScratch::size(head_size, max_kv_len);
  const Buffer<float> scratch = allocate<float>(omp_get_max_threads() * thread_floats);
  if (!scratch) return 1;
#pragma omp parallel
  {
    const BlockScratch own(scratch.get() + omp_get_thread_num() * thread_floats, head_size, max_kv_len);
    for (int64_t req = 0; req < num_reqs; ++req) {
      const PagedKeys paged{{keys, key_stride_page, key_stride_token, key_stride_dim},
                            page_table + req * page_table_stride_req, page_table_stride_head,
                            key_dtype, block_size, head_size};
      const int64_t first_query = query_start_loc[req], num_queries = query_start_loc[req + 1] - first_query;
      const int64_t first_sum = kv_start_loc[req], kv_len = kv_start_loc[req + 1] - first_sum;
      const Job job{query, query_stride_token, query_stride_head, paged, query_dtype,
                    first_query, num_queries, num_heads, num_kv_heads, kv_len, parts_per_head, scale,
                    softcap, sinks};
      if (num_queries == 0) continue;
#pragma omp for schedule(dynamic)
      for (int64_t part = 0; part < num_kv_heads * parts_per_head; ++part) run(job, part, own, columns + part * kv_len);
#pragma omp for
      for (int64_t kv_head = 0; kv_head < num_kv_heads; ++kv_head)
        for (int64_t part = 0; part < parts_per_head; ++part) {
          const float* from = columns + (kv_head * parts_per_head + part) * kv_len;
          float* to = sums + kv_head * sums_stride_head + first_sum;
          for (int64_t token = 0; token < kv_len; ++token) to[token] += from[token];
        }
    }
  }
  return 0;
}
