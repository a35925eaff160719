"""What eviction does not work with, by name and with the remedy: of a configuration, and of a layer once it is built.

Beside these a request or a policy may be refused (checks.py, models.py), and an attention backend (backends).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kvevict.engine.cache_dtype import FLOAT8_DTYPES
from vllm_kvevict.engine.models import evicted_models, num_sharing

# (platform, its worker) -> ours
WORKERS = {
    ("cpu", "vllm.v1.worker.cpu_worker.CPUWorker"): "vllm_kvevict.engine.worker.cpu_worker.EvictionCPUWorker",
    ("cuda", "vllm.v1.worker.gpu_worker.Worker"): "vllm_kvevict.engine.worker.gpu_worker.EvictionGPUWorker",
    ("rocm", "vllm.v1.worker.gpu_worker.Worker"): "vllm_kvevict.engine.worker.gpu_worker.EvictionGPUWorker",
}
_SPECULATION = ("ngram", "draft_model")


class Refusal(NamedTuple):
    """Something that eviction does not work with, whether it is there, and what to do then."""

    name: str
    is_there: bool
    remedy: str


def refuse(refusals: Iterable[Refusal]) -> None:
    """Raise ValueError for the first that is there."""
    for name, is_there, remedy in refusals:
        if is_there:
            raise ValueError(f"--kv-eviction does not work with {name}; {remedy} or leave --kv-eviction out")


def of_layer(impl: Any) -> list[Refusal]:
    """Return what an attention layer with full attention may have that is refused.

    impl: vLLM's ``AttentionImpl`` of it
    """
    return [Refusal("ALiBi", impl.alibi_slopes is not None, "use another model")]


def of_config(vllm_config: VllmConfig) -> list[Refusal]:
    """Return what a configuration may say that is refused."""
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
        Refusal(
            f"the worker {parallel.worker_cls} on the {platform} platform",
            (platform, parallel.worker_cls) not in WORKERS,
            "use vLLM's own worker on CPU, CUDA or ROCm",
        ),
        Refusal(f"the scheduler {scheduler.scheduler_cls!r}", not ours, "drop --scheduler-cls"),
        Refusal("multi-head latent attention (MLA)", any(each.use_mla for each in models), "use another model"),
        Refusal("encoder-decoder models", model.is_encoder_decoder, "use a decoder-only model"),
        Refusal("pooling models", model.runner_type == "pooling", "use a generating model"),
        Refusal("models without attention", model.is_attention_free, "use another model"),
        Refusal("hybrid models with recurrent layers", model.is_hybrid, "use another model"),
        Refusal(
            f"speculative decoding by {speculation}",
            speculation not in (None, *_SPECULATION),
            f"use one of the methods {', '.join(_SPECULATION)}",
        ),
        Refusal("context parallelism", parallel.decode_context_parallel_size > 1, "use -dcp 1"),
        Refusal("context parallelism", parallel.prefill_context_parallel_size > 1, "use -pcp 1"),
        Refusal("microbatching (DBO)", parallel.use_ubatching, "drop --enable-dbo and --ubatch-size"),
        Refusal("KV connectors", vllm_config.kv_transfer_config is not None, "drop --kv-transfer-config"),
        Refusal(
            f"a KV cache of {cache.cache_dtype} for a model in {dtype}",
            cache.cache_dtype not in ("auto", dtype, *FLOAT8_DTYPES),
            "use --kv-cache-dtype auto or fp8,",
        ),
        Refusal(
            f"a draft model's KV cache of {drafts}",
            drafts not in (None, "auto", dtype, *FLOAT8_DTYPES),
            "use auto or fp8 for kv_cache_dtype in --speculative-config,",
        ),
        Refusal(
            "fast prefill, which drops the queries of layers that share the keys and values of others",
            cache.kv_sharing_fast_prefill,
            "drop --kv-sharing-fast-prefill",
        ),
        Refusal(
            "a draft model with layers that share the keys and values of others",
            any(map(num_sharing, models[1:])),
            "use another draft model",
        ),
        Refusal(
            "layers whose KV cache has another dtype",
            bool(cache.kv_cache_dtype_skip_layers),
            "drop --kv-cache-dtype-skip-layers",
        ),
        Refusal(
            f"a head size of {head_size} on CPU",
            is_cpu and head_size % 32 != 0,
            "use a model whose head size is a multiple of 32",
        ),
        Refusal(
            f"a block size of {cache.block_size} on CPU",
            is_cpu and cache.block_size % 32 != 0,
            "use a --block-size that is a multiple of 32",
        ),
    ]
