// The page tables of some layers for one step. Contract: kernels/expand_page_table.py.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Below this many page ids the copies cost less than waking the threads.
constexpr int64_t MIN_PARALLEL_PAGES = 1 << 20;

// The lists and the batch, as kvevict_expand_page_table gets them.
struct Lists {
  const int32_t *arena, *block_ids, *starts, *counts, *own_from;
  int64_t num_entries, max_num_reqs, max_blocks, num_layers, num_kv_heads;
};

struct Batch {
  const int32_t *rows, *slots, *seq_lens, *block_table;
  int64_t num_rows, num_reqs, block_table_stride, max_blocks;
};

struct Layers {
  const int64_t* first_pages;
  int64_t first_layer, count, block_stride, block_size, width;
};

// One KV head of one request: its list, and what its own blocks hold behind it.
struct Sequence {
  int64_t start, count, kv_len, first_block, num_columns;
};

Sequence sequence_of(const Lists& lists, const Layers& at, int64_t layer, int64_t slot, int64_t head, int64_t seq_len) {
  Sequence found{0, 0, seq_len, 0, 0};
  if (slot >= 0) {
    const int64_t list = (slot * lists.num_layers + at.first_layer + layer) * lists.num_kv_heads + head;
    found.start = lists.starts[list];
    found.count = lists.counts[list];
    found.kv_len = found.count * at.block_size + std::max<int64_t>(seq_len - lists.own_from[slot], 0);
    found.first_block = lists.own_from[slot] / at.block_size;
  }
  found.num_columns = (found.kv_len + at.block_size - 1) / at.block_size;
  return found;
}

bool fits(const Lists& lists, const Batch& batch, const Layers& at, int64_t index) {
  const int64_t slot = batch.slots[index], row = batch.rows[index];
  if (slot >= lists.max_num_reqs || row < 0 || row >= batch.num_reqs) return false;
  const int64_t num_lists = lists.num_layers * lists.num_kv_heads;
  int64_t num_entries = 0;
  for (int64_t layer = 0; layer < at.count; ++layer)
    for (int64_t head = 0; head < lists.num_kv_heads; ++head) {
      const Sequence one = sequence_of(lists, at, layer, slot, head, batch.seq_lens[row]);
      const int64_t num_own = one.num_columns - one.count;
      if (one.start < 0 || one.count < 0 || one.num_columns > at.width) return false;
      if (num_own > 0 && one.first_block + num_own > batch.max_blocks) return false;
      if (one.count > 0) num_entries = std::max(num_entries, one.start + one.count);
    }
  if (num_entries > lists.max_blocks * num_lists) return false;
  for (int64_t block = 0; block * num_lists < num_entries; ++block) {
    const int64_t id = lists.block_ids[slot * lists.max_blocks + block];
    if (id < 0 || (id + 1) * num_lists > lists.num_entries) return false;
  }
  return true;
}

void expand(const Lists& lists, const Batch& batch, const Layers& at, int64_t layer, int64_t index, int64_t head,
            int32_t* pages, int32_t* kv_len) {
  const int64_t slot = batch.slots[index], row = batch.rows[index], num_lists = lists.num_layers * lists.num_kv_heads;
  const Sequence one = sequence_of(lists, at, layer, slot, head, batch.seq_lens[row]);
  *kv_len = static_cast<int32_t>(std::max<int64_t>(one.kv_len, 1));
  if (one.kv_len == 0) pages[0] = 0;
  // entries of one block lie together
  for (int64_t column = 0; column < one.count;) {
    const int64_t place = one.start + column, inside = place % num_lists;
    const int64_t length = std::min(num_lists - inside, one.count - column);
    const int64_t id = lists.block_ids[slot * lists.max_blocks + place / num_lists];
    std::memcpy(pages + column, lists.arena + id * num_lists + inside, static_cast<size_t>(length) * sizeof(int32_t));
    column += length;
  }
  const int32_t* block_ids = batch.block_table + row * batch.block_table_stride + one.first_block;
  for (int64_t column = one.count; column < one.num_columns; ++column)
    pages[column] =
        static_cast<int32_t>(at.first_pages[layer] + head + block_ids[column - one.count] * at.block_stride);
}

}  // namespace

// Returns 0, or 1 before anything is changed if a slot, row, block or column is outside. The caller has checked the
// rest.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_expand_page_table(
    const int32_t* arena, const int32_t* block_ids, const int32_t* starts, const int32_t* counts,
    const int32_t* own_from, int64_t num_entries, int64_t max_num_reqs, int64_t list_blocks, int64_t num_layers,
    int64_t num_kv_heads,
    const int32_t* rows, const int32_t* slots, const int32_t* seq_lens, const int32_t* block_table, int64_t num_rows,
    int64_t num_reqs, int64_t block_table_stride, int64_t max_blocks,
    int64_t first_layer, const int64_t* first_pages, int64_t count, int64_t block_stride, int64_t block_size,
    int32_t* out_pages, int32_t* out_lens, int64_t width) {
  const Lists lists{arena, block_ids, starts, counts, own_from, num_entries, max_num_reqs, list_blocks, num_layers,
                    num_kv_heads};
  const Batch batch{rows, slots, seq_lens, block_table, num_rows, num_reqs, block_table_stride, max_blocks};
  const Layers at{first_pages, first_layer, count, block_stride, block_size, width};
  for (int64_t index = 0; index < num_rows; ++index)
    if (!fits(lists, batch, at, index)) return 1;
  const int64_t num_sequences = count * num_rows * num_kv_heads;
#pragma omp parallel for schedule(static) if (num_sequences * width >= MIN_PARALLEL_PAGES)
  for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
    const int64_t of_layer = sequence % (num_rows * num_kv_heads);
    expand(lists, batch, at, sequence / (num_rows * num_kv_heads), of_layer / num_kv_heads, of_layer % num_kv_heads,
           out_pages + sequence * width, out_lens + sequence);
  }
  return 0;
}
