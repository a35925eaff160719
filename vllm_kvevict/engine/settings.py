"""Where the eviction config travels in vLLM's own."""

from __future__ import annotations

from vllm.config import VllmConfig

from vllm_kvevict.config import EvictionConfig

FIELD = "kv_eviction"


def eviction_config(vllm_config: VllmConfig) -> EvictionConfig | None:
    """Return the eviction config that travels in ``vllm_config``, None if eviction is off."""
    additional = vllm_config.additional_config
    values = additional.get(FIELD) if isinstance(additional, dict) else None
    return None if values is None else EvictionConfig.parse(values)
