"""One step's batch as attention must see it: whole rows, and evicted ones folded into a sequence for each KV head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvevict.cache.page_table import FoldedBatch
from vllm_kvevict.cache.query_ring import RingWrite
from vllm_kvevict.engine.prefill import ChunkRow, PrefillRow
from vllm_kvevict.token_evictor import Replacement


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

    index:           [num_queries] int64 into the batch's queries seen as [num_tokens * num_kv_heads, group, head_size]
    query_start_loc: [num_evicted * num_kv_heads + 1] int32, where the queries of each row and head begin
    max_query_len:   most queries of a row of the batch, evicted or not
    """

    index: torch.Tensor
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
    return FoldedQueries(index, query_start_loc.to(torch.int32), max_query_len)
