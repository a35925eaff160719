"""Decode steps as full CUDA graphs on model runner V2: which steps are replayed, and by which of two captured sets.

A graph launches what it launched when it was captured. So there are two of each size: those of the stock set leave
vLLM's metadata as they are, and serve batches without an evicted request at the speed of vLLM; those of the folded set
serve all others, in which whole rows are folded as well. What needs our Python is in neither: such a step is piecewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_kvevict.engine.worker.backends.base import EvictionMetadataBuilder
from vllm_kvevict.engine.worker.bridge import EvictionBridge

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(frozen=True)
class FoldedDescriptor(BatchExecutionDescriptor):
    """Of a graph of the folded set, which vLLM's dispatcher never chooses."""

    @classmethod
    def of(cls, desc: BatchExecutionDescriptor) -> FoldedDescriptor:
        return cls(**{field.name: getattr(desc, field.name) for field in fields(desc)})


def _is_folded(desc: BatchExecutionDescriptor) -> bool:
    return isinstance(desc, FoldedDescriptor)


class EvictionGraphManager(ModelCudaGraphManager):
    """vLLM's graph manager with two graphs for each size; a replay takes the one that its metadata were built for."""

    builders: Sequence[EvictionMetadataBuilder]
    _capture_descs: dict[CUDAGraphMode, list[BatchExecutionDescriptor]]

    @classmethod
    def in_place_of(
        cls, manager: ModelCudaGraphManager, builders: Sequence[EvictionMetadataBuilder]
    ) -> EvictionGraphManager:
        ours = cls(
            manager.vllm_config,
            manager.device,
            manager.cudagraph_mode,
            manager.decode_query_len,
            lora_capture_cases=manager.lora_capture_cases,
            varlen_decode=manager.varlen_decode,
            ubatch_runner=manager.ubatch_runner,
        )
        ours.builders = builders
        return ours

    def _init_candidates(self) -> None:
        """vLLM captures these, and counts them when it estimates their memory."""
        super()._init_candidates()
        stock = self._capture_descs.get(CUDAGraphMode.FULL)
        if stock is not None:
            self._capture_descs[CUDAGraphMode.FULL] = [*stock, *map(FoldedDescriptor.of, stock)]

    def capture(self, *args: Any, **kwargs: Any) -> None:
        descs = self._capture_descs
        try:
            for is_folded in (False, True):
                of_set = {mode: [each for each in descs[mode] if _is_folded(each) == is_folded] for mode in descs}
                self._capture_descs = {mode: those for mode, those in of_set.items() if those}
                set_replayed(self.builders, is_folded)
                super().capture(*args, **kwargs)
        finally:
            self._capture_descs = descs
            set_replayed(self.builders, False)

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        is_folded = any(builder.is_folded for builder in self.builders)
        return super().run_fullgraph(FoldedDescriptor.of(desc) if is_folded else desc)


class EvictionModelRunner(GPUModelRunner):
    """vLLM's model runner V2 that knows which steps no graph can stand for."""

    _eviction_builders: Sequence[EvictionMetadataBuilder] = ()  # before there is a cache

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        groups = [group for groups in self.attn_groups for group in groups]
        found = [builder for group in groups for builder in group.metadata_builders]
        self._eviction_builders = [builder for builder in found if isinstance(builder, EvictionMetadataBuilder)]
        manager: ModelCudaGraphManager = self.cudagraph_manager
        self.cudagraph_manager: Any = EvictionGraphManager.in_place_of(manager, self._eviction_builders)

    def profile_cudagraph_memory(self) -> int:
        """Both sets count. There is no page table yet, so that those of the folded set are as large as stock ones."""
        try:
            return super().profile_cudagraph_memory()
        finally:
            self._eviction_builders = ()  # of a cache that was thrown away

    def gather_batch_req_state(self, scheduler_output: SchedulerOutput, dummy_run: bool) -> tuple[Any, int | None]:
        set_replayed(self._eviction_builders, False)
        batch, uniform_count = super().gather_batch_req_state(scheduler_output, dummy_run)
        bridges = [builder.bridge for builder in self._eviction_builders if builder.bridge is not None]
        if batch is not None and any(needs_python(bridge, batch.req_ids) for bridge in bridges):
            # no full graph fits a batch without one, and data-parallel ranks agree on what is left
            return batch, None
        return batch, uniform_count

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: Any,
        batch_desc: BatchExecutionDescriptor,
        num_active_loras: int,
    ) -> Any:
        set_replayed(self._eviction_builders, batch_desc.cg_mode == CUDAGraphMode.FULL)
        return super().prepare_inputs(scheduler_output, batch_req_state, batch_desc, num_active_loras)


def set_replayed(builders: Sequence[EvictionMetadataBuilder], is_replayed: bool) -> None:
    for builder in builders:
        builder.is_replayed = is_replayed


def needs_python(bridge: EvictionBridge, req_ids: list[str]) -> bool:
    """Return whether more than attention is to be done in a step of these requests."""
    if bridge.step.is_over:  # vLLM's worker has made it up
        return False
    decided = {*bridge.step.decisions.prefilling, *bridge.step.decisions.planned}
    return any(
        req_id in decided
        or req_id in bridge.ring.slots
        or (req_id in bridge.page_table and bridge.page_table.replaces(req_id))
        for req_id in req_ids
    )
