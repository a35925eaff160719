"""KV-cache eviction for vLLM: any policy, any budget per layer and head, on an unmodified engine."""

from __future__ import annotations

import logging
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "kv_eviction_args", "register"]


def register() -> None:
    """Add our flags to vLLM. The entry point of ``vllm.general_plugins``: runs in every process, more than once.

    Without ``--kv-eviction`` nothing else of vLLM changes.
    """
    from vllm_kvevict.engine.frontend.install import install_flags

    install_flags()


def kv_eviction_args(policy: str, budget: int | float | str, **fields: Any) -> dict[str, Any]:
    """Return keyword arguments that switch eviction on: ``LLM(model, **kv_eviction_args("snapkv", budget=2048))``.

    policy: name of an eviction policy
    budget: tokens per KV head and layer (int), the fraction of every prompt that stays (float), or "auto"
    fields: any other field of ``vllm_kvevict.config.EvictionConfig``

    Raises ValueError for a value that is not allowed.
    """
    from vllm_kvevict.config import EvictionConfig

    config = EvictionConfig.parse({"policy": policy, "budget": budget, **fields})
    return {"additional_config": {"kv_eviction": config.model_dump(exclude_unset=True)}}


logging.getLogger(__name__).addHandler(logging.NullHandler())
