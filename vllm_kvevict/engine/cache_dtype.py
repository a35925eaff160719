"""KV cache dtypes beside the model's that eviction works with: fp8, with one scale per layer for K and one for V."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig

FLOAT8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def cache_dtypes(vllm_config: VllmConfig) -> list[str]:
    """Return the names of the dtypes that the KV caches of the model, and of its draft model, will have.

    A checkpoint may come with scales for an fp8 cache: vLLM's layers take fp8 then, where "auto" was asked for.
    """
    asked: str = vllm_config.cache_config.cache_dtype
    quantization: Any = vllm_config.quant_config  # of some kinds of checkpoints only has such a scheme
    if asked == "auto" and getattr(quantization, "kv_cache_scheme", None) is not None:
        asked = "fp8"
    drafts: str | None = getattr(vllm_config.speculative_config, "kv_cache_dtype", None)
    return [asked] if drafts is None else [asked, drafts]


def cache_of(layer: Any) -> torch.Tensor:
    """Return an attention layer's KV cache in the dtype of what it holds: vLLM allocates fp8 caches as uint8.

    vLLM's Triton attention stores the platform's fp8, its ``fp8_dtype``, whichever was asked for.
    """
    float8 = FLOAT8_DTYPES.get(layer.kv_cache_dtype)
    cache: torch.Tensor = layer.kv_cache
    return cache if float8 is None else cache.view(getattr(layer.impl, "fp8_dtype", float8))
