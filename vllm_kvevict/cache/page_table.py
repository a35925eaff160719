"""Page tables and lengths of all evicted requests, one row per (layer, request, KV head)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.kernels.page_table_update import BatchBlocks, page_table_update

_PAGE_INCREMENT = 64  # of the table's rows
_WIDTH_INCREMENT = 16  # of a batch's: Triton then compiles attention for one kind of stride


@dataclass
class FoldedBatch:
    """What attention over evicted rows needs: every KV head of every request is a sequence of its own.

    page_table: [num_layers, num_reqs * num_kv_heads, max_pages] int32; unused entries are page 0 (null block)
    kv_lens:    [num_layers, num_reqs * num_kv_heads] int32, the new tokens included
    """

    page_table: torch.Tensor
    kv_lens: torch.Tensor


class PageTable:
    """Where the kept tokens of evicted requests are, and how many there are.

    The table grows with the longest row; a request takes a slot at eviction and gives it back when it ends.
    ``fold`` is the per-step path: it only adds to lengths unless a request enters a new block or the batch changed.

    generation: changes whenever a row comes, goes, or is evicted
    """

    def __init__(self, pool: PagePool, max_num_reqs: int) -> None:
        layers, heads = pool.num_layers, pool.num_kv_heads
        device = pool.layer_offset.device
        self._pool = pool
        self._pages = torch.zeros(layers, max_num_reqs, heads, _PAGE_INCREMENT, dtype=torch.int32, device=device)
        self._kv_lens = torch.zeros(layers, max_num_reqs, heads, dtype=torch.int32, device=device)
        self._num_pages = torch.zeros(layers, max_num_reqs, heads, dtype=torch.int64, device=device)
        # per slot: tokens, blocks and pages of the longest row at the last eviction, for what comes after them
        self._num_tokens = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self._num_blocks = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        # whether new tokens are added behind the others; if not, each takes the slot of one that is evicted
        self._grows = torch.ones(max_num_reqs, dtype=torch.bool, device=device)
        self._most_pages = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self.slots = RequestSlots(max_num_reqs, device)
        self.generation = 0
        empty = torch.empty(0, dtype=torch.int64, device=device)
        self._folded = _Folded(-1, empty, empty, empty, empty, empty, empty)

    def __contains__(self, req_id: object) -> bool:
        return req_id in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    def add(self, req_id: str, compaction: Compaction, plan: EvictionPlan) -> None:
        """Give ``req_id`` a slot that holds its compacted cache.

        Raises ValueError if it has one, or none is left.
        """
        slot = self.slots.take(req_id)
        self._grow(compaction.page_table.shape[2])
        self._pages[:, slot] = 0
        self._pages[:, slot, :, : compaction.page_table.shape[2]] = compaction.page_table.to(torch.int32)
        self._kv_lens[:, slot] = compaction.kv_lens.to(torch.int32)
        self._num_pages[:, slot] = compaction.num_pages
        self._most_pages[slot] = compaction.num_pages.max()
        self._num_tokens[slot] = plan.num_tokens
        self._num_blocks[slot] = plan.num_blocks
        self._grows[slot] = not plan.per_token
        self.generation += 1

    def remove(self, req_id: str) -> None:
        """Drop the row of a request that ended or was preempted; nothing happens if it has none."""
        self.generation += self.slots.give_back(req_id)

    def shrink(self, req_id: str, num_tokens: int, per_token: bool = False) -> None:
        """Drop the pages of every row but the full ones of its first eviction, and the last one if it is not full.

        Those in between have been filled since then, and were emptied after ``num_tokens`` tokens.

        per_token: as in ``EvictionPlan``
        """
        slot = self.slots[req_id]
        num_blocks = cdiv(num_tokens, self._pool.block_size)
        num_full, tail = self.num_full_pages(req_id), 0 if per_token else num_tokens % self._pool.block_size
        pages = self._pages[:, slot]
        last = pages.gather(2, self._pages_in_use(slot, num_blocks)[..., None] - 1)
        is_full = torch.arange(pages.shape[2], device=pages.device) < num_full[..., None]
        pages = pages * is_full  # 0 behind them, the null block's page
        self._pages[:, slot] = pages.scatter(2, num_full[..., None], last) if tail else pages
        self._num_pages[:, slot] = num_full + int(tail > 0)
        self._most_pages[slot] = num_full.max() + int(tail > 0)
        self._kv_lens[:, slot] = (num_full * self._pool.block_size + tail).to(torch.int32)
        self._num_tokens[slot] = num_tokens
        self._num_blocks[slot] = num_blocks
        self._grows[slot] = not per_token
        self.generation += 1

    def num_full_pages(self, req_id: str) -> torch.Tensor:
        """Return [num_layers, num_kv_heads] int64, the pages of a request that its evictions have filled."""
        slot = self.slots[req_id]
        has_tail = int(self._num_tokens[slot]) % self._pool.block_size > 0 and bool(self._grows[slot])
        return self._num_pages[:, slot] - int(has_tail)

    def rows(self, req_id: str, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the page ids [num_layers, num_kv_heads, max_pages] int64 of a request of this many tokens, and how
        many of them are in use [num_layers, num_kv_heads] int64.
        """
        slot = self.slots[req_id]
        num_pages = self._pages_in_use(slot, cdiv(num_tokens, self._pool.block_size))
        return self._pages[:, slot, :, : int(num_pages.max())].to(torch.int64), num_pages

    def _pages_in_use(self, slot: int, num_blocks: int) -> torch.Tensor:
        return self._num_pages[:, slot] + (num_blocks - self._num_blocks[slot]) * self._grows[slot]

    def constant_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Return [num_reqs] bool, which of ``slots`` [num_reqs] int64 have rows that never grow."""
        return ~self._grows[slots]

    def most_pages(self, slots: torch.Tensor) -> int:
        """Return the pages of the longest constant row of ``slots``, in any layer and head."""
        return int(self._most_pages[slots].max())

    def layer_rows(self, layer: int, slots: torch.Tensor, max_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the page ids [num_reqs, num_kv_heads, max_pages] int64 of constant rows in one layer, 0 behind the
        last one, and how many there are [num_reqs, num_kv_heads] int64.
        """
        return self._pages[layer, slots, :, :max_pages].to(torch.int64), self._num_pages[layer, slots]

    def pages_of(self, req_id: str, num_tokens: int) -> list[list[list[int]]]:
        """Return page ids [num_layers][num_kv_heads][pages in use] of a request of this many tokens, for checks."""
        pages, num_pages = self.rows(req_id, num_tokens)
        counts, rows = num_pages.tolist(), pages.tolist()
        return [[row[:count] for row, count in zip(*layer, strict=True)] for layer in zip(rows, counts, strict=True)]

    def fold(
        self, slots: torch.Tensor, seq_lens: torch.Tensor, query_lens: torch.Tensor, block_table: torch.Tensor
    ) -> FoldedBatch:
        """Return page tables and lengths for one decode step of the requests in ``slots``.

        slots:       [num_reqs] int64
        seq_lens:    [num_reqs] true lengths, the new tokens included
        query_lens:  [num_reqs] new tokens: one, or more if drafts are to be verified
        block_table: [num_reqs, max_blocks] vLLM's block table of these requests
        """
        seq_lens = seq_lens.to(torch.int64)
        blocks = (seq_lens - 1) // self._pool.block_size
        if not self._still_folded(slots, blocks):
            rows = self._enter_blocks(slots, seq_lens, (seq_lens - query_lens) // self._pool.block_size, block_table)
            self._folded = _Folded(self.generation, slots, blocks, *rows, seq_lens, self._grows[slots])
        folded = self._folded
        new_tokens = ((seq_lens - folded.num_tokens) * folded.grows).to(torch.int32)
        return FoldedBatch(folded.page_table, (folded.kv_lens + new_tokens[:, None]).flatten(1, 2))

    def _still_folded(self, slots: torch.Tensor, blocks: torch.Tensor) -> bool:
        folded = self._folded
        return (
            folded.generation == self.generation
            and torch.equal(folded.slots, slots)
            and torch.equal(folded.blocks, blocks)
        )

    def _enter_blocks(
        self, slots: torch.Tensor, seq_lens: torch.Tensor, first: torch.Tensor, block_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the pages of the blocks that each request writes now; those it has entered before are rewritten.

        Returns the rows of these requests, [num_layers, num_reqs * num_kv_heads, max_pages], and their lengths.
        """
        num_blocks, grows = self._num_blocks[slots], self._grows[slots]
        end = torch.where(grows, (seq_lens - 1) // self._pool.block_size + 1, first)
        most_pages = int((self._most_pages[slots] + (end - num_blocks) * grows).max())
        self._grow(most_pages)
        batch = BatchBlocks(slots, num_blocks, first, end, (seq_lens - self._num_tokens[slots]) * grows, block_table)
        width = min(cdiv(most_pages, _WIDTH_INCREMENT) * _WIDTH_INCREMENT, self._pages.shape[3])
        offset, stride = self._pool.layer_offset, self._pool.block_stride
        pages, kv_lens = page_table_update(self._pages, self._num_pages, self._kv_lens, offset, stride, batch, width)
        return pages.flatten(1, 2), kv_lens

    def _grow(self, num_pages: int) -> None:
        missing = num_pages - self._pages.shape[3]
        if missing > 0:
            self._pages = torch.nn.functional.pad(self._pages, (0, cdiv(missing, _PAGE_INCREMENT) * _PAGE_INCREMENT))


@dataclass(frozen=True)
class _Folded:
    """The last folded batch, good until a request enters a new block or the batch changes.

    kv_lens: of its rows when its requests had ``num_tokens`` tokens
    """

    generation: int
    slots: torch.Tensor
    blocks: torch.Tensor
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    num_tokens: torch.Tensor
    grows: torch.Tensor
