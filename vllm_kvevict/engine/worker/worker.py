"""What both workers with eviction share: a step begins with the scheduler's decisions and ends with compaction.

Imports nothing of vLLM's CPU worker, whose module replaces torch.cuda's streams, events and memory figures for the
whole process: a GPU worker could not start in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.engine.cache_dtype import cache_of
from vllm_kvevict.engine.messages import REPORTS, EvictionReport
from vllm_kvevict.engine.models import split_draft_layers
from vllm_kvevict.engine.scheduler.managers import EvictionSpec, PrivateSlidingWindowSpec
from vllm_kvevict.engine.settings import eviction_config
from vllm_kvevict.engine.worker.backends.base import EvictionMetadataBuilder
from vllm_kvevict.engine.worker.bridge import EvictionBridge
from vllm_kvevict.engine.worker.draft import DraftBridge
from vllm_kvevict.engine.worker.warm_up import register
from vllm_kvevict.engine.worker.whole_rows import check_fields
from vllm_kvevict.kernels import native


class EvictionWorkerMixin(Worker):
    """Wires the attention builders to an ``EvictionBridge`` and wraps each step.

    A step without the scheduler's decisions is an error: a lost attribute must not become a silent no-op. Only where
    vLLM's worker makes up steps by itself, such as its warm-up, there are none; ``_is_on_its_own`` is set there.
    """

    _is_on_its_own = False

    def init_device(self) -> None:
        native.check(torch.device(self.device_config.device_type))
        super().init_device()

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        check_fields()
        super().initialize_from_config(kv_cache_config)
        layer_names, draft_names = split_draft_layers(_evicted_layers(kv_cache_config))
        runner, max_num_reqs = self.model_runner, self.vllm_config.scheduler_config.max_num_seqs
        self.eviction = EvictionBridge(runner, self._pool(layer_names), layer_names, max_num_reqs)
        self.draft_eviction: DraftBridge | None = None
        self._reports: dict[str, EvictionReport] = {}
        self._wire(self.eviction, runner.attn_groups)
        register(runner, self.eviction.pool, layer_names, runner.get_model())
        if draft_names:
            pool = self._pool(draft_names)
            self.draft_eviction = DraftBridge(runner, pool, draft_names, max_num_reqs, self.eviction)
            v1_drafter = getattr(runner, "drafter", None)
            groups = runner.speculator.attn_groups if v1_drafter is None else [v1_drafter.draft_attn_groups]
            self._wire(self.draft_eviction, groups)
            register(runner, pool, draft_names, runner.get_draft_model())

    def _pool(self, layer_names: list[str]) -> PagePool:
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in layer_names]
        packing = layers[0].get_attn_backend().packing_of(layers[0])
        pool = PagePool.from_layers([cache_of(layer) for layer in layers], packing)
        config = eviction_config(self.vllm_config)
        if config is not None:
            config.method().allocator.check_model(pool.num_layers, pool.num_kv_heads)
        return pool

    def _wire(self, bridge: EvictionBridge, attn_groups: list[list[Any]]) -> None:
        """Hand ``bridge`` to the one metadata builder that serves all of its layers."""
        groups = [group for groups in attn_groups for group in groups]
        evicted = [group for group in groups if bridge.layer_index.keys() & set(group.layer_names)]
        builders = [builder for group in evicted for builder in group.metadata_builders]
        block_size = bridge.pool.block_size
        if len(builders) != 1 or not isinstance(builders[0], EvictionMetadataBuilder):
            raise RuntimeError(f"expected one attention metadata builder for evicted layers, ours; got {builders}")
        if builders[0].block_size != block_size:
            raise RuntimeError(f"vLLM splits blocks of {builders[0].block_size} tokens into blocks of {block_size}")
        builders[0].bridge = bridge

    @contextmanager
    def _on_its_own(self) -> Iterator[None]:
        """Steps inside this context come from vLLM's worker itself, and no scheduler has decided anything for them."""
        before, self._is_on_its_own = self._is_on_its_own, True
        for bridge in self._bridges:  # a step that sampled nothing has not ended for a drafter
            bridge.forget_step()
        try:
            yield
        finally:
            self._is_on_its_own = before

    def determine_available_memory(self) -> int:
        with self._on_its_own():
            return super().determine_available_memory()

    def compile_or_warm_up_model(self) -> Any:
        with self._on_its_own():
            return super().compile_or_warm_up_model()

    def execute_dummy_batch(self) -> None:
        with self._on_its_own():
            super().execute_dummy_batch()

    def sleep(self, *args: Any, **kwargs: Any) -> None:
        with self._on_its_own():
            super().sleep(*args, **kwargs)

    def wake_up(self, *args: Any, **kwargs: Any) -> None:
        with self._on_its_own():
            super().wake_up(*args, **kwargs)

    @property
    def _bridges(self) -> list[EvictionBridge]:
        """Of the model, and of its draft model if it has one; none before there is a cache."""
        bridges = [getattr(self, name, None) for name in ("eviction", "draft_eviction")]
        return [bridge for bridge in bridges if bridge is not None]

    def _forget_weights(self) -> None:
        for bridge in self._bridges:
            bridge.forget_weights()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        super().reload_weights(*args, **kwargs)
        self._forget_weights()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._forget_weights()

    @torch.inference_mode()  # as vLLM's own: a tensor that is made in it can be changed only in it
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if self._is_on_its_own:
            return super().execute_model(scheduler_output)
        for bridge in self._bridges:
            bridge.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        self._reports = self.eviction.end_step()
        return self._with_reports(output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if self._is_on_its_own:
            return output
        if self.draft_eviction is not None:
            for req_id, seconds in self.draft_eviction.evict().items():
                report = self._reports[req_id]
                self._reports[req_id] = replace(report, seconds=report.seconds + seconds)
        return self._with_reports(output)

    def _with_reports(self, output: Any) -> Any:
        """Attach this step's reports to whichever of the two calls returns the step's output."""
        if output is None or not self._reports:
            return output
        reports, self._reports = self._reports, {}
        if isinstance(output, AsyncModelRunnerOutput):
            return _AsyncOutputWithReports(output, reports)
        setattr(output, REPORTS, reports)
        return output


class _AsyncOutputWithReports(AsyncModelRunnerOutput):
    def __init__(self, output: AsyncModelRunnerOutput, reports: dict[str, EvictionReport]) -> None:
        self._output = output
        self._reports = reports

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        setattr(output, REPORTS, self._reports)
        return output

    def get_kv_connector_output(self) -> Any:
        return self._output.get_kv_connector_output()  # from 0.33 on


def _evicted_layers(kv_cache_config: KVCacheConfig) -> list[str]:
    """Return the layers of the one cache group with full attention, in the order of its cache.

    Raises ValueError for a model with several such groups, or with others beside it than sliding windows.
    """
    groups = kv_cache_config.kv_cache_groups
    evicted = [group for group in groups if _is_full_attention(group.kv_cache_spec)]
    others = [group for group in groups if group not in evicted]
    if len(evicted) != 1 or not all(isinstance(group.kv_cache_spec, PrivateSlidingWindowSpec) for group in others):
        found = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise ValueError(
            f"--kv-eviction needs a model with one cache group of full attention, and at most sliding windows beside "
            f"it; got {found}. Use another model, or leave --kv-eviction out"
        )
    return list(evicted[0].layer_names)


def _is_full_attention(spec: Any) -> bool:
    if isinstance(spec, UniformTypeKVCacheSpecs):  # a draft model's heads may differ from its target's
        return all(_is_full_attention(layer_spec) for layer_spec in spec.kv_cache_specs.values())
    # without the hybrid manager, vLLM puts layers with a window into the group of full attention
    return isinstance(spec, EvictionSpec) and spec.sliding_window is None
