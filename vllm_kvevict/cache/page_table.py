"""Where the kept tokens of evicted requests are: page lists in an arena, read through the page table of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from vllm_kvevict.cache.compaction import KeptPages
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.kernels.expand_page_table import NEVER, BatchRows, LayerPages, PageLists, expand_page_table

_WIDTH_INCREMENT = 16  # columns of a page table: Triton then compiles attention for one kind of stride
# a kernel's tile of tokens may end some pages behind the last one
_EXTRA_COLUMNS = 1
# entries of page tables that there is room for in any case: those of all layers of a small batch
_MIN_ENTRIES = 2**20


@dataclass(frozen=True)
class PageTableMemory:
    """What a page table needs however large the pool is: it can be taken before there is one.

    block_ids: [max_num_reqs, max_blocks] int32, starts, counts: [max_num_reqs, num_layers, num_kv_heads] int32 and
               own_from: [max_num_reqs] int32, as in ``PageLists``
    pages:     [num_entries] int32, room for the page table of a step
    kv_lens:   [num_layers * max_num_reqs * num_kv_heads] int32, and for the lengths in it
    """

    block_ids: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    own_from: torch.Tensor
    pages: torch.Tensor
    kv_lens: torch.Tensor

    @classmethod
    def take(
        cls,
        num_layers: int,
        num_kv_heads: int,
        block_size: int,
        max_num_reqs: int,
        max_tokens: int,
        device: torch.device,
    ) -> PageTableMemory:
        """max_num_reqs, max_tokens: the most requests at once, and the longest of them."""

        def zeros(*shape: int) -> torch.Tensor:
            # written to, else a CPU would count it as free until it is used
            return torch.full(shape, 0, dtype=torch.int32, device=device)

        max_blocks = cdiv(max_tokens, block_size)
        by_head = max_num_reqs, num_layers, num_kv_heads
        num_entries = max(max_num_reqs * num_kv_heads * _width(max_blocks), _MIN_ENTRIES)
        return cls(
            zeros(max_num_reqs, max_blocks),
            zeros(*by_head),
            zeros(*by_head),
            zeros(max_num_reqs),
            zeros(num_entries),
            torch.ones(num_layers * max_num_reqs * num_kv_heads, dtype=torch.int32, device=device),
        )


class PageTable:
    """The page lists of all evicted requests, and the page table that attention over some of them reads.

    An eviction fills pages and leaves a list of them for every layer and KV head. The lists stand in an *arena* with
    one entry for each page of the pool; a request uses the entries of the blocks that it keeps, so that lists need no
    allocator, never grow, and cannot meet those of another request. What a request computes after its eviction lies
    where vLLM's block table says, and is in no list.

    A request takes a slot at its eviction and gives it back when it ends. All memory is taken here or was before:
    ``BYTES_PER_PAGE`` for each page of the pool, and a ``PageTableMemory``.

    generation: changes whenever a row comes, goes, or is evicted
    """

    BYTES_PER_PAGE: ClassVar[int] = 4

    def __init__(self, pool: PagePool, memory: PageTableMemory) -> None:
        """memory: for as many layers and heads as the pool has, and for blocks of its size."""
        num_lists, max_num_reqs = pool.num_layers * pool.num_kv_heads, len(memory.own_from)
        num_entries = len(pool.pages) // num_lists * num_lists
        self._pool = pool
        self._lists = PageLists(
            arena=torch.zeros(num_entries, dtype=torch.int32, device=pool.layer_offset.device),
            block_ids=memory.block_ids,
            starts=memory.starts,
            counts=memory.counts,
            own_from=memory.own_from,
        )
        self._max_width = _width(memory.block_ids.shape[1])
        self._pages, self._kv_lens = memory.pages, memory.kv_lens
        # known to the host, per slot: pages of the longest list, and from which token on its own blocks hold them
        self._most_pages = np.zeros(max_num_reqs, dtype=np.int64)
        self._own_from = np.zeros(max_num_reqs, dtype=np.int64)
        self.slots = RequestSlots(max_num_reqs)
        self.generation = 0

    @classmethod
    def of(cls, pool: PagePool, max_num_reqs: int, max_tokens: int) -> PageTable:
        """Return a page table that takes all of its memory; the arguments are as in ``PageTableMemory.take``."""
        sizes = pool.num_layers, pool.num_kv_heads, pool.block_size, max_num_reqs, max_tokens
        return cls(pool, PageTableMemory.take(*sizes, pool.layer_offset.device))

    def __contains__(self, req_id: object) -> bool:
        return req_id in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_list_bytes(self) -> int:
        """Bytes of what is known of each request, beside the arena."""
        return sum(tensor.nbytes for tensor in self._lists) - self.num_arena_bytes

    @property
    def num_step_bytes(self) -> int:
        """Bytes of the page table of a step."""
        return self._pages.nbytes + self._kv_lens.nbytes

    @property
    def num_arena_bytes(self) -> int:
        """Bytes of the arena."""
        return self._lists.arena.nbytes

    def add(
        self,
        req_ids: Sequence[str],
        pages: KeptPages,
        plans: Sequence[EvictionPlan],
        block_ids: Sequence[torch.Tensor],
    ) -> None:
        """Give each of ``req_ids`` a slot that holds its compacted cache, in launches that do not depend on how many
        they are.

        pages, plans: of these requests, alike in ``per_token``
        block_ids:    of each [plan.num_full_blocks] int64, the blocks of which its pages are

        Raises ValueError if one has a slot, or none is left.
        """
        lists, device = pages.page_table.flatten(1, 2), pages.page_table.device
        num_lists = lists.shape[1]
        slots = np.array([self.slots.take(req_id) for req_id in req_ids])
        num_blocks = np.array([plan.num_full_blocks for plan in plans])
        has_tail = np.array([plan.num_tail_tokens > 0 for plan in plans])
        first_block = num_blocks.cumsum() - num_blocks
        slot, tail, first_entry = to_device(np.stack([slots, has_tail, first_block * num_lists]), device).unbind(0)
        counts = pages.num_pages.flatten(1) - tail[:, None]
        starts = counts.cumsum(1) - counts
        column = torch.arange(lists.shape[2], device=device)
        # pages of the tail, and zeros behind a list, go to an entry that is not used
        num_entries = int(num_blocks.sum()) * num_lists
        place = (first_entry[:, None] + starts)[..., None] + column
        place = torch.where(column < counts[..., None], place, num_entries)
        entries = lists.new_zeros(num_entries + 1, dtype=torch.int32)
        entries.scatter_(0, place.flatten(), lists.flatten().to(torch.int32))
        ids = torch.cat(list(block_ids))
        self._lists.arena.view(-1, num_lists)[ids] = entries[:-1].view(-1, num_lists)
        of_block = np.stack([slots.repeat(num_blocks), np.arange(len(ids)) - first_block.repeat(num_blocks)])
        owner, number = to_device(of_block, device).unbind(0)
        self._lists.block_ids[owner, number] = ids.to(torch.int32)
        shape = pages.num_pages.shape
        self._lists.starts[slot] = starts.view(shape).to(torch.int32)
        self._lists.counts[slot] = counts.view(shape).to(torch.int32)
        self._most_pages[slots] = np.array(pages.widths) - has_tail
        self._set_own_from(slots, [plan.num_tokens for plan in plans], plans[0].per_token)

    def _set_own_from(self, slots: np.ndarray, num_tokens: Sequence[int], per_token: bool) -> None:
        """Say which tokens of slots their own blocks hold: those of the last full block on, or none."""
        block_size = self._pool.block_size
        own_from = np.full(len(slots), NEVER) if per_token else np.array(num_tokens) // block_size * block_size
        self._own_from[slots] = own_from
        place, value = to_device(np.stack([slots, own_from]), self._lists.own_from.device).unbind(0)
        self._lists.own_from[place] = value.to(torch.int32)
        self.generation += 1

    def remove(self, req_id: str) -> None:
        """Drop the row of a request that ended or was preempted; nothing happens if it has none."""
        self.generation += self.slots.give_back(req_id)

    def shrink(self, req_ids: Sequence[str], num_tokens: Sequence[int], per_token: bool = False) -> None:
        """Drop the pages of every row but those in its list, and the last one if it is not full.

        Those in between have been filled since then, and were emptied after ``num_tokens`` tokens of each request.

        per_token: as in ``EvictionPlan``
        """
        self._set_own_from(self._slots_of(req_ids), num_tokens, per_token)

    def _slots_of(self, req_ids: Sequence[str]) -> np.ndarray:
        return np.array([self.slots[req_id] for req_id in req_ids])

    def num_full_pages(self, req_ids: Sequence[str]) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads] int64, the pages of requests that their evictions have filled."""
        counts = self._lists.counts
        return counts[to_device(self._slots_of(req_ids), counts.device)].to(torch.int64)

    def replaces(self, req_id: str) -> bool:
        """Whether each new token of a request takes the slot of another one, so that its rows never grow."""
        return bool(self._own_from[self.slots[req_id]] == NEVER)

    def rows(
        self, req_ids: Sequence[str], num_tokens: Sequence[int], block_ids: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the page ids [num_reqs, num_layers, num_kv_heads, max_pages] int64 of requests of so many tokens,
        0 behind the last one, and how many of them are in use [num_reqs, num_layers, num_kv_heads] int64.

        block_ids: of each [num_blocks] int64, its block table

        The number of launches does not depend on that of the requests, and nothing waits for the device.
        """
        slots, block_size = self._slots_of(req_ids), self._pool.block_size
        ends = -(-np.array(num_tokens) // block_size)
        first = np.minimum(self._own_from[slots] // block_size, ends)
        num_own, most_pages = ends - first, self._most_pages[slots]
        most, width = int(most_pages.max()), int((most_pages + num_own).max())
        lens = np.array([len(ids) for ids in block_ids])
        number = np.arange(num_own.max())
        # of the block tables in a row; behind the last block of a request, any
        own = np.minimum((lens.cumsum() - lens + first)[:, None] + number, lens.sum() - 1)
        facts = np.concatenate([slots[:, None], num_own[:, None], own], axis=1)
        slot, count, own_on_device = to_device(facts, self._lists.counts.device).split([1, 1, len(number)], dim=1)
        counts = self._lists.counts[slot[:, 0]].to(torch.int64)
        kept = self._kept(slot[..., None, None], self._lists.starts[slot[:, 0]], most)
        kept *= torch.arange(most, device=kept.device) < counts[..., None]
        # pages of no block of a request go to a column that is not used
        pages = torch.nn.functional.pad(kept, (0, width + 1 - most))
        column = torch.arange(len(number), device=kept.device)
        place = torch.where(column < count[..., None, None], counts[..., None] + column, width)
        of_own = self._pool.page_ids(torch.cat(list(block_ids))[own_on_device])
        pages.scatter_(3, place, of_own.permute(2, 0, 1, 3))
        return pages[..., :width], counts + count[..., None]

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
