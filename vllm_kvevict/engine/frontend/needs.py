"""What a loaded model does not show to policies: only its workers know, so a front end asks them once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm.config import VllmConfig

from vllm_kvevict.engine.models import MISSING_NEEDS
from vllm_kvevict.engine.settings import eviction_config
from vllm_kvevict.options.names import is_ours

_METHOD = "missing_needs"  # of our worker


async def ask(engine_client: Any, options: Mapping[str, Any]) -> None:
    """Ask the workers behind an ``AsyncLLM``, if a request with these options is the first that has to know."""
    if _is_unknown(engine_client.vllm_config, options):
        _note(engine_client.vllm_config, await engine_client.collective_rpc(_METHOD))


def with_needs_known(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``LLMEngine.add_request``: ask the workers before the first request that has to know."""

    @functools.wraps(add_request)
    def wrapper(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_unknown(self.vllm_config, getattr(params, "extra_args", None) or {}):
            _note(self.vllm_config, self.collective_rpc(_METHOD))
        return add_request(self, request_id, prompt, params, *args, **kwargs)

    return wrapper


def _is_unknown(vllm_config: VllmConfig, options: Mapping[str, Any]) -> bool:
    """Whether a request chooses for itself, and nobody has asked yet."""
    is_asked = MISSING_NEEDS in vars(vllm_config)
    return not is_asked and eviction_config(vllm_config) is not None and any(map(is_ours, options))


def _note(vllm_config: VllmConfig, of_workers: Iterable[Mapping[str, str]]) -> None:
    """Keep with the configuration what any worker misses."""
    missing = {need: why for of_worker in of_workers for need, why in of_worker.items()}
    setattr(vllm_config, MISSING_NEEDS, missing)
