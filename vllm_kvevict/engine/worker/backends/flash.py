"""vLLM's FlashAttention (2 and 3) for whole rows, and the same kernel over folded page tables for evicted ones.

Checked in a real engine on CPU against a reference of the kernel's signature; not run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_kvevict.engine.cache_dtype import FLOAT8_DTYPES, cache_dtypes
from vllm_kvevict.engine.models import evicted_models
from vllm_kvevict.engine.worker.backends.base import (
    EvictionImpl,
    EvictionMetadataBuilder,
    InterleavedBackend,
    PagesToRead,
)
from vllm_kvevict.engine.worker.rows import FoldedLaunch, FoldedQueries

_VERSIONS = (2, 3)


def flash_attention_fits(vllm_config: VllmConfig) -> bool:
    """Return whether FlashAttention can attend over evicted rows, in the version that vLLM would take for each layer.

    It needs version 2 or 3, and no cache in fp8, with which its queries are fp8 as well, and policies read them.
    """
    if any(dtype in FLOAT8_DTYPES for dtype in cache_dtypes(vllm_config)):
        return False
    archs = [model.model_arch_config for model in evicted_models(vllm_config)]
    head_sizes = {arch[layer].head_size for arch in archs for layer in range(arch.total_num_hidden_layers)}
    with set_current_vllm_config(vllm_config):
        # as the layers themselves ask; what else would change the answer is refused
        versions = {flash_attn.get_flash_attn_version(head_size=x, supports_fa4_hd256=True) for x in head_sizes}
    return versions <= set(_VERSIONS)


class EvictionFlashMetadataBuilder(EvictionMetadataBuilder, FlashAttentionMetadataBuilder):
    """Needs nothing of the folded rows: without a schedule made ahead, the kernel divides its labour by itself."""

    max_num_splits: int

    can_replay = True

    def _launch(self, folded: FoldedLaunch) -> int:
        """Return the most parts that a sequence is split into, 0 for what the kernel finds best: in a graph, where
        vLLM bounds it for its own launches, ours are bounded as well.
        """
        return self.max_num_splits if self.is_folded else 0


class EvictionFlashImpl(EvictionImpl, FlashAttentionImpl):
    """vLLM's FlashAttention kernel."""

    weighs_sinks = True

    def _refuse_unsupported(self) -> None:
        """As every backend's, and what ``flash_attention_fits`` could not foresee."""
        super()._refuse_unsupported()
        remedy = "use --attention-backend TRITON_ATTN or leave --kv-eviction out"
        if self.vllm_flash_attn_version not in _VERSIONS:
            raise ValueError(
                f"--kv-eviction does not work with FlashAttention {self.vllm_flash_attn_version}; {remedy}"
            )
        if self.kv_cache_dtype in FLOAT8_DTYPES:
            raise ValueError(f"--kv-eviction does not work with a KV cache in fp8 on FlashAttention; {remedy}")

    def attend_folded(
        self,
        layer: Any,
        query: torch.Tensor,
        pages: PagesToRead,
        queries: FoldedQueries,
        launch: int,
        output: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        attended = flash_attn.flash_attn_varlen_func(
            q=query,
            k=pages.pool.keys.unsqueeze(2),  # [num_pages, block_size, 1, head_size]
            v=pages.pool.values.unsqueeze(2),
            out=output,
            cu_seqlens_q=queries.query_start_loc,
            max_seqlen_q=queries.max_query_len,
            seqused_k=pages.kv_lens,
            max_seqlen_k=pages.max_kv_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=[-1, -1],
            block_table=pages.page_table,
            softcap=self.logits_soft_cap,
            return_softmax_lse=self.sinks is not None,
            fa_version=self.vllm_flash_attn_version,
            num_splits=launch,
        )
        if self.sinks is not None:
            self._weigh_sinks(output, attended[1], queries)

    def _weigh_sinks(self, output: torch.Tensor, log_sums: torch.Tensor, queries: FoldedQueries) -> None:
        """In place: let the sink of each query head take its part of attention.

        Version 2 knows no sinks, and 3 one for each head of a sequence, of which ours have those of one KV head only.

        output:   [num_queries, group, head_size]
        log_sums: [group, num_queries] float32, of the logits
        """
        sinks = self.sinks.float().view(self.num_kv_heads, -1)
        log_sums = log_sums.t()  # [num_queries, group]
        if queries.index is None:  # KV heads take turns
            above = (log_sums.unflatten(0, (-1, self.num_kv_heads)) - sinks).flatten(0, 1)
        else:
            above = log_sums - sinks[queries.index % self.num_kv_heads]
        output.mul_(above.sigmoid_().unsqueeze(-1))


class EvictionFlashBackend(InterleavedBackend, FlashAttentionBackend):
    """vLLM's FlashAttention with eviction."""

    impl = EvictionFlashImpl
    builder = EvictionFlashMetadataBuilder
