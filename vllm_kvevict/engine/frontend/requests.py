"""Per-request options: ``vllm_xargs={"kv_eviction": ..., "kv_budget": ..., ...}``, wrong ones refused with a 400."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import check_config, check_fits, check_prompt, check_protected, empty_cache
from vllm_kvevict.engine.fit import EmptyCache
from vllm_kvevict.engine.frontend import needs
from vllm_kvevict.engine.frontend.metrics import UNKNOWN_OPTION, process_metrics
from vllm_kvevict.engine.models import windows_of
from vllm_kvevict.engine.multimodal import protected_by
from vllm_kvevict.engine.settings import eviction_config, request_config
from vllm_kvevict.eviction.protection import num_in
from vllm_kvevict.options.names import AUTO, POLICY, VLLM_FIELD, is_ours
from vllm_kvevict.options.table import options_of_requests


@dataclass(frozen=True)
class PromptFacts:
    """What a prompt is, as far as it is known when it is checked.

    num_tokens: its length, 0 where that is not known
    has_embeds: whether some of it are embeddings, and not tokens
    images:     where tokens of it stand for images, audio or video
    """

    num_tokens: int = 0
    has_embeds: bool = False
    images: Sequence[PlaceholderRange] = ()


def with_checked_options(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``InputProcessor.process_inputs`` so that wrong eviction options end the request, not the engine."""

    @functools.wraps(process_inputs)
    def wrapper(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        options = _options(params)
        _check(self.vllm_config, options)
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        embeds = request.prompt_embeds
        num_tokens = len(request.prompt_token_ids or (() if embeds is None else embeds))
        images = [feature.mm_position for feature in request.mm_features or ()]
        _check(self.vllm_config, options, PromptFacts(num_tokens, embeds is not None, images))
        return request

    return wrapper


def with_early_check(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``AsyncLLM.generate``: a wrong option is refused before an answer can begin to stream, as a 400."""

    @functools.wraps(generate)
    def wrapper(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self.vllm_config, _options(sampling_params), _facts(prompt))
        return generate(self, prompt, sampling_params, *args, **kwargs)

    return wrapper


def with_early_check_of_responses(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``OpenAIServingResponses._generate_with_builtin_tools``, which calls ``AsyncLLM.generate`` when its own
    answer has begun to stream.
    """

    @functools.wraps(generate)
    def wrapper(self: Any, request_id: str, engine_input: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self.engine_client.vllm_config, _options(sampling_params), _facts(engine_input))
        return generate(self, request_id, engine_input, sampling_params, *args, **kwargs)

    return wrapper


def with_checked_body(check_model: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``GenerateBaseServing._check_model``, the first thing that every endpoint asks: not all of them hand options
    on to the engine, and a wrong one is wrong nevertheless.
    """

    @functools.wraps(check_model)
    async def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        error = await check_model(self, request, *args, **kwargs)
        if error is None:
            _check_place(getattr(request, "model_extra", None) or {})
            options = getattr(request, "vllm_xargs", None) or _options(getattr(request, "sampling_params", None))
            await needs.ask(self.engine_client, options)
            _check(self.engine_client.vllm_config, options)
        return error

    return wrapper


def _options(params: Any) -> Mapping[str, Any]:
    return getattr(params, "extra_args", None) or {}


def _facts(prompt: Any) -> PromptFacts:
    """Return what is known of a prompt that a front end has read; nothing, of others."""
    if not isinstance(prompt, dict):
        return PromptFacts()
    embeds = prompt.get("prompt_embeds")
    num_tokens = len(prompt.get("prompt_token_ids") or (() if embeds is None else embeds))
    images = [*chain.from_iterable((prompt.get("mm_placeholders") or {}).values())]
    return PromptFacts(num_tokens, embeds is not None, images)


def _check_place(unread: Mapping[str, Any]) -> None:
    """Raise what vLLM answers with a 400 if one of our options is among what it does not read of a request's body."""
    for option in options_of_requests(EvictionConfig):
        if option in unread:
            raise _refusal(f"{option}: expected in {VLLM_FIELD}, got it beside; say {VLLM_FIELD} = {{{option!r}: ...}}")


def _check(vllm_config: VllmConfig, options: Mapping[str, Any], prompt: PromptFacts = PromptFacts()) -> None:
    """Raise what vLLM answers with a 400 if a request cannot be served as it wishes."""
    server = eviction_config(vllm_config)
    if server is None:
        if any(is_ours(option) for option in options):
            raise VLLMValidationError(f"{POLICY}: this engine was started without --kv-eviction")
        return
    cache = _known_cache(vllm_config) if prompt.num_tokens else None
    fits = cache is None or cache.fits(None, prompt.num_tokens)
    if not options and not server.during_prefill and server.budget != AUTO and fits and not prompt.images:
        return
    num_multimodal = 0
    try:
        config = request_config(server, options, vllm_config.cache_config.block_size)
        if config is not None:
            check_config(config, vllm_config)
            num_multimodal = num_in(protected_by(config, prompt.images))
            check_prompt(config, vllm_config, prompt.has_embeds, bool(prompt.images))
            check_protected(config, vllm_config, prompt.num_tokens, num_multimodal)
        if cache is not None:
            sizes = prompt.num_tokens, prompt.num_tokens, num_multimodal
            prefill = None if config is None else cache.plan_prefill(config, *sizes)
            check_fits(cache, prefill, prompt.num_tokens, by_request=config is None)
    except ValueError as error:
        raise _refusal(str(error)) from None


def _known_cache(vllm_config: VllmConfig) -> EmptyCache | None:
    """Return the cache of one of the engines that this front end serves, None before they have said how large it is."""
    parallel = vllm_config.parallel_config
    num_engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    num_blocks = (vllm_config.cache_config.num_gpu_blocks or 0) // num_engines
    if not num_blocks:
        return None
    return empty_cache(vllm_config, num_blocks - 1, windows_of(vllm_config))  # without vLLM's null block


def _refusal(message: str) -> VLLMValidationError:
    """Count a refused request by the option that the message is about; return what vLLM answers with a 400."""
    process_metrics().refusals.labels(_option_named_in(message)).inc()
    return VLLMValidationError(message)


def _option_named_in(message: str) -> str:
    """Return the option that a message is about: the word before its colon, the policy's if that is none of them."""
    option = message.partition(":")[0]
    if option == VLLM_FIELD:
        return UNKNOWN_OPTION
    return option if option in options_of_requests(EvictionConfig) else POLICY
