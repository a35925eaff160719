"""One step's batch as attention must see it: whole rows, and evicted ones folded into a sequence for each KV head.

The host knows all of it but lengths and pages: nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvevict.cache.page_table import ExpandedPages, PageTable
from vllm_kvevict.cache.query_ring import RingWrite
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.engine.worker.prefills import Prefill
from vllm_kvevict.eviction.per_token import Replacement
from vllm_kvevict.kernels.expand_page_table import BatchRows


@dataclass(frozen=True)
class WholeRows:
    """The rows of a batch whose cache is complete, if some of the others are evicted.

    numbers:           [num_whole] int64 in the batch, rising
    numbers_on_device: the same
    tokens:            [*] int64 on the device, their tokens, rising
    query_lens:        [num_whole] int64, how many each has
    """

    numbers: np.ndarray
    numbers_on_device: torch.Tensor
    tokens: torch.Tensor
    query_lens: np.ndarray


@dataclass(frozen=True)
class FoldedQueries:
    """The query tokens of evicted rows, sorted by row, then KV head, then position.

    index:           [num_queries] int64 into the batch's queries seen as [num_tokens * num_kv_heads, group, head_size];
                     None if they are sorted already, and all of them
    query_start_loc: [num_sequences + 1] int32, where the queries of each row and head begin
    max_query_len:   most queries of one of these rows
    tokens:          [num_tokens] int64 into the batch, those of each row behind the last row's; None if they are sorted
                     already, and all of them
    row_start_loc:   [num_rows + 1] int32, where the tokens of each row begin among these
    """

    index: torch.Tensor | None
    query_start_loc: torch.Tensor
    max_query_len: int
    tokens: torch.Tensor | None
    row_start_loc: torch.Tensor


@dataclass(frozen=True)
class EvictedRows:
    """The evicted rows of a batch that one launch serves.

    numbers, slots: [num_rows] int32 in the batch, and of the page table
    on_device:      the same two
    """

    numbers: np.ndarray
    slots: np.ndarray
    on_device: tuple[torch.Tensor, torch.Tensor]
    queries: FoldedQueries


@dataclass(frozen=True)
class RowSplit:
    """How a batch splits. Good for as long as the same requests decode a token each.

    whole:   None if no row is evicted, or if all are
    evicted: one launch each, none of which has short rows beside long ones
    """

    whole: WholeRows | None
    evicted: list[EvictedRows]


@dataclass(frozen=True)
class FoldedLaunch:
    """What attention over evicted rows needs, every KV head of a row being a sequence of its own.

    slots:      [num_rows] int32 of the page table
    pages:      the page tables of all layers
    max_kv_len: tokens of the longest sequence in any layer, or more
    """

    queries: FoldedQueries
    slots: np.ndarray
    pages: ExpandedPages
    max_kv_len: int


@dataclass(frozen=True)
class StepRows:
    """One step's batch: how it splits, and which of its rows are to be scored.

    remembered: queries of requests that evict while they decode, None if there are none
    replacements: of requests that do so token by token
    """

    split: RowSplit
    prefills: list[Prefill]
    remembered: RingWrite | None
    replacements: list[Replacement]


class BatchFolder:
    """Splits batches and folds their queries. What it knows of a batch is good while the same requests decode a token.

    num_kv_heads: of one layer
    most_decoded: tokens that a row may have in a step of its decode: more if drafts are verified
    """

    def __init__(self, num_kv_heads: int, most_decoded: int, device: torch.device) -> None:
        self._num_kv_heads = num_kv_heads
        self._most_decoded = most_decoded
        self._device = device
        self._decoding: np.ndarray | None = None
        self._known = RowSplit(None, [])

    def split(self, slots: np.ndarray, common: CommonAttentionMetadata) -> RowSplit:
        """Return how a batch splits.

        slots: [num_reqs] int32, where the page table has the request of each row; -1 for whole rows. The same array as
               in the last step if that is still so
        """
        starts = common.query_start_loc_cpu.numpy()[: len(slots) + 1]
        is_decoding = common.max_query_len == 1 and int(starts[-1]) == len(slots)
        if not is_decoding or slots is not self._decoding:
            self._known = self._split(slots, starts.astype(np.int64), is_decoding)
            self._decoding = slots if is_decoding else None
        return self._known

    def _split(self, slots: np.ndarray, starts: np.ndarray, is_decoding: bool) -> RowSplit:
        query_lens = np.diff(starts)
        evicted, whole = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        if not len(evicted):
            return RowSplit(None, [])
        is_long = query_lens[evicted] > self._most_decoded
        parts = [part for part in (evicted[~is_long], evicted[is_long]) if len(part)]
        is_sorted = is_decoding and not len(whole)
        launches = [self._launch(part, slots[part], starts[part], query_lens[part], is_sorted) for part in parts]
        if not len(whole):
            return RowSplit(None, launches)
        tokens = np.flatnonzero(np.repeat(slots < 0, query_lens))
        numbers, tokens_on_device = to_device(whole, self._device), to_device(tokens, self._device)
        return RowSplit(WholeRows(whole, numbers, tokens_on_device, query_lens[whole]), launches)

    def _launch(
        self, numbers: np.ndarray, slots: np.ndarray, first_tokens: np.ndarray, query_lens: np.ndarray, is_sorted: bool
    ) -> EvictedRows:
        order, tokens, starts, row_starts = fold_queries(first_tokens, query_lens, self._num_kv_heads, self._device)
        numbers = numbers.astype(np.int32)
        most = int(query_lens.max())
        queries = FoldedQueries(order, starts, most, tokens, row_starts)
        if is_sorted:
            queries = FoldedQueries(None, starts, most, None, row_starts)
        return EvictedRows(numbers, slots, (to_device(numbers, self._device), to_device(slots, self._device)), queries)


def fold_queries(
    first_tokens: np.ndarray, query_lens: np.ndarray, num_kv_heads: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``index``, ``tokens``, ``query_start_loc`` and ``row_start_loc`` of ``FoldedQueries``.

    first_tokens, query_lens: [num_rows] int64, where the tokens of each row begin, and how many there are
    """
    lens = query_lens.repeat(num_kv_heads)
    query_start_loc = np.concatenate([np.zeros(1, dtype=np.int64), lens.cumsum()])
    head = np.tile(np.arange(num_kv_heads), len(query_lens))
    # a query's place in the batch, less its place in the folded order: the same for all queries of one row and head
    shift = first_tokens.repeat(num_kv_heads) - query_start_loc[:-1]
    index = (np.arange(query_start_loc[-1]) + shift.repeat(lens)) * num_kv_heads + head.repeat(lens)
    row_start_loc = np.concatenate([np.zeros(1, dtype=np.int64), query_lens.cumsum()])
    tokens = np.arange(row_start_loc[-1]) + (first_tokens - row_start_loc[:-1]).repeat(query_lens)
    # in one copy each
    places = to_device(np.concatenate([index, tokens]), device).split([len(index), len(tokens)])
    starts = to_device(np.concatenate([query_start_loc, row_start_loc]).astype(np.int32), device)
    return *places, *starts.split([len(query_start_loc), len(row_start_loc)])


def folded_launches(split: RowSplit, common: CommonAttentionMetadata, page_table: PageTable) -> list[FoldedLaunch]:
    """Return what attention over the evicted rows of a batch needs in this step."""
    longest = [page_table.most_tokens(rows.slots, longest_lens(common)[rows.numbers]) for rows in split.evicted]
    batches = [BatchRows(*rows.on_device, common.seq_lens, common.block_table_tensor) for rows in split.evicted]
    expanded = page_table.expand(list(zip(batches, longest, strict=True)))
    return [
        FoldedLaunch(rows.queries, rows.slots, pages, max_kv_len)
        for rows, pages, max_kv_len in zip(split.evicted, expanded, longest, strict=True)
    ]


def longest_lens(common: CommonAttentionMetadata) -> np.ndarray:
    """Return [num_reqs] tokens of each row as far as the host knows them: what they have, or more."""
    if common.seq_lens_cpu_upper_bound is None:
        return np.full(common.num_reqs, common.max_seq_len)
    return common.seq_lens_cpu_upper_bound.numpy()
