"""Switch eviction on in a vLLM configuration, or refuse by name what it cannot work with."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.cache_dtype import FLOAT8_DTYPES
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
from vllm_kvevict.engine.models import evicted_models, num_sharing
from vllm_kvevict.engine.reserve import reserve_of
from vllm_kvevict.engine.settings import FIELD
from vllm_kvevict.engine.versions import check_version

logger = logging.getLogger("vllm.kvevict")

# (platform, its worker) -> ours
_WORKERS = {
    ("cpu", "vllm.v1.worker.cpu_worker.CPUWorker"): "vllm_kvevict.engine.worker.cpu_worker.EvictionCPUWorker",
    ("cuda", "vllm.v1.worker.gpu_worker.Worker"): "vllm_kvevict.engine.worker.gpu_worker.EvictionGPUWorker",
}
_SPECULATION = ("ngram", "draft_model")
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
    refuse_unsupported(vllm_config)
    config.check_block_size(vllm_config.cache_config.block_size)
    method = config.method()
    reserve_of(vllm_config)
    check_config(config, vllm_config)
    suffix = "AsyncEvictionScheduler" if vllm_config.scheduler_config.async_scheduling else "EvictionScheduler"
    vllm_config.scheduler_config.scheduler_cls = f"vllm_kvevict.engine.scheduler.scheduler.{suffix}"
    parallel = vllm_config.parallel_config
    parallel.worker_cls = _WORKERS[current_platform.device_name, parallel.worker_cls]
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


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise ValueError that names the first feature in ``vllm_config`` that eviction does not work with."""
    for name, is_on, remedy in _unsupported(vllm_config):
        if is_on:
            raise ValueError(f"--kv-eviction does not work with {name}; {remedy} or leave --kv-eviction out")


def _unsupported(vllm_config: VllmConfig) -> list[tuple[str, bool, str]]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    models = evicted_models(vllm_config)
    head_size = max((each.get_head_size() for each in models), key=lambda size: size % 32)
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    platform, is_cpu = current_platform.device_name, current_platform.is_cpu()
    dtype = str(model.dtype).removeprefix("torch.")
    speculation = getattr(vllm_config.speculative_config, "method", None)
    drafts = getattr(vllm_config.speculative_config, "kv_cache_dtype", None)
    ours = scheduler.scheduler_cls is None or "vllm_kvevict" in str(scheduler.scheduler_cls)
    return [
        (
            f"the worker {parallel.worker_cls} on the {platform} platform",
            (platform, parallel.worker_cls) not in _WORKERS,
            "use vLLM's own worker on CPU or CUDA",
        ),
        (f"the scheduler {scheduler.scheduler_cls!r}", not ours, "drop --scheduler-cls"),
        ("multi-head latent attention (MLA)", any(each.use_mla for each in models), "use another model"),
        ("encoder-decoder models", model.is_encoder_decoder, "use a decoder-only model"),
        ("pooling models", model.runner_type == "pooling", "use a generating model"),
        ("models without attention", model.is_attention_free, "use another model"),
        ("hybrid models with recurrent layers", model.is_hybrid, "use another model"),
        (
            f"speculative decoding by {speculation}",
            speculation not in (None, *_SPECULATION),
            f"use one of the methods {', '.join(_SPECULATION)}",
        ),
        ("context parallelism", parallel.decode_context_parallel_size > 1, "use -dcp 1"),
        ("context parallelism", parallel.prefill_context_parallel_size > 1, "use -pcp 1"),
        ("microbatching (DBO)", parallel.use_ubatching, "drop --enable-dbo and --ubatch-size"),
        ("KV connectors", vllm_config.kv_transfer_config is not None, "drop --kv-transfer-config"),
        (
            f"a KV cache of {cache.cache_dtype} for a model in {dtype}",
            cache.cache_dtype not in ("auto", dtype, *FLOAT8_DTYPES),
            "use --kv-cache-dtype auto or fp8,",
        ),
        (
            f"a draft model's KV cache of {drafts}",
            drafts not in (None, "auto", dtype, *FLOAT8_DTYPES),
            "use auto or fp8 for kv_cache_dtype in --speculative-config,",
        ),
        (
            "fast prefill, which drops the queries of layers that share the keys and values of others",
            cache.kv_sharing_fast_prefill,
            "drop --kv-sharing-fast-prefill",
        ),
        (
            "a draft model with layers that share the keys and values of others",
            any(map(num_sharing, models[1:])),
            "use another draft model",
        ),
        (
            "layers whose KV cache has another dtype",
            bool(cache.kv_cache_dtype_skip_layers),
            "drop --kv-cache-dtype-skip-layers",
        ),
        (
            f"a head size of {head_size} on CPU",
            is_cpu and head_size % 32 != 0,
            "use a model whose head size is a multiple of 32",
        ),
        (
            f"a block size of {cache.block_size} on CPU",
            is_cpu and cache.block_size % 32 != 0,
            "use a --block-size that is a multiple of 32",
        ),
    ]


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
