"""What of a model is evicted, in one line for whoever starts it."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.engine.worker.side_memory import is_evicted


def evicted_part(specs: Mapping[str, KVCacheSpec], vllm_config: VllmConfig) -> str:
    """Return how many layers and KV heads are evicted, and which part of the KV cache of the longest prompt they hold.

    specs: of the cache of every attention layer of a model, by its name; some of them are evicted
    """
    evicted = [spec for spec in specs.values() if is_evicted(spec)]
    longest = vllm_config.model_config.max_model_len

    def held(spec: KVCacheSpec) -> int:
        whole = cdiv(longest, spec.block_size) * spec.page_size_bytes
        return whole if is_evicted(spec) else min(whole, spec.max_memory_usage_bytes(vllm_config))

    share = sum(map(held, evicted)) / sum(map(held, specs.values()))
    heads = " or ".join(map(str, sorted({getattr(spec, "num_kv_heads", 0) for spec in evicted})))
    return (
        f"KV eviction: {len(evicted)} of {len(specs)} layers with a cache are evicted, those with full attention, "
        f"{heads} KV heads of each in this worker; they hold {share:.0%} of the cache of a prompt of {longest} tokens"
    )
