"""vLLM's CPU attention for whole rows, and the same kernel over folded page tables for evicted ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kvevict.cache.page_table import FoldedBatch
from vllm_kvevict.engine.bridge import EvictionBridge, FoldedQueries, StepRows
from vllm_kvevict.engine.spec import EvictionSpec, with_eviction_managers

# the page packing that vLLM's kernel calls "vec": K as [head_size, block_size], then V as [block_size, head_size]
_ISA = "vec"


@contextmanager
def cpu_backend() -> Iterator[None]:
    """Layers built inside this context use our backend, which the CPU platform finds under vLLM's own name.

    Scoped, so that an engine without eviction in the same process gets vLLM's.
    """
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{EvictionCPUBackend.__name__}")
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()


class EvictionCPUBackend(CPUAttentionBackend):
    """CPU attention whose full-attention layers can be evicted; other layers are served as before."""

    @staticmethod
    def get_impl_cls() -> type[EvictionCPUImpl]:
        return EvictionCPUImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionCPUMetadataBuilder]:
        return EvictionCPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return with_eviction_managers(super().customize_spec(spec))


@dataclass
class EvictionCPUMetadata:
    """A batch in which at least one row is evicted or to be scored.

    whole:         stock metadata of the rows whose cache is complete, None if there are none
    schedule:      the kernel's division of labour over the folded rows if it serves every layer, else None
    make_schedule: makes the one of a layer from its kv_lens and the rows' query_start_loc
    """

    rows: StepRows
    bridge: EvictionBridge
    whole: CPUAttentionMetadata | None
    schedule: torch.Tensor | None
    make_schedule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def schedule_of(self, kv_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """Return the schedule of the layer whose folded rows have these lengths, [num_folded] int32."""
        return self.make_schedule(kv_lens, query_start_loc) if self.schedule is None else self.schedule


class EvictionCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits a batch into whole and evicted rows. ``bridge`` is set by the worker once the cache exists."""

    bridge: EvictionBridge | None = None

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *args, **kwargs)
        if isinstance(kv_cache_spec, EvictionSpec):
            self.isa = _ISA  # AMX packs K in a way of its own
            self._set_isa_to_layers(layer_names)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        rows = None if self.bridge is None else self.bridge.rows(common_attn_metadata)
        if self.bridge is None or rows is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        whole = None
        if len(rows.split.whole):
            whole = super().build(common_prefix_len, _whole_rows(common_attn_metadata, rows), fast_build)
        return EvictionCPUMetadata(rows, self.bridge, whole, self._shared_schedule(rows), self._layer_schedule)

    def _shared_schedule(self, rows: StepRows) -> torch.Tensor | None:
        """Uniform budgets: one schedule serves every layer. Ragged ones: a layer makes its own when it runs."""
        if rows.folded is None or rows.queries is None:
            return None
        first, kv_lens = rows.folded.kv_lens[0], rows.folded.kv_lens
        if not torch.equal(kv_lens, first.expand_as(kv_lens)):
            return None
        return self._layer_schedule(first, rows.queries.query_start_loc)

    def _layer_schedule(self, kv_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(kv_lens),
            num_heads=self.num_heads // self.num_kv_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=kv_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class EvictionCPUImpl(CPUAttentionBackendImpl):
    """Runs whole rows as they are and evicted rows folded: each KV head of a request a sequence of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.attn_type == AttentionType.DECODER and self.sliding_window in (None, -1):
            self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        unsupported = {
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks in the model": self.sinks is not None,
            "logits soft-capping": bool(self.logits_soft_cap),
            "KV sharing between layers": self.kv_sharing_target_layer_name is not None,
        }
        for name, is_on in unsupported.items():
            if is_on:
                raise ValueError(f"--kv-eviction does not work with {name}; leave --kv-eviction out for this model")

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(attn_metadata, EvictionCPUMetadata):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        rows, tokens = attn_metadata.rows, attn_metadata.rows.split.whole_tokens
        if attn_metadata.whole is not None and tokens is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata.whole, output)
        elif attn_metadata.whole is not None:
            part_query = query[tokens]
            part = output.new_empty(len(part_query), *output.shape[1:])
            output[tokens] = super().forward(layer, part_query, key, value, kv_cache, attn_metadata.whole, part)
        index = attn_metadata.bridge.layer_index[layer.layer_name]
        if rows.folded is not None and rows.queries is not None:
            self._forward_folded(layer, rows.folded, rows.queries, index, query, attn_metadata, output)
        for prefill in rows.prefills:
            attn_metadata.bridge.observe(prefill, index, query, output, self.scale)
        return output

    def _forward_folded(
        self,
        layer: Any,
        folded: FoldedBatch,
        queries: FoldedQueries,
        index: int,
        query: torch.Tensor,
        metadata: EvictionCPUMetadata,
        output: torch.Tensor,
    ) -> None:
        """query, output: [num_tokens, num_heads, head_size]; heads of one KV head are neighbours."""
        by_head = (-1, self.num_queries_per_kv, self.head_size)  # [num_tokens * num_kv_heads, group, head_size]
        folded_query = query.reshape(by_head).index_select(0, queries.index)
        folded_output = torch.empty_like(folded_query)
        pool = metadata.bridge.pool
        # the dtype that vLLM allocated, which for an fp8 cache is uint8
        pages = pool.pages.view(layer.kv_cache.dtype).view(-1, 1, 2 * pool.block_size, self.head_size)
        key_cache, value_cache = pages.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=folded_query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=folded_output,
            query_start_loc=queries.query_start_loc,
            seq_lens=folded.kv_lens[index],
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=folded.page_table[index],
            softcap=0,
            scheduler_metadata=metadata.schedule_of(folded.kv_lens[index], queries.query_start_loc),
            s_aux=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        output.view(by_head)[queries.index] = folded_output


def _whole_rows(common: CommonAttentionMetadata, rows: StepRows) -> CommonAttentionMetadata:
    """Return ``common`` without its evicted rows."""
    tokens, whole = rows.split.whole_tokens, rows.split.whole
    if tokens is None:
        return common
    query_lens = common.naive_query_lens()[whole]
    query_start_loc = torch.nn.functional.pad(query_lens.cumsum(0, dtype=torch.int32), (1, 0))
    seq_lens = common.seq_lens[whole]
    return common.replace(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        num_reqs=len(whole),
        num_actual_tokens=len(tokens),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[whole],
        slot_mapping=common.slot_mapping[tokens],
    )
