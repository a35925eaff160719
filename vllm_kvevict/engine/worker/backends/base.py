"""What every attention backend with eviction shares: whole rows run as they are, evicted ones folded.

Folded, each KV head of a request is a sequence of its own, with its own page table and length, so that the platform's
kernel reads a different number of tokens in every head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention import selector
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvevict.cache.pages import Packing, PagePool
from vllm_kvevict.engine.refusals import of_layer, refuse
from vllm_kvevict.engine.scheduler.managers import with_eviction_managers
from vllm_kvevict.engine.worker.all_rows import AllRows
from vllm_kvevict.engine.worker.bridge import EvictionBridge
from vllm_kvevict.engine.worker.pseudo_passes import PseudoPassMetadata
from vllm_kvevict.engine.worker.rows import (
    FoldedLaunch,
    FoldedQueries,
    RowSplit,
    StepRows,
    folded_launches,
)
from vllm_kvevict.engine.worker.whole_rows import whole_rows


@contextmanager
def backend_in_place_of(name: AttentionBackendEnum, backend: type[AttentionBackend] | str) -> Iterator[None]:
    """Layers built inside this context use ``backend`` where the platform asks for ``name``.

    backend: a class, or its full name if it is to be imported only when it is asked for

    Scoped, so that an engine without eviction in the same process gets vLLM's.
    """
    register_backend(name, backend if isinstance(backend, str) else f"{backend.__module__}.{backend.__name__}")
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        name.clear_override()
        selector._cached_get_attn_backend.cache_clear()


class EvictionBackend(AttentionBackend):
    """A backend whose full-attention layers can be evicted; other layers are served as before.

    impl:    attention of one layer
    builder: of the metadata of a batch
    packing: how its kernels lay out a page, unless ``packing_of`` a layer says otherwise
    """

    impl: ClassVar[type[EvictionImpl]]
    builder: ClassVar[type[EvictionMetadataBuilder]]
    packing: ClassVar[Packing]

    @classmethod
    def get_impl_cls(cls) -> type[EvictionImpl]:
        return cls.impl

    @classmethod
    def get_builder_cls(cls) -> type[EvictionMetadataBuilder]:
        return cls.builder

    @classmethod
    def packing_of(cls, layer: Any) -> Packing:
        """Return how the pages of one of its layers are laid out, once its metadata builder exists."""
        return cls.packing

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return with_eviction_managers(super().customize_spec(spec))


class InterleavedBackend(EvictionBackend):
    """A backend whose kernels read keys and values side by side in every slot."""

    packing: ClassVar[Packing] = "interleaved"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # the tokens of one KV head must lie together: they are a page
        return (KVCacheLayout.LBHNC,)


@dataclass
class EvictionMetadata:
    """A batch in which at least one row is evicted or to be scored.

    whole:    stock metadata of the rows whose cache is complete, None if there are none
    launches: of the folded rows, each with what the backend's kernel needs to know beside it
    """

    rows: StepRows
    bridge: EvictionBridge
    whole: Any
    launches: list[tuple[FoldedLaunch, Any]]


@dataclass(frozen=True)
class PagesToRead:
    """The page table of some folded rows in one layer.

    page_table: [num_sequences, width] int32 into ``pool``
    kv_lens:    [num_sequences] int32
    max_kv_len: the largest of these, or more
    """

    pool: PagePool
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    max_kv_len: int


class EvictionMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Splits a batch into whole and evicted rows. ``bridge`` is set by the worker once the cache exists.

    can_replay: whether a launch of the backend's kernel, captured once, serves batches of other lengths and tables

    is_replayed: whether the next batch is one for a graph: if some of its rows are evicted, or it is made up to be
                 captured, all are folded
    is_folded:   whether those of the last batch for a graph were
    """

    can_replay: ClassVar[bool] = False
    bridge: EvictionBridge | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_replayed = self.is_folded = False
        self._all_rows: AllRows | None = None
        # vLLM's builders may say so of theirs; ours holds page tables and lengths that are made anew for every pass
        self.supports_draft_decode_metadata_update = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        # model runner V1 would replay stock attention for rows that have been evicted since it was captured; on V2
        # graphs.py decides which steps are replayed
        is_captured = cls.can_replay and vllm_config.use_v2_model_runner
        return AttentionCGSupport.UNIFORM_BATCH if is_captured else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        self.is_folded = False
        rows = None if self.bridge is None else self.bridge.rows(common_attn_metadata)
        if self.bridge is None or rows is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.is_replayed:
            if rows.prefills or rows.remembered is not None or rows.replacements:
                raise RuntimeError("a step that evicts or remembers queries is none that a graph can stand for")
            slots = self.bridge.page_table.slots.of(self.bridge.step.req_ids)
            return self._fold_all(self.bridge, slots, common_attn_metadata)
        whole, split = None, rows.split
        if split.whole is not None:
            whole = super().build(common_prefix_len, whole_rows(common_attn_metadata, split.whole), fast_build)
        elif not split.evicted:
            whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        folded_rows = folded_launches(split, common_attn_metadata, self.bridge.page_table)
        launches = [(folded, self._launch(folded)) for folded in folded_rows]
        return EvictionMetadata(rows, self.bridge, whole, launches)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        if self.is_replayed and self.bridge is not None:
            return self._fold_all(self.bridge, np.empty(0, dtype=np.int32), common_attn_metadata)
        self.is_folded = False
        return super().build_for_cudagraph_capture(common_attn_metadata)

    def _fold_all(self, bridge: EvictionBridge, slots: np.ndarray, common: CommonAttentionMetadata) -> EvictionMetadata:
        """slots: [num_reqs] int32, where the page table has the request of each row; -1 for whole rows."""
        if self._all_rows is None:
            max_num_reqs = self.vllm_config.scheduler_config.max_num_seqs
            max_tokens = self.vllm_config.model_config.max_model_len
            heads, device = bridge.pool.num_kv_heads, bridge.pool.pages.device
            self._all_rows = AllRows(max_num_reqs, max_tokens, heads, device)
        self.is_folded = True
        folded = self._all_rows.fold(slots, common, bridge.page_table)
        rows = StepRows(RowSplit(None, []), [], None, [])
        return EvictionMetadata(rows, bridge, None, [(folded, self._launch(folded))])

    def _launch(self, folded: FoldedLaunch) -> Any:
        """Return what the backend's kernel needs to know of some folded rows in all layers."""
        return None


class EvictionImpl(AttentionImpl[Any]):
    """Attention of one layer: the stock kernel over whole rows, the same kernel over folded ones, then the policies.

    weighs_sinks: whether ``attend_folded`` lets the sinks of all heads take part in one launch. Kernels that take a
                  sink per query head, of which a sequence has those of its own KV head, are launched for each KV head
    """

    weighs_sinks: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.attn_type == AttentionType.DECODER and self.sliding_window in (None, -1, (-1, -1)):
            self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        refuse(of_layer(self))

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        # evicted rows are written in the model's dtype, beside whole ones in the same tensor
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(attn_metadata, PseudoPassMetadata | EvictionMetadata):
            scales = output_scale, output_block_scale
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attention with eviction does not quantize its output")
        if isinstance(attn_metadata, PseudoPassMetadata):
            output.copy_(attn_metadata.attend(query, key, value, self.scale))
            return output
        rows, split = attn_metadata.rows, attn_metadata.rows.split
        reader = attn_metadata.bridge.readers[layer.layer_name]
        index = reader.layer
        if reader.writes:  # else the layer that does has run before
            attn_metadata.bridge.fill_holes(rows, index)
        if attn_metadata.whole is not None and split.whole is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata.whole, output)
        elif split.whole is not None:
            tokens = split.whole.tokens
            part_query = query[tokens]
            part = output.new_empty(len(part_query), *output.shape[1:])
            output[tokens] = super().forward(layer, part_query, key, value, kv_cache, attn_metadata.whole, part)
        for folded, launch in attn_metadata.launches:
            self._forward_folded(layer, folded, launch, index, query, attn_metadata.bridge, output)
        attn_metadata.bridge.remember(rows, reader, query)
        attn_metadata.bridge.observe(rows.prefills, reader, query, output, self.scale)
        return output

    def _forward_folded(
        self,
        layer: Any,
        folded: FoldedLaunch,
        launch: Any,
        index: int,
        query: torch.Tensor,
        bridge: EvictionBridge,
        output: torch.Tensor,
    ) -> None:
        """query, output: [num_tokens, num_heads, head_size]; heads of one KV head are neighbours."""
        by_head = (-1, self.num_queries_per_kv, self.head_size)  # [num_tokens * num_kv_heads, group, head_size]
        pages = PagesToRead(bridge.pool, *folded.pages.of(index), folded.max_kv_len)
        if self.sinks is not None and not self.weighs_sinks:
            self._attend_head_by_head(layer, query, pages, folded.queries, launch, output)
            return
        order = folded.queries.index
        if order is None:  # one query for each sequence; behind them there may be padding
            folded_query = query.reshape(by_head)[: len(pages.kv_lens)].contiguous()
            folded_output = output.view(by_head)[: len(pages.kv_lens)]
        else:
            folded_query = query.reshape(by_head).index_select(0, order)
            folded_output = torch.empty_like(folded_query)
        self.attend_folded(layer, folded_query, pages, folded.queries, launch, folded_output)
        if order is not None:
            output.view(by_head)[order] = folded_output

    def _attend_head_by_head(
        self,
        layer: Any,
        query: torch.Tensor,
        pages: PagesToRead,
        queries: FoldedQueries,
        launch: Any,
        output: torch.Tensor,
    ) -> None:
        """Launch the kernel once for each KV head, with the sinks of its query heads.

        query, output: [num_tokens, num_heads, head_size]
        """
        by_head = (self.num_kv_heads, self.num_queries_per_kv, -1)
        query, output = query.unflatten(1, by_head[:2]), output.view(-1, *by_head[:2], self.head_size)
        num_rows, tokens = len(queries.row_start_loc) - 1, queries.tokens
        table = pages.page_table.view(num_rows, self.num_kv_heads, -1)
        kv_lens = pages.kv_lens.view(num_rows, self.num_kv_heads).t().contiguous()
        if tokens is None:  # the first ones; behind them there may be padding
            num_tokens = num_rows * queries.max_query_len
            query, output = query[:num_tokens], output[:num_tokens]
        of_rows = FoldedQueries(None, queries.row_start_loc, queries.max_query_len, None, queries.row_start_loc)
        for head, sinks in enumerate(self.sinks.view(by_head[:2])):
            of_head = replace(pages, page_table=table[:, head], kv_lens=kv_lens[head])
            if tokens is None:
                self.attend_folded(layer, query[:, head], of_head, of_rows, launch, output[:, head], sinks)
                continue
            folded_query = query[tokens, head]
            folded_output = torch.empty_like(folded_query)
            self.attend_folded(layer, folded_query, of_head, of_rows, launch, folded_output, sinks)
            output[tokens, head] = folded_output

    def attend_folded(
        self,
        layer: Any,
        query: torch.Tensor,
        pages: PagesToRead,
        queries: FoldedQueries,
        launch: Any,
        output: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Run the backend's kernel over sequences of one KV head each; the last query sees the whole sequence.

        query, output: [num_queries, group, head_size], rows of equal distance; ``queries.query_start_loc`` says which
                       are whose
        launch:        what the metadata builder prepared
        sinks:         [group] of the KV head that all sequences are of; None: there are none, or the kernel weighs them
        """
        raise NotImplementedError
