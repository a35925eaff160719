"""KV cache dtypes beside the model's that eviction works with: fp8, with one scale per layer for K and one for V."""

from __future__ import annotations

from typing import Any

import torch

FLOAT8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def cache_of(layer: Any) -> torch.Tensor:
    """Return an attention layer's KV cache in the dtype of what it holds: vLLM allocates fp8 caches as uint8.

    vLLM's Triton attention stores the platform's fp8, its ``fp8_dtype``, whichever was asked for.
    """
    float8 = FLOAT8_DTYPES.get(layer.kv_cache_dtype)
    cache: torch.Tensor = layer.kv_cache
    return cache if float8 is None else cache.view(getattr(layer.impl, "fp8_dtype", float8))
