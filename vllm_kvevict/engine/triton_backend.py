"""vLLM's Triton attention for whole rows, and the same kernel over folded page tables for evicted ones.

Checked through Triton's interpreter, in a real engine on CPU; not run on a GPU.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.triton_unified_attention import unified_attention
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvevict.cache.pages import Packing, PagePool
from vllm_kvevict.engine.attention import EvictionBackend, EvictionImpl, EvictionMetadataBuilder
from vllm_kvevict.engine.rows import FoldedQueries


class EvictionTritonBackend(EvictionBackend, TritonAttentionBackend):
    """vLLM's Triton attention with eviction."""

    packing: ClassVar[Packing] = "interleaved"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # the tokens of one KV head must lie together: they are a page
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[EvictionTritonImpl]:
        return EvictionTritonImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionTritonMetadataBuilder]:
        return EvictionTritonMetadataBuilder


class EvictionTritonMetadataBuilder(EvictionMetadataBuilder, TritonAttentionMetadataBuilder):
    """Needs nothing of the folded rows: the kernel divides its labour on the device."""


class EvictionTritonImpl(EvictionImpl, TritonAttentionImpl):
    """vLLM's unified attention kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False  # policies read the queries, which an fp8 cache would make fp8 too

    def attend_folded(
        self,
        layer: Any,
        query: torch.Tensor,
        pool: PagePool,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        queries: FoldedQueries,
        launch: None,
        output: torch.Tensor,
    ) -> None:
        descale_shape = (len(kv_lens), 1)
        unified_attention(
            q=query,
            k=pool.keys.unsqueeze(2),  # [num_pages, block_size, 1, head_size]
            v=pool.values.unsqueeze(2),
            out=output,
            cu_seqlens_q=queries.query_start_loc,
            max_seqlen_q=queries.max_query_len,
            seqused_k=kv_lens,
            max_seqlen_k=page_table.shape[1] * pool.block_size,
            softmax_scale=self.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=page_table,
            softcap=0,
            q_descale=None,
            k_descale=layer._k_scale.expand(descale_shape),
            v_descale=layer._v_scale.expand(descale_shape),
            kv_quant_mode=self._kv_quant_mode,
        )
