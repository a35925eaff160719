"""What both workers with eviction share: a step begins with the scheduler's decisions and ends with compaction.

Imports nothing of vLLM's CPU worker, whose module replaces torch.cuda's streams, events and memory figures for the
whole process: a GPU worker could not start in it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.engine.cache_dtype import cache_of
from vllm_kvevict.engine.messages import REPORTS, EvictionReport
from vllm_kvevict.engine.models import MISSING_NEEDS, split_draft_layers
from vllm_kvevict.engine.scheduler.managers import (
    PrivateChunkedLocalSpec,
    PrivateSlidingWindowSpec,
    with_eviction_managers,
)
from vllm_kvevict.engine.settings import eviction_config
from vllm_kvevict.engine.worker.backends.base import EvictionMetadataBuilder
from vllm_kvevict.engine.worker.bridge import EvictionBridge
from vllm_kvevict.engine.worker.draft import DraftBridge
from vllm_kvevict.engine.worker.evicted_part import evicted_part
from vllm_kvevict.engine.worker.sharing import sharing_targets
from vllm_kvevict.engine.worker.side_memory import ModelMemory, SideMemory, is_evicted
from vllm_kvevict.engine.worker.warm_up import register
from vllm_kvevict.engine.worker.whole_rows import check_fields
from vllm_kvevict.kernels import native

_NOT_EVICTED = PrivateSlidingWindowSpec, PrivateChunkedLocalSpec

logger = logging.getLogger("vllm.kvevict")


class EvictionWorkerMixin(Worker):
    """Wires the attention builders to an ``EvictionBridge`` and wraps each step.

    A step without the scheduler's decisions is an error: a lost attribute must not become a silent no-op. Only where
    vLLM's worker makes up steps by itself, such as its warm-up, there are none; ``_is_on_its_own`` is set there.
    """

    _is_on_its_own = False
    side_memory: SideMemory | None = None

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Return vLLM's specs; those of chunked layers, which no backend is asked about, in our words."""
        specs = super().get_kv_cache_spec()
        is_chunked = {name for name, spec in specs.items() if isinstance(spec, ChunkedLocalAttentionSpec)}
        return {name: with_eviction_managers(spec) if name in is_chunked else spec for name, spec in specs.items()}

    def init_device(self) -> None:
        native.check(torch.device(self.device_config.device_type))
        super().init_device()

    def take_memory(self) -> None:
        """The model is loaded: take what does not grow with the cache, so that vLLM measures it.

        Nothing is taken for a model without layers that are evicted, which is refused once vLLM has grouped them.
        """
        config, runner = eviction_config(self.vllm_config), self.model_runner
        all_specs = self.get_kv_cache_spec()
        specs = {name: spec for name, spec in all_specs.items() if is_evicted(spec)}
        layer_names, draft_names = split_draft_layers(list(specs))
        if config is None or not layer_names:
            return
        models = [(layer_names, runner.get_model())]
        if draft_names:
            models.append((draft_names, runner.get_draft_model()))
        taken = [
            ModelMemory.take(
                self.vllm_config,
                config,
                {name: specs[name] for name in names},
                model,
                runner.device,
                sharing_targets(self.vllm_config, names),
            )
            for names, model in models
        ]
        self.side_memory = SideMemory(self.vllm_config, config, taken)
        setattr(self.vllm_config, MISSING_NEEDS, self.missing_needs())
        if is_global_first_rank():
            of_model, _ = split_draft_layers(list(all_specs))
            logger.info("%s", evicted_part({name: all_specs[name] for name in of_model}, self.vllm_config))

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        check_fields()
        super().initialize_from_config(kv_cache_config)
        names = _evicted_layers(kv_cache_config)
        sharing = sharing_targets(self.vllm_config, names).keys()  # which vLLM puts into the group of their targets
        layer_names, draft_names = split_draft_layers([name for name in names if name not in sharing])
        if self.side_memory is None:
            raise RuntimeError(f"no memory was taken for layers that are evicted: {layer_names}")
        runner, pools = self.model_runner, [self._pool(names) for names in (layer_names, draft_names) if names]
        held = self.side_memory.held(pools, kv_cache_config.num_blocks)
        self.eviction = EvictionBridge(runner, pools[0], layer_names, held[0])
        self.draft_eviction: DraftBridge | None = None
        self._reports: dict[str, EvictionReport] = {}
        self._wire(self.eviction, runner.attn_groups)
        register(runner, self.eviction.pool, layer_names, held[0].weights, held[0].readers)
        if draft_names:
            self.draft_eviction = DraftBridge(runner, pools[1], draft_names, held[1], self.eviction)
            v1_drafter = getattr(runner, "drafter", None)
            groups = runner.speculator.attn_groups if v1_drafter is None else [v1_drafter.draft_attn_groups]
            self._wire(self.draft_eviction, groups)
            register(runner, pools[1], draft_names, held[1].weights, held[1].readers)

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
        """Return what vLLM finds for the cache, less what eviction holds beside it. A size that the user gave stays.

        Raises ValueError if the device has no room for what is held beside that.
        """
        with self._on_its_own():
            available: int = super().determine_available_memory()
        if self.side_memory is None:
            return available
        if self.cache_config.kv_cache_memory_bytes:
            self.side_memory.check(available, *self.memory_left())
            return available
        return self.with_side_memory(available, self.side_memory)

    def memory_left(self) -> tuple[int, int]:
        """Return the bytes that are free on the device, and of these, those within what vLLM was told to use."""
        raise NotImplementedError

    def with_side_memory(self, available: int, side_memory: SideMemory) -> int:
        """Return how much of what is available the cache can have."""
        cache_bytes = side_memory.cache_bytes(available)
        logger.info(
            "Available KV cache memory beside what eviction holds: %.2f GiB of %.2f GiB",
            cache_bytes / 2**30,
            available / 2**30,
        )
        return cache_bytes

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

    def missing_needs(self) -> dict[str, str]:
        """Return what policies cannot be handed of the models, by the names of the needs, and why not."""
        weights = [] if self.side_memory is None else [memory.weights for memory in self.side_memory.models]
        return {need: why for of_model in weights for need, why in of_model.missing.items()}

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

    Raises ValueError for a model with several such groups, or with others beside it than windows and chunks.
    """
    groups = kv_cache_config.kv_cache_groups
    evicted = [group for group in groups if is_evicted(group.kv_cache_spec)]
    others = [group.kv_cache_spec for group in groups if group not in evicted]
    if len(evicted) != 1 or not all(isinstance(spec, _NOT_EVICTED) for spec in others):
        found = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise ValueError(
            f"--kv-eviction needs a model with one cache group of full attention, and at most sliding windows and "
            f"chunks beside it; got {found}. Use another model, or leave --kv-eviction out"
        )
    return list(evicted[0].layer_names)
