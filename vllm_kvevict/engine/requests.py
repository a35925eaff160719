"""Per-request options: ``vllm_xargs={"kv_eviction": ..., "kv_budget": ..., ...}``, wrong ones refused with a 400."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_kvevict.config import REQUEST_DURING_DECODE, REQUEST_OPTIONS, REQUEST_POLICY, EvictionConfig
from vllm_kvevict.engine.flags import FIELD
from vllm_kvevict.engine.metrics import process_metrics
from vllm_kvevict.engine.model import check_needs, evicted_models


def request_config(config: EvictionConfig, params: SamplingParams | None, block_size: int) -> EvictionConfig | None:
    """Return how a request is evicted, None if it is not: the server's config with the request's options on top.

    Raises ValueError for a wrong option.
    """
    return None if params is None else config.for_request(params.extra_args, block_size)


def check_config(config: EvictionConfig, vllm_config: VllmConfig) -> None:
    """Raise ValueError if a config, the server's or that of a request, does not go with the model or the engine."""
    method = config.method()
    check_needs(config.policy, method.policy, evicted_models(vllm_config))
    if vllm_config.speculative_config is None:
        return
    if method.policy.num_deferred:
        raise ValueError(
            f"{REQUEST_POLICY}: policy {config.policy!r} counts the tokens of the answer, and does not work with "
            f"speculative decoding; drop --speculative-config, or choose another policy"
        )
    if method.during_decode:
        raise ValueError(
            f"{REQUEST_DURING_DECODE}: does not work with speculative decoding, whose drafts may be rejected when what "
            f"they displaced is gone; drop --speculative-config, or say {REQUEST_DURING_DECODE} false"
        )


def with_checked_options(validate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``InputProcessor._validate_params`` so that wrong eviction options end the request, not the engine."""

    @functools.wraps(validate)
    def wrapper(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self.vllm_config, params)
        return validate(self, params, *args, **kwargs)

    return wrapper


def with_early_check(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``AsyncLLM.generate``: a wrong option is refused before an answer can begin to stream, as a 400."""

    @functools.wraps(generate)
    def wrapper(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self.vllm_config, sampling_params)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    return wrapper


def _check(vllm_config: VllmConfig, params: Any) -> None:
    options = getattr(params, "extra_args", None) or {}
    if not any(option in options for option in REQUEST_OPTIONS):
        return
    values = (vllm_config.additional_config or {}).get(FIELD)
    if values is None:
        raise VLLMValidationError(f"{REQUEST_POLICY}: this engine was started without --kv-eviction")
    try:
        config = request_config(EvictionConfig.parse(values), params, vllm_config.cache_config.block_size)
        if config is not None:
            check_config(config, vllm_config)
    except ValueError as error:
        process_metrics().refusals.labels(_option_named_in(str(error))).inc()
        raise VLLMValidationError(str(error)) from None


def _option_named_in(message: str) -> str:
    """Return the option that a message is about: the word before its colon, the policy's if that is none of them."""
    option = message.partition(":")[0]
    return option if option in REQUEST_OPTIONS else REQUEST_POLICY
