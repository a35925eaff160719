"""vLLM's CPU attention for whole rows, and the same kernel over folded page tables for evicted ones."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import Packing
from vllm_kvevict.engine.cache_dtype import FLOAT8_DTYPES
from vllm_kvevict.engine.scheduler.managers import EvictionSpec
from vllm_kvevict.engine.worker.backends.base import (
    EvictionBackend,
    EvictionImpl,
    EvictionMetadataBuilder,
    PagesToRead,
    backend_in_place_of,
)
from vllm_kvevict.engine.worker.rows import FoldedLaunch, FoldedQueries

# how pages are packed under the instruction sets of vLLM's kernel that we know; "vec" runs on every machine
_PACKINGS: dict[str, Packing] = {"vec": "transposed", "amx": "tiled"}


@dataclass(frozen=True)
class SchedulerMetadata:
    """The kernel's division of labour over the folded rows of each layer.

    shared: the one that serves every layer, where all have the same lengths; None if a layer makes its own
    """

    builder: EvictionCPUMetadataBuilder
    shared: torch.Tensor | None

    def of(self, kv_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """Return the one of the layer whose folded rows have these lengths, [num_sequences] int32."""
        return self.builder.scheduler_metadata_of(kv_lens, query_start_loc) if self.shared is None else self.shared


class EvictionCPUMetadataBuilder(EvictionMetadataBuilder, CPUAttentionMetadataBuilder):
    """Makes the kernel's scheduler metadata of the folded rows."""

    isa: str
    # whether the layers of the last rows held equally many tokens, which those of other rows, or behind another
    # eviction, may not
    _known: tuple[np.ndarray, int, bool] | None = None

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *args, **kwargs)
        # the packing of 8-bit floats for AMX is another one
        if isinstance(kv_cache_spec, EvictionSpec) and (self.isa != "amx" or self.kv_cache_dtype in FLOAT8_DTYPES):
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)

    def _launch(self, folded: FoldedLaunch) -> SchedulerMetadata:
        """Uniform budgets: one serves every layer. Ragged ones: a layer makes its own when it runs."""
        if self.bridge is None or not self._are_alike(folded.slots, self.bridge.page_table):
            return SchedulerMetadata(self, None)
        _, kv_lens = folded.pages.of(0)
        return SchedulerMetadata(self, self.scheduler_metadata_of(kv_lens, folded.queries.query_start_loc))

    def _are_alike(self, slots: np.ndarray, page_table: PageTable) -> bool:
        known = self._known
        if known is None or known[0] is not slots or known[1] != page_table.generation:
            known = self._known = slots, page_table.generation, page_table.are_alike(slots)
        return known[2]

    def scheduler_metadata_of(self, kv_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
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


class EvictionCPUImpl(EvictionImpl, CPUAttentionBackendImpl):
    """vLLM's C++ kernel."""

    def attend_folded(
        self,
        layer: Any,
        query: torch.Tensor,
        pages: PagesToRead,
        queries: FoldedQueries,
        launch: SchedulerMetadata,
        output: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if sinks is None:
            schedule = launch.of(pages.kv_lens, queries.query_start_loc)
        else:  # of the rows of one KV head
            schedule = launch.builder.scheduler_metadata_of(pages.kv_lens, queries.query_start_loc)
        # the dtype that vLLM allocated, which for an fp8 cache is uint8
        elements, block_size = pages.pool.pages.view(layer.kv_cache.dtype), pages.pool.block_size
        key_cache, value_cache = elements.view(-1, 1, 2 * block_size, self.head_size).chunk(2, dim=2)
        rows = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
        ops.cpu_attention_with_kv_cache(
            query=query.contiguous(),
            key_cache=key_cache,
            value_cache=value_cache,
            output=rows,
            query_start_loc=queries.query_start_loc,
            seq_lens=pages.kv_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=pages.page_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=schedule,
            s_aux=None if sinks is None or sinks.dtype == torch.bfloat16 else sinks.float(),
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        if rows is not output:
            output.copy_(rows)


class EvictionCPUBackend(EvictionBackend, CPUAttentionBackend):
    """vLLM's CPU attention with eviction."""

    impl = EvictionCPUImpl
    builder = EvictionCPUMetadataBuilder
    packing: ClassVar[Packing] = "transposed"

    @classmethod
    def packing_of(cls, layer: Any) -> Packing:
        return _PACKINGS[layer.isa]


def cpu_backend() -> AbstractContextManager[None]:
    """Layers built inside this context use our backend, which the CPU platform finds under vLLM's own name."""
    return backend_in_place_of(AttentionBackendEnum.CPU_ATTN, EvictionCPUBackend)
