"""All rows of a batch folded, whole ones too, in tensors that stay where they are: a graph reads no others."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.engine.worker.rows import FoldedLaunch, FoldedQueries, fold_queries
from vllm_kvevict.kernels.expand_page_table import BatchRows


class AllRows:
    """Folds batches in which all requests have equally many tokens: one, or as many more as drafts are verified.

    Rows behind the requests are idle, as in vLLM's metadata. Of what attention gives them nobody reads anything, but
    they have as many tokens as queries: a query that sees none gives NaN.

    max_num_reqs, max_tokens: the most requests at once, and the longest of them
    """

    def __init__(self, max_num_reqs: int, max_tokens: int, num_kv_heads: int, device: torch.device) -> None:
        self._max_num_reqs, self._max_tokens = max_num_reqs, max_tokens
        self._num_kv_heads = num_kv_heads
        self._rows = torch.arange(max_num_reqs, dtype=torch.int32, device=device)
        self._slots = torch.full((max_num_reqs,), -1, dtype=torch.int32, device=device)
        self._staged: np.ndarray | None = None
        self._seq_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._queries: dict[int, FoldedQueries] = {}

    def fold(self, slots: np.ndarray, common: CommonAttentionMetadata, page_table: PageTable) -> FoldedLaunch:
        """slots: [num_reqs] int32, where the page table has the request of each row; -1 for whole rows. The same array
        as for the last batch if that is still so
        """
        if slots is not self._staged:
            padded = np.full(len(self._slots), -1, dtype=np.int32)
            padded[: len(slots)] = slots
            self._slots.copy_(to_device(padded, self._slots.device), non_blocking=True)
            self._staged = slots
        num_rows, query_len = common.num_reqs, common.num_actual_tokens // common.num_reqs
        seq_lens = common.seq_lens
        if query_len > 1:  # a row with a single query gets a token when its pages are looked up
            seq_lens = torch.clamp(seq_lens, min=query_len, out=self._seq_lens[:num_rows])
        batch = BatchRows(self._rows[:num_rows], self._slots[:num_rows], seq_lens, common.block_table_tensor)
        pages = page_table.expand_layer_by_layer(batch)
        return FoldedLaunch(self._queries_of(num_rows, query_len), slots, pages, self._max_tokens)

    def _queries_of(self, num_rows: int, query_len: int) -> FoldedQueries:
        """Return a part of what is made once, at a capture."""
        if query_len not in self._queries:
            first_tokens = np.arange(self._max_num_reqs) * query_len
            query_lens = np.full(self._max_num_reqs, query_len)
            heads, device = self._num_kv_heads, self._slots.device
            index, _, starts, row_starts = fold_queries(first_tokens, query_lens, heads, device)
            order = None if query_len == 1 else index
            self._queries[query_len] = FoldedQueries(order, starts, query_len, None, row_starts)
        known, num_sequences = self._queries[query_len], num_rows * self._num_kv_heads
        order = None if known.index is None else known.index[: num_sequences * query_len]
        starts, row_starts = known.query_start_loc[: num_sequences + 1], known.row_start_loc[: num_rows + 1]
        return FoldedQueries(order, starts, query_len, None, row_starts)
