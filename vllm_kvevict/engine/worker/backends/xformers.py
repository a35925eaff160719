"""vLLM's Triton attention for whole rows, and xformers' paged attention for evicted ones.

Taken by ``--attention-backend CUSTOM``. Checked through Triton's interpreter, in a real engine on CPU; on a GPU the
kernel was run over such tables, no engine: untested on hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.kv_cache_interface import KVQuantMode

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.engine.worker.backends.base import PagesToRead
from vllm_kvevict.engine.worker.backends.triton import (
    EvictionTritonBackend,
    EvictionTritonImpl,
    EvictionTritonMetadataBuilder,
)
from vllm_kvevict.engine.worker.rows import FoldedLaunch, FoldedQueries
from vllm_kvevict.kernels.optional_xformers import HAS_XFORMERS
from vllm_kvevict.kernels.paged_attention import DTYPES, HEAD_SIZES, PagedRows, paged_attention

_WIDTH_INCREMENT = 16  # pages: rows are prepared anew when this many more are needed


@dataclass(frozen=True)
class QueryRows:
    """A row of pages for each query of the folded sequences, since the kernel wants one query in each.

    width:  pages of a row
    owner:  [num_queries] int64, the sequence of each query; None if each sequence has one
    behind: [num_queries] int32, how many tokens of its sequence come after it, which it does not see
    """

    paged: PagedRows
    width: int
    owner: torch.Tensor | None
    behind: torch.Tensor | None


class EvictionXformersMetadataBuilder(EvictionTritonMetadataBuilder):
    """Prepares the rows of queries once for all layers, and again only when their number or width changes."""

    can_replay = False  # what is known of rows is made anew when their number changes
    _known: tuple[tuple[int, int], PagedRows] | None = None

    def _launch(self, folded: FoldedLaunch) -> QueryRows:  # type: ignore[override]
        starts, index = folded.queries.query_start_loc, folded.queries.index
        owner = behind = None
        num_queries = len(starts) - 1
        if index is not None:
            num_queries = len(index)
            every = torch.arange(len(starts) - 1, device=starts.device)
            owner = torch.repeat_interleave(every, starts.diff().long(), output_size=num_queries)
            behind = starts[1:][owner] - 1 - torch.arange(num_queries, dtype=torch.int32, device=starts.device)
        block_size = self.kv_cache_spec.block_size
        size = num_queries, cdiv(folded.max_kv_len, _WIDTH_INCREMENT * block_size) * _WIDTH_INCREMENT
        if self._known is None or self._known[0] != size:
            self._known = size, PagedRows.of(*size, block_size, starts.device)
        return QueryRows(self._known[1], size[1], owner, behind)


class EvictionXformersImpl(EvictionTritonImpl):
    """vLLM's unified attention kernel, and xformers' for evicted rows."""

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        dtype, remedy = get_current_vllm_config().model_config.dtype, "use --attention-backend TRITON_ATTN"
        if self.sinks is not None or self.logits_soft_cap:
            what = "attention sinks" if self.sinks is not None else "logits soft-capping"
            raise ValueError(f"--attention-backend CUSTOM: xformers does not know {what} of the model; {remedy}")
        if not HAS_XFORMERS:
            raise ValueError(
                "--attention-backend CUSTOM: with --kv-eviction it is xformers, which is not installed; run "
                f"`pip install vllm-kvevict[xformers]` or {remedy}"
            )
        if dtype not in DTYPES or self._kv_quant_mode != KVQuantMode.NONE or self.head_size not in HEAD_SIZES:
            raise ValueError(
                f"--attention-backend CUSTOM: xformers takes float16 or bfloat16, of the KV cache as well, and head "
                f"sizes {', '.join(map(str, HEAD_SIZES))}, got {dtype}, a cache in {self.kv_cache_dtype} and "
                f"{self.head_size}; {remedy}"
            )

    def attend_folded(
        self,
        layer: Any,
        query: torch.Tensor,
        pages: PagesToRead,
        queries: FoldedQueries,
        launch: QueryRows,  # type: ignore[override]
        output: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        pool, page_table, kv_lens = pages.pool, pages.page_table[:, : launch.width].contiguous(), pages.kv_lens
        if launch.owner is not None and launch.behind is not None:
            page_table, kv_lens = page_table[launch.owner], kv_lens[launch.owner] - launch.behind
        output.copy_(paged_attention(query, pool.keys, pool.values, page_table, kv_lens, self.scale, launch.paged))


class EvictionXformersBackend(EvictionTritonBackend):
    """Triton attention with eviction, whose evicted rows xformers reads."""

    impl = EvictionXformersImpl
    builder = EvictionXformersMetadataBuilder

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"
