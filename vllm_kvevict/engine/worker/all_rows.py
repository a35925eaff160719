"""All rows of a batch folded, whole ones too, in tensors that stay where they are: a graph reads no others."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.engine.worker.rows import FoldedLaunch, FoldedQueries
from vllm_kvevict.kernels.expand_page_table import BatchRows


class AllRows:
    """Folds batches in which each request decodes one token. Rows behind the requests are idle, as in vLLM's metadata.

    max_num_reqs, max_tokens: the most requests at once, and the longest of them
    """

    def __init__(self, max_num_reqs: int, max_tokens: int, num_kv_heads: int, device: torch.device) -> None:
        self._num_kv_heads = num_kv_heads
        self._max_tokens = max_tokens
        self._rows = torch.arange(max_num_reqs, dtype=torch.int32, device=device)
        self._slots = torch.full((max_num_reqs,), -1, dtype=torch.int32, device=device)
        self._staged: np.ndarray | None = None
        self._query_start_loc = torch.arange(max_num_reqs * num_kv_heads + 1, dtype=torch.int32, device=device)

    def fold(self, slots: np.ndarray, common: CommonAttentionMetadata, page_table: PageTable) -> FoldedLaunch:
        """slots: [num_reqs] int32, where the page table has the request of each row; -1 for whole rows. The same array
        as for the last batch if that is still so
        """
        if slots is not self._staged:
            padded = np.full(len(self._slots), -1, dtype=np.int32)
            padded[: len(slots)] = slots
            self._slots.copy_(to_device(padded, self._slots.device), non_blocking=True)
            self._staged = slots
        num_rows = common.num_reqs
        batch = BatchRows(self._rows[:num_rows], self._slots[:num_rows], common.seq_lens, common.block_table_tensor)
        queries = FoldedQueries(None, self._query_start_loc[: num_rows * self._num_kv_heads + 1], 1)
        pages = page_table.expand_layer_by_layer(batch)
        return FoldedLaunch(queries, slots, pages, self._max_tokens)
