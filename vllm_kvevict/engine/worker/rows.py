"""One step's batch as attention must see it: whole rows, and evicted ones folded into a sequence for each KV head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvevict.cache.page_table import FoldedBatch
from vllm_kvevict.cache.query_ring import RingWrite
from vllm_kvevict.engine.worker.watched import ChunkRow, PrefillRow
from vllm_kvevict.eviction.per_token import Replacement


@dataclass(frozen=True)
class RowSplit:
    """A batch as attention must see it.

    whole:        rows [num_whole] int64 whose cache is complete
    evicted:      rows [num_evicted] int64 that read their own page tables
    whole_tokens: tokens [*] int64 of the whole rows, None if that is all of them
    """

    whole: torch.Tensor
    evicted: torch.Tensor
    whole_tokens: torch.Tensor | None


@dataclass(frozen=True)
class FoldedQueries:
    """The query tokens of evicted rows, sorted by row, then KV head, then position.

    query_lens:      [num_evicted] int64, the tokens of each row
    index:           [num_queries] int64 into the batch's queries seen as [num_tokens * num_kv_heads, group, head_size];
                     None if they are sorted already, and all of them
    query_start_loc: [num_evicted * num_kv_heads + 1] int32, where the queries of each row and head begin
    max_query_len:   most queries of a row of the batch, evicted or not
    """

    query_lens: torch.Tensor
    index: torch.Tensor | None
    query_start_loc: torch.Tensor
    max_query_len: int


@dataclass(frozen=True)
class StepRows:
    """One step's batch: how it splits, what its evicted rows ask and read, and which of its rows are to be scored.

    remembered: queries of requests that evict while they decode, None if there are none
    replacements: of requests that do so token by token
    """

    split: RowSplit
    queries: FoldedQueries | None
    folded: FoldedBatch | None
    prefills: list[PrefillRow | ChunkRow]
    remembered: RingWrite | None
    replacements: list[Replacement]


class BatchFolder:
    """Splits batches and folds their queries. What it knows of a batch is good while the same requests decode a token.

    num_kv_heads: of one layer
    """

    def __init__(self, num_kv_heads: int) -> None:
        self._num_kv_heads = num_kv_heads
        self._decoding: torch.Tensor | None = None
        self._known: tuple[RowSplit, FoldedQueries | None] | None = None

    def split(self, slots: torch.Tensor, common: CommonAttentionMetadata) -> tuple[RowSplit, FoldedQueries | None]:
        """Return how a batch splits, and the queries of its evicted rows, None if there are none.

        slots: [num_reqs] int64, where the page table has the request of each row; -1 for whole rows. The same tensor as
               in the last step if that is still so
        """
        is_decoding = common.max_query_len == 1 and int(common.query_start_loc_cpu[-1]) == len(slots)
        if self._known is not None and is_decoding and slots is self._decoding:
            return self._known
        split, queries = split_rows(slots, common), None
        if len(split.evicted):
            first_tokens = common.query_start_loc[:-1].to(torch.int64)[split.evicted]
            query_lens = common.naive_query_lens().to(torch.int64)[split.evicted]
            queries = fold_queries(first_tokens, query_lens, self._num_kv_heads, common.max_query_len)
            if is_decoding and not len(split.whole):
                queries = replace(queries, index=None)
        self._decoding, self._known = slots if is_decoding else None, (split, queries)
        return self._known


def split_rows(slots: torch.Tensor, common: CommonAttentionMetadata) -> RowSplit:
    """slots: [num_reqs] int64, where the page table has the request of each row; -1 for whole rows."""
    is_evicted = slots >= 0
    evicted = is_evicted.nonzero()[:, 0]
    whole = (~is_evicted).nonzero()[:, 0]
    if not len(evicted):
        return RowSplit(whole, evicted, None)
    token_is_whole = torch.repeat_interleave(~is_evicted, common.naive_query_lens().to(torch.int64))
    return RowSplit(whole, evicted, token_is_whole.nonzero()[:, 0])


def fold_queries(
    first_tokens: torch.Tensor, query_lens: torch.Tensor, num_kv_heads: int, max_query_len: int
) -> FoldedQueries:
    """first_tokens, query_lens: [num_evicted] int64, where the tokens of each row begin, and how many there are."""
    lens = query_lens.repeat_interleave(num_kv_heads)
    query_start_loc = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    head = torch.arange(num_kv_heads, device=lens.device).repeat(len(query_lens))
    # a query's place in the batch, less its place in the folded order: the same for all queries of one row and head
    shift = first_tokens.repeat_interleave(num_kv_heads) - query_start_loc[:-1]
    place = torch.arange(int(query_start_loc[-1]), device=lens.device)
    tokens = place + shift.repeat_interleave(lens)
    index = tokens * num_kv_heads + head.repeat_interleave(lens)
    return FoldedQueries(query_lens, index, query_start_loc.to(torch.int32), max_query_len)
