"""vLLM's Triton attention for whole rows, and the same kernel over folded page tables for evicted ones.

Checked through Triton's interpreter, in a real engine on CPU. On a GPU the kernel was run over such tables, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.utils.math_utils import next_power_of_2
from vllm.v1.attention.backends.triton_attn import (
    NUM_PAR_SOFTMAX_SEGMENTS,
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.triton_unified_attention import unified_attention

from vllm_kvevict.engine.worker.backends.base import (
    EvictionImpl,
    EvictionMetadataBuilder,
    InterleavedBackend,
    PagesToRead,
)
from vllm_kvevict.engine.worker.rows import FoldedLaunch, FoldedQueries


@dataclass(frozen=True)
class Segments:
    """Scratch memory with which the kernel splits the tokens of a sequence among programs, where sequences are few.

    max_sequences: what it is enough for; more sequences fill a GPU without
    output:        [max_sequences, group, num_segments, head_size] float32, partial results
    maxima, sums:  [max_sequences, group, num_segments] float32 of the partial softmaxes
    """

    max_sequences: int
    output: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor


class EvictionTritonMetadataBuilder(EvictionMetadataBuilder, TritonAttentionMetadataBuilder):
    """Lends folded rows the scratch memory that vLLM's builder has for whole ones, which run before them."""

    can_replay = True

    def _launch(self, folded: FoldedLaunch) -> Segments:
        # of these layers: the model's others, or the model of a drafter, may have other heads than vLLM's builder saw
        num_kv_heads, head_size = self.kv_cache_spec.num_kv_heads, next_power_of_2(self.kv_cache_spec.head_size)
        group = self.num_heads_q // num_kv_heads
        row = group * NUM_PAR_SOFTMAX_SEGMENTS
        most = min(self.softmax_segm_output.numel() // (row * head_size), self.softmax_segm_max.numel() // row)
        output = self.softmax_segm_output.flatten()[: most * row * head_size]
        maxima, sums = (each.flatten()[: most * row] for each in (self.softmax_segm_max, self.softmax_segm_expsum))
        shape = most, group, NUM_PAR_SOFTMAX_SEGMENTS
        max_sequences = min(self.seq_threshold_3D * num_kv_heads, most)
        return Segments(max_sequences, output.view(*shape, head_size), maxima.view(shape), sums.view(shape))


class EvictionTritonImpl(EvictionImpl, TritonAttentionImpl):
    """vLLM's unified attention kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False  # policies read the queries, which an fp8 cache would make fp8 too

    def attend_folded(
        self,
        layer: Any,
        query: torch.Tensor,
        pages: PagesToRead,
        queries: FoldedQueries,
        launch: Segments,
        output: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        descale_shape = (len(pages.kv_lens), 1)
        unified_attention(
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
            window_size=(-1, -1),
            block_table=pages.page_table,
            softcap=self.logits_soft_cap,
            sinks=sinks,
            q_descale=None,
            k_descale=layer._k_scale.expand(descale_shape),
            v_descale=layer._v_scale.expand(descale_shape),
            kv_quant_mode=self._kv_quant_mode,
            seq_threshold_3D=launch.max_sequences,
            num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=launch.output,
            softmax_segm_max=launch.maxima,
            softmax_segm_expsum=launch.sums,
        )


class EvictionTritonBackend(InterleavedBackend, TritonAttentionBackend):
    """vLLM's Triton attention with eviction."""

    impl = EvictionTritonImpl
    builder = EvictionTritonMetadataBuilder
