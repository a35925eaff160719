"""Where the kept tokens of evicted requests are: page lists in an arena, read through the page table of a step."""

from __future__ import annotations

import numpy as np
import torch

from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.kernels.expand_page_table import NEVER, BatchRows, LayerPages, PageLists, expand_page_table

_WIDTH_INCREMENT = 16  # columns of a page table: Triton then compiles attention for one kind of stride
# a kernel's tile of tokens may end some pages behind the last one
_EXTRA_COLUMNS = 1
# entries of page tables that there is room for in any case: those of all layers of a small batch
_MIN_ENTRIES = 2**20


class PageTable:
    """The page lists of all evicted requests, and the page table that attention over some of them reads.

    An eviction fills pages and leaves a list of them for every layer and KV head. The lists stand in an *arena* with
    one entry for each page of the pool; a request uses the entries of the blocks that it keeps, so that lists need no
    allocator, never grow, and cannot meet those of another request. What a request computes after its eviction lies
    where vLLM's block table says, and is in no list.

    A request takes a slot at its eviction and gives it back when it ends. All memory is taken here: 4 bytes for each
    page of the pool, and ``num_bytes`` in all.

    generation: changes whenever a row comes, goes, or is evicted
    """

    def __init__(self, pool: PagePool, max_num_reqs: int, max_tokens: int) -> None:
        """max_num_reqs, max_tokens: the most requests at once, and the longest of them."""
        layers, heads = pool.num_layers, pool.num_kv_heads
        device = pool.layer_offset.device
        max_blocks = cdiv(max_tokens, pool.block_size)
        self._pool = pool
        self._lists = PageLists(
            arena=torch.zeros(len(pool.pages) // (layers * heads) * layers * heads, dtype=torch.int32, device=device),
            block_ids=torch.zeros(max_num_reqs, max_blocks, dtype=torch.int32, device=device),
            starts=torch.zeros(max_num_reqs, layers, heads, dtype=torch.int32, device=device),
            counts=torch.zeros(max_num_reqs, layers, heads, dtype=torch.int32, device=device),
            own_from=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        )
        self._max_width = _width(max_blocks)
        num_entries = max(max_num_reqs * heads * self._max_width, _MIN_ENTRIES)
        self._pages = torch.zeros(num_entries, dtype=torch.int32, device=device)
        self._kv_lens = torch.ones(layers * max_num_reqs * heads, dtype=torch.int32, device=device)
        # known to the host, per slot: pages of the longest list, and from which token on its own blocks hold them
        self._most_pages = np.zeros(max_num_reqs, dtype=np.int64)
        self._own_from = np.zeros(max_num_reqs, dtype=np.int64)
        self.slots = RequestSlots(max_num_reqs)
        self.generation = 0

    def __contains__(self, req_id: object) -> bool:
        return req_id in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arena, the lists and the page table of a step."""
        return sum(tensor.nbytes for tensor in (*self._lists, self._pages, self._kv_lens))

    def add(self, req_id: str, compaction: Compaction, plan: EvictionPlan, block_ids: torch.Tensor) -> None:
        """Give ``req_id`` a slot that holds its compacted cache.

        block_ids: [plan.num_full_blocks] int64, the blocks of which the pages are

        Raises ValueError if it has one, or none is left.
        """
        slot = self.slots.take(req_id)
        counts = compaction.num_pages - int(plan.num_tail_tokens > 0)
        lists, num_lists = compaction.page_table.flatten(0, 1), counts.numel()
        starts = counts.flatten().cumsum(0) - counts.flatten()
        column = torch.arange(lists.shape[1], device=lists.device)
        num_entries = plan.num_full_blocks * num_lists
        # pages of the tail, and zeros behind a list, go to an entry that is not used
        place = torch.where(column < counts.flatten()[:, None], starts[:, None] + column, num_entries)
        entries = lists.new_zeros(num_entries + 1, dtype=torch.int32)
        entries.scatter_(0, place.flatten(), lists.flatten().to(torch.int32))
        self._lists.arena.view(-1, num_lists)[block_ids] = entries[:-1].view(-1, num_lists)
        self._lists.block_ids[slot, : len(block_ids)] = block_ids.to(torch.int32)
        self._lists.starts[slot] = starts.view(counts.shape).to(torch.int32)
        self._lists.counts[slot] = counts.to(torch.int32)
        self._most_pages[slot] = lists.shape[1] - int(plan.num_tail_tokens > 0)
        self._set_own_from(slot, plan.num_tokens, plan.per_token)

    def _set_own_from(self, slot: int, num_tokens: int, per_token: bool) -> None:
        """Say which tokens of a slot its own blocks hold: those of the last full block on, or none."""
        own_from = NEVER if per_token else num_tokens // self._pool.block_size * self._pool.block_size
        self._own_from[slot] = own_from
        self._lists.own_from[slot].fill_(own_from)
        self.generation += 1

    def remove(self, req_id: str) -> None:
        """Drop the row of a request that ended or was preempted; nothing happens if it has none."""
        self.generation += self.slots.give_back(req_id)

    def shrink(self, req_id: str, num_tokens: int, per_token: bool = False) -> None:
        """Drop the pages of every row but those in its list, and the last one if it is not full.

        Those in between have been filled since then, and were emptied after ``num_tokens`` tokens.

        per_token: as in ``EvictionPlan``
        """
        self._set_own_from(self.slots[req_id], num_tokens, per_token)

    def num_full_pages(self, req_id: str) -> torch.Tensor:
        """Return [num_layers, num_kv_heads] int64, the pages of a request that its evictions have filled."""
        return self._lists.counts[self.slots[req_id]].to(torch.int64)

    def replaces(self, req_id: str) -> bool:
        """Whether each new token of a request takes the slot of another one, so that its rows never grow."""
        return bool(self._own_from[self.slots[req_id]] == NEVER)

    def rows(self, req_id: str, num_tokens: int, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the page ids [num_layers, num_kv_heads, max_pages] int64 of a request of this many tokens, 0 behind
        the last one, and how many of them are in use [num_layers, num_kv_heads] int64.

        block_ids: [num_blocks] int64, its block table
        """
        slot = self.slots[req_id]
        first = int(self._own_from[slot]) // self._pool.block_size
        own_ids = block_ids[first : cdiv(num_tokens, self._pool.block_size)]
        kept = self._kept(slot, self._lists.starts[slot], int(self._most_pages[slot]))
        counts = self._lists.counts[slot].to(torch.int64)
        pages = torch.nn.functional.pad(kept, (0, len(own_ids)))
        column = torch.arange(pages.shape[2], device=pages.device)
        pages *= column < counts[..., None]
        if len(own_ids):
            place = counts[..., None] + torch.arange(len(own_ids), device=pages.device)
            pages.scatter_(2, place, self._pool.page_ids(own_ids))
        return pages, counts + len(own_ids)

    def layer_rows(self, layers: range, slots: torch.Tensor, max_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the page lists [num_reqs, num_layers, num_kv_heads, max_pages] int64 of some layers, 0 behind the last
        page, and how long each is [num_reqs, num_layers, num_kv_heads] int64.

        slots: [num_reqs] int64
        """
        some = slice(layers.start, layers.stop)
        counts = self._lists.counts[slots, some].to(torch.int64)
        pages = self._kept(slots[:, None, None, None], self._lists.starts[slots, some], max_pages)
        return pages * (torch.arange(max_pages, device=pages.device) < counts[..., None]), counts

    def _kept(self, slots: torch.Tensor | int, starts: torch.Tensor, num_pages: int) -> torch.Tensor:
        """Return [*starts.shape, num_pages] int64, the first pages of lists, and whatever stands behind short ones.

        slots: whose they are
        """
        num_lists = self._pool.num_layers * self._pool.num_kv_heads
        place = starts[..., None].to(torch.int64) + torch.arange(num_pages, device=starts.device)
        place = place.clamp(max=self._lists.block_ids.shape[1] * num_lists - 1)
        kept_block = self._lists.block_ids[slots, place // num_lists].to(torch.int64)
        return self._lists.arena[kept_block * num_lists + place % num_lists].to(torch.int64)

    def most_pages(self, req_ids: list[str]) -> int:
        """Return the pages of the longest list of these requests, in any layer and head."""
        return int(self._most_pages[[self.slots[req_id] for req_id in req_ids]].max())

    def most_tokens(self, slots: np.ndarray, num_tokens: np.ndarray) -> int:
        """Return how many tokens the longest sequence of some requests has, in any layer and head, or more.

        slots:      [num_reqs]
        num_tokens: [num_reqs], true lengths, or more
        """
        own = np.maximum(num_tokens - self._own_from[slots], 0)
        return int((self._most_pages[slots] * self._pool.block_size + own).max())

    def are_alike(self, slots: np.ndarray) -> bool:
        """Whether all layers of each of these requests hold equally many tokens, head by head.

        It waits for the device.
        """
        counts = self._lists.counts[torch.from_numpy(slots).to(self._lists.counts.device).to(torch.int64)]
        return torch.equal(counts, counts[:, :1].expand_as(counts))

    def expand(self, launches: list[tuple[BatchRows, int]]) -> list[ExpandedPages]:
        """Return the page tables of a step in which attention over evicted rows is launched several times per layer.

        launches: some rows of the batch, and the tokens of their longest sequence in any layer, or more

        They share memory of this object, which the next step overwrites: all layers at once where it is enough for all,
        else each layer's when it is asked for.
        """
        layers, heads = self._pool.num_layers, self._pool.num_kv_heads
        block_size = self._pool.block_size
        widths = [min(_width(cdiv(max_kv_len, block_size)), self._max_width) for _, max_kv_len in launches]
        sizes = [len(rows.rows) * heads * width for (rows, _), width in zip(launches, widths, strict=True)]
        at_once = layers if layers * sum(sizes) <= len(self._pages) else 1
        expanded, first, first_len = [], 0, 0
        for (rows, _), width, size in zip(launches, widths, sizes, strict=True):
            shape = at_once, len(rows.rows) * heads, width
            num_entries, num_lens = at_once * size, at_once * shape[1]
            pages = self._pages[first : first + num_entries].view(shape)
            kv_lens = self._kv_lens[first_len : first_len + num_lens].view(shape[:2])
            expanded.append(ExpandedPages(self._lists, self._pool, rows, pages, kv_lens))
            if at_once == layers:
                expanded[-1].expand_all()
            first, first_len = first + num_entries, first_len + num_lens
        return expanded

    def expand_layer_by_layer(self, rows: BatchRows) -> ExpandedPages:
        """Return the page tables of some rows of a batch, each layer's when it is asked for, in memory that is the same
        in every step and enough for sequences of any length: for a graph, which asks again whenever it is replayed.
        """
        num_sequences = len(rows.rows) * self._pool.num_kv_heads
        shape = 1, num_sequences, self._max_width
        pages = self._pages[: num_sequences * self._max_width].view(shape)
        return ExpandedPages(self._lists, self._pool, rows, pages, self._kv_lens[:num_sequences].view(shape[:2]))


def _width(num_pages: int) -> int:
    return cdiv(num_pages + _EXTRA_COLUMNS, _WIDTH_INCREMENT) * _WIDTH_INCREMENT


class ExpandedPages:
    """What attention over some rows of a batch reads, layer by layer; each KV head of a row is a sequence."""

    def __init__(
        self, lists: PageLists, pool: PagePool, rows: BatchRows, pages: torch.Tensor, kv_lens: torch.Tensor
    ) -> None:
        """pages, kv_lens: memory for all layers, [num_layers, num_sequences, width] and [num_layers, num_sequences]
        int32, or for one layer at a time.
        """
        self._lists, self._pool, self._rows = lists, pool, rows
        self._pages, self._kv_lens = pages, kv_lens
        self._has_all = False

    def expand_all(self) -> None:
        """Expand all layers, for which there is memory."""
        self._expand(0, self._pool.layer_offset)
        self._has_all = True

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the page table [num_sequences, width] int32 of a layer, and how many tokens each sequence has
        [num_sequences] int32.

        Behind the last page of a sequence stand pages of others.
        """
        if self._has_all:
            return self._pages[layer], self._kv_lens[layer]
        self._expand(layer, self._pool.layer_offset[layer : layer + 1])
        return self._pages[0], self._kv_lens[0]

    def _expand(self, first_layer: int, first_pages: torch.Tensor) -> None:
        at = LayerPages(first_layer, first_pages, self._pool.block_stride, self._pool.block_size)
        expand_page_table(self._lists, self._rows, at, self._pages, self._kv_lens)
