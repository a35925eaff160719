"""Per-request options: ``vllm_xargs={"kv_eviction": ..., "kv_budget": ..., ...}``, wrong ones refused with a 400."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.fit import EmptyCache, PrefillPlan, Window
from vllm_kvevict.engine.frontend.flags import FIELD
from vllm_kvevict.engine.frontend.metrics import UNKNOWN_OPTION, process_metrics
from vllm_kvevict.engine.worker.model import check_needs, evicted_models, windows_of
from vllm_kvevict.engine.worker.pseudo_passes import check_lookahead
from vllm_kvevict.options.limits import (
    AUTO,
    NONE,
    REQUEST_BUDGET,
    REQUEST_DURING_DECODE,
    REQUEST_DURING_PREFILL,
    REQUEST_INTERVAL,
    REQUEST_OPTIONS,
    REQUEST_POLICY,
    VLLM_FIELD,
    is_ours,
)


@dataclass(frozen=True)
class PromptFacts:
    """What a prompt is, as far as it is known when it is checked.

    num_tokens: its length, 0 where that is not known
    has_embeds: whether some of it are embeddings, and not tokens
    has_images: whether some of its tokens stand for images, audio or video
    """

    num_tokens: int = 0
    has_embeds: bool = False
    has_images: bool = False


def request_config(config: EvictionConfig, params: SamplingParams | None, block_size: int) -> EvictionConfig | None:
    """Return how a request is evicted, None if it is not: the server's config with the request's options on top.

    Raises ValueError for a wrong option.
    """
    return None if params is None else config.for_request(params.extra_args, block_size)


def check_config(config: EvictionConfig, vllm_config: VllmConfig) -> None:
    """Raise ValueError if a config, the server's or that of a request, does not go with the model or the engine."""
    method = config.method()
    check_needs(config.policy, method.policy, evicted_models(vllm_config))
    check_lookahead(config.policy, method.policy, vllm_config)
    if config.budget == AUTO and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            f"{REQUEST_BUDGET}: 'auto' reads the logits of a prompt, which only the last pipeline stage has; give a "
            f"number, or drop --pipeline-parallel-size"
        )
    if method.schedule.between_chunks and vllm_config.model_config.is_mm_prefix_lm:
        raise ValueError(
            f"{REQUEST_DURING_PREFILL}: does not work with a model whose images see all of themselves, since a chunk "
            f"behind the first eviction sees only what came before; say {REQUEST_DURING_PREFILL} false"
        )
    if method.schedule.per_token and method.query_window > ring_depth(vllm_config):
        raise ValueError(
            f"{REQUEST_INTERVAL}: policy {config.policy!r} looks at the last {method.query_window} queries, and this "
            f"server remembers {ring_depth(vllm_config)}; start it with that policy, or lower the policy's window"
        )
    if vllm_config.speculative_config is None:
        return
    if method.schedule.num_deferred:
        raise ValueError(
            f"{REQUEST_POLICY}: policy {config.policy!r} counts the tokens of the answer, and does not work with "
            f"speculative decoding; drop --speculative-config, or choose another policy"
        )
    if method.schedule.is_bounded:
        option = REQUEST_DURING_DECODE if method.schedule.evicts_answer else REQUEST_DURING_PREFILL
        raise ValueError(
            f"{option}: does not work with speculative decoding, whose drafts may be rejected when what they displaced "
            f"is gone; drop --speculative-config, or say {option} false"
        )


def check_prompt(config: EvictionConfig, has_embeds: bool, has_images: bool) -> None:
    """Raise ValueError if the budget of a request, whose config this is, cannot be chosen by its prompt."""
    if config.budget == AUTO and (has_embeds or has_images):
        what = "embeddings" if has_embeds else "images, audio or video"
        raise ValueError(
            f"{REQUEST_BUDGET}: 'auto' is chosen by the likelihood of a prompt's tokens, and a prompt with {what} has "
            f"places without one; give a number of tokens, or a fraction, as {REQUEST_BUDGET}"
        )


def ring_depth(vllm_config: VllmConfig) -> int:
    """Return how many of an answer's last queries the workers remember: a block of them, or what the server's own
    policy looks at.
    """
    values = (vllm_config.additional_config or {})[FIELD]
    return max(vllm_config.cache_config.block_size, EvictionConfig.parse(values).method().query_window)


def with_checked_options(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``InputProcessor.process_inputs`` so that wrong eviction options end the request, not the engine."""

    @functools.wraps(process_inputs)
    def wrapper(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        options = _options(params)
        _check(self.vllm_config, options)
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        embeds = request.prompt_embeds
        num_tokens = len(request.prompt_token_ids or (() if embeds is None else embeds))
        _check(self.vllm_config, options, PromptFacts(num_tokens, embeds is not None, bool(request.mm_features)))
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
            _check(self.engine_client.vllm_config, getattr(request, "vllm_xargs", None) or {})
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
    return PromptFacts(num_tokens, embeds is not None, any((prompt.get("mm_placeholders") or {}).values()))


def _check_place(unread: Mapping[str, Any]) -> None:
    """Raise what vLLM answers with a 400 if one of our options is among what it does not read of a request's body."""
    for option in REQUEST_OPTIONS:
        if option in unread:
            process_metrics().refusals.labels(option).inc()
            raise VLLMValidationError(
                f"{option}: expected in {VLLM_FIELD}, got it beside; say {VLLM_FIELD} = {{{option!r}: ...}}"
            )


def _check(vllm_config: VllmConfig, options: Mapping[str, Any], prompt: PromptFacts = PromptFacts()) -> None:
    """Raise what vLLM answers with a 400 if a request cannot be served as it wishes."""
    values = (vllm_config.additional_config or {}).get(FIELD)
    if values is None:
        if any(is_ours(option) for option in options):
            raise VLLMValidationError(f"{REQUEST_POLICY}: this engine was started without --kv-eviction")
        return
    cache = _known_cache(vllm_config) if prompt.num_tokens else None
    fits = cache is None or cache.fits(None, prompt.num_tokens)
    if not options and not values.get("during_prefill") and values["budget"] != AUTO and fits:
        return
    server = EvictionConfig.parse(values)
    try:
        config = server.for_request(options, vllm_config.cache_config.block_size)
        if config is not None:
            check_config(config, vllm_config)
            check_prompt(config, prompt.has_embeds, prompt.has_images)
        if cache is not None:
            prefill = None if config is None else cache.plan(config, prompt.num_tokens, prompt.num_tokens)
            check_fits(cache, prefill, prompt.num_tokens, by_request=config is None)
    except ValueError as error:
        process_metrics().refusals.labels(_option_named_in(str(error))).inc()
        raise VLLMValidationError(str(error)) from None


def says_none(params: SamplingParams | None) -> bool:
    """Whether a request asks for no eviction."""
    return _options(params).get(REQUEST_POLICY) == NONE


def check_fits(cache: EmptyCache, prefill: PrefillPlan | None, num_tokens: int, by_request: bool) -> None:
    """Raise ValueError for a prompt of ``num_tokens`` that would wait for ever.

    prefill:    how it is evicted; None: it is kept whole
    by_request: whether that is what the request has asked for

    vLLM itself makes sure that the longest one fits, unless the server's own requests need no more than a part of it.
    """
    num_needed = cache.num_needed(prefill, num_tokens)
    if num_needed > cache.num_blocks:
        option, remedy = REQUEST_BUDGET, f"lower {REQUEST_BUDGET}"
        if by_request:
            option, remedy = REQUEST_POLICY, f"leave {REQUEST_POLICY} out"
        elif prefill is not None and not prefill.between_chunks:
            option, remedy = REQUEST_DURING_PREFILL, f"let it be evicted between its chunks: {REQUEST_DURING_PREFILL}"
        raise ValueError(
            f"{option}: a prompt of {num_tokens} tokens needs {num_needed} blocks with these options, and the KV cache "
            f"has {cache.num_blocks}, beside one that vLLM keeps; {remedy}"
        )


def _known_cache(vllm_config: VllmConfig) -> EmptyCache | None:
    """Return the cache of one of the engines that this front end serves, None before they have said how large it is."""
    parallel = vllm_config.parallel_config
    num_engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    num_blocks = (vllm_config.cache_config.num_gpu_blocks or 0) // num_engines
    if not num_blocks:
        return None
    return empty_cache(vllm_config, num_blocks - 1, windows_of(vllm_config))  # without vLLM's null block


def _option_named_in(message: str) -> str:
    """Return the option that a message is about: the word before its colon, the policy's if that is none of them."""
    option = message.partition(":")[0]
    if option == VLLM_FIELD:
        return UNKNOWN_OPTION
    return option if option in REQUEST_OPTIONS else REQUEST_POLICY


def empty_cache(
    vllm_config: VllmConfig, num_blocks: int, windows: tuple[Window, ...], is_shared: bool | None = None
) -> EmptyCache:
    """Return the cache that a request finds which is alone in an engine.

    num_blocks: that can be allocated
    windows:    groups of layers that are not evicted
    is_shared:  whether there is a prefix cache; None: what the engine's settings say
    """
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    chunk = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    return EmptyCache(
        num_blocks,
        cache.block_size,
        vllm_config.model_config.max_model_len,
        # vLLM lets a request that is alone have longer chunks; one that is evicted between them is held to these
        min(chunk, scheduler.long_prefill_token_threshold or chunk),
        # what is verified in a step, and what a draft model writes behind it
        num_drafts=2 * vllm_config.num_speculative_tokens,
        num_late=vllm_config.max_concurrent_batches - 1,
        windows=windows,
        is_shared=cache.enable_prefix_caching if is_shared is None else is_shared,
    )
