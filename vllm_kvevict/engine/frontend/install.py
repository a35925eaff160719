"""Switch eviction on in a vLLM configuration, or refuse by name what it cannot work with."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import check_config
from vllm_kvevict.engine.frontend.flags import with_config, with_flags
from vllm_kvevict.engine.frontend.metrics import process_metrics, with_eviction_metrics
from vllm_kvevict.engine.frontend.needs import with_needs_known
from vllm_kvevict.engine.frontend.patches import Patch, apply_patches
from vllm_kvevict.engine.frontend.requests import (
    with_checked_body,
    with_checked_options,
    with_early_check,
    with_early_check_of_responses,
)
from vllm_kvevict.engine.refusals import WORKERS, of_config, refuse
from vllm_kvevict.engine.reserve import reserve_of
from vllm_kvevict.engine.settings import FIELD
from vllm_kvevict.engine.versions import check_version

logger = logging.getLogger("vllm.kvevict")

_DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 16}


def install_flags() -> None:
    """Wrap the methods of ``EngineArgs`` that read the command line and make the configuration."""
    apply_patches(_FLAG_PATCHES)


def with_eviction(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.create_engine_config``: check everything, then name our scheduler and worker."""

    @functools.wraps(create_engine_config)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        if FIELD not in (self.additional_config or {}):
            return create_engine_config(self, *args, **kwargs)
        check_version()
        config = EvictionConfig.parse(self.additional_config[FIELD])
        if self.block_size is None:
            self.block_size = _DEFAULT_BLOCK_SIZE.get(current_platform.device_type)
        vllm_config: VllmConfig = create_engine_config(self, *args, **kwargs)
        _switch_on(config, vllm_config)
        return vllm_config

    return wrapper


def _switch_on(config: EvictionConfig, vllm_config: VllmConfig) -> None:
    refuse(of_config(vllm_config))
    config.check_block_size(vllm_config.cache_config.block_size)
    method = config.method()
    reserve_of(vllm_config)
    check_config(config, vllm_config)
    suffix = "AsyncEvictionScheduler" if vllm_config.scheduler_config.async_scheduling else "EvictionScheduler"
    vllm_config.scheduler_config.scheduler_cls = f"vllm_kvevict.engine.scheduler.scheduler.{suffix}"
    parallel = vllm_config.parallel_config
    parallel.worker_cls = WORKERS[current_platform.device_name, parallel.worker_cls]
    apply_patches(_REQUEST_PATCHES)
    process_metrics().announce(config.policy, config.allocator_name)
    logger.info(
        "KV eviction is on: policy=%s, budget=%s, allocator=%s, num_sink=%d, num_recent=%d, during_decode=%s, "
        "during_prefill=%s, interval=%s, request_options=%s, block_size=%d",
        method.policy,
        config.budget,
        method.allocator,
        method.num_sink,
        method.num_recent,
        method.schedule.evicts_answer,
        method.schedule.between_chunks,
        config.interval or vllm_config.cache_config.block_size,
        config.request_options,
        vllm_config.cache_config.block_size,
    )
    if not current_platform.is_cpu():
        logger.warning(
            "An engine with KV eviction has not been run on a GPU yet, only its parts: how they go together was "
            "checked on CPU, through Triton's interpreter and against a reference of FlashAttention"
        )


_FLAG_PATCHES = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        with_flags,
        ("parser",),
        "plugins cannot add flags",
        "vLLM lets a general plugin add arguments to its parser",
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        with_config,
        ("args",),
        "unknown arguments are dropped",
        "vLLM hands a plugin's arguments to it",
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        with_eviction,
        (),
        "a plugin gets no configuration before the engine starts",
        "vLLM calls general plugins with the VllmConfig",
    ),
)

_REQUEST_PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        with_checked_options,
        ("request_id", "prompt", "params"),
        "a wrong request option must be a 400 and not an error inside the engine",
        "vLLM has a hook to validate vllm_xargs",
    ),
    Patch(
        "vllm.v1.engine.llm_engine:LLMEngine.add_request",
        with_needs_known,
        ("request_id", "prompt", "params"),
        "what a loaded model shows to policies is known to its workers only, when the engine runs",
        "engines tell their front ends what plugins of the workers found",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        with_early_check,
        ("prompt", "sampling_params"),
        "requests that stream are validated when their answer has begun: too late for a 400",
        "vLLM validates sampling parameters before it streams",
    ),
    Patch(
        "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses._generate_with_builtin_tools",
        with_early_check_of_responses,
        ("request_id", "engine_input", "sampling_params"),
        "it calls AsyncLLM.generate only when its stream has begun, or in the background",
        "vLLM validates sampling parameters before it streams",
    ),
    Patch(
        "vllm.entrypoints.generate.base.serving:GenerateBaseServing._check_model",
        with_checked_body,
        ("request",),
        "beam search drops vllm_xargs, so that no other check sees a wrong option there",
        "vLLM has a hook to validate vllm_xargs",
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        with_eviction_metrics,
        ("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        "stat logger plugins are not loaded by LLMEngine, and SchedulerStats carries no plugin data",
        "SchedulerStats has a field for plugins and both engines load stat logger plugins",
    ),
)
