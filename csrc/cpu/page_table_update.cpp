// A decode step of the page table. Contract: kernels/page_table_update.py.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Below this many page ids the copies cost less than waking the threads.
constexpr int64_t MIN_PARALLEL_PAGES = 1 << 20;

// The tables, as kvevict_page_table_update gets them.
struct Table {
  int32_t* pages;
  const int64_t* num_pages;
  const int32_t* kv_lens;
  const int64_t* layer_offset;
  int64_t num_layers, max_num_reqs, num_kv_heads, max_pages, block_stride, num_columns;
};

struct Batch {
  const int64_t *slots, *num_blocks, *first_block, *end_block, *new_tokens, *block_table;
  int64_t block_table_stride, max_blocks, num_reqs;
};

bool fits(const Table& table, const Batch& batch, int64_t req) {
  const int64_t slot = batch.slots[req], first = batch.first_block[req], end = batch.end_block[req];
  if (slot < 0 || slot >= table.max_num_reqs) return false;
  if (first >= end) return true;
  if (first < 0 || end > batch.max_blocks) return false;
  for (int64_t layer = 0; layer < table.num_layers; ++layer) {
    const int64_t* num_pages = table.num_pages + (layer * table.max_num_reqs + slot) * table.num_kv_heads;
    const auto [fewest, most] = std::minmax_element(num_pages, num_pages + table.num_kv_heads);
    if (*fewest - batch.num_blocks[req] + first < 0) return false;
    if (*most - batch.num_blocks[req] + end > table.max_pages) return false;
  }
  return true;
}

// The rows of one request in one layer: neighbours in both tables, one for each KV head.
void update_rows(const Table& table, const Batch& batch, int64_t layer, int64_t req, int32_t* out_pages,
                 int32_t* out_lens) {
  const int64_t first_row = (layer * table.max_num_reqs + batch.slots[req]) * table.num_kv_heads;
  int32_t* pages = table.pages + first_row * table.max_pages;
  const int64_t* block_ids = batch.block_table + req * batch.block_table_stride;
  for (int64_t head = 0; head < table.num_kv_heads; ++head) {
    const int64_t first_column = table.num_pages[first_row + head] - batch.num_blocks[req];
    const int64_t first_page = table.layer_offset[layer] + head;
    for (int64_t block = batch.first_block[req]; block < batch.end_block[req]; ++block)
      pages[head * table.max_pages + first_column + block] =
          static_cast<int32_t>(first_page + block_ids[block] * table.block_stride);
    std::memcpy(out_pages + head * table.num_columns, pages + head * table.max_pages,
                static_cast<size_t>(table.num_columns) * sizeof(int32_t));
    out_lens[head] = table.kv_lens[first_row + head] + static_cast<int32_t>(batch.new_tokens[req]);
  }
}

}  // namespace

// Returns 0, or 1 before anything is changed if a slot, block or column is outside. The caller has checked the rest.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_page_table_update(
    int32_t* pages, const int64_t* num_pages, const int32_t* kv_lens, const int64_t* layer_offset,
    const int64_t* slots, const int64_t* num_blocks, const int64_t* first_block, const int64_t* end_block,
    const int64_t* new_tokens, const int64_t* block_table, int64_t block_table_stride, int64_t max_blocks,
    int32_t* out_pages, int32_t* out_lens,
    int64_t num_layers, int64_t max_num_reqs, int64_t num_kv_heads, int64_t max_pages,
    int64_t num_reqs, int64_t block_stride, int64_t num_columns) {
  const Table table{pages, num_pages, kv_lens, layer_offset, num_layers, max_num_reqs, num_kv_heads, max_pages,
                    block_stride, num_columns};
  const Batch batch{slots, num_blocks, first_block, end_block, new_tokens, block_table, block_table_stride, max_blocks,
                    num_reqs};
  for (int64_t req = 0; req < num_reqs; ++req)
    if (!fits(table, batch, req)) return 1;
  const int64_t num_tasks = num_layers * num_reqs;
#pragma omp parallel for schedule(static) if (num_tasks * num_kv_heads * num_columns >= MIN_PARALLEL_PAGES)
  for (int64_t task = 0; task < num_tasks; ++task)
    update_rows(table, batch, task / num_reqs, task % num_reqs, out_pages + task * num_kv_heads * num_columns,
                out_lens + task * num_kv_heads);
  return 0;
}
