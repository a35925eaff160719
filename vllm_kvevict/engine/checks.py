"""Whether a config goes with the model and the engine, and a prompt with the cache; the same in all processes."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams

from vllm_kvevict.cache.plan import budget_tokens
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.fit import EmptyCache, PrefillPlan, SlidingWindow
from vllm_kvevict.engine.models import check_needs, check_pseudo_tokens, missing_needs
from vllm_kvevict.engine.reserve import reserve_of
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.smallest import check_holds
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.options.names import (
    AUTO,
    BUDGET,
    DURING_DECODE,
    DURING_PREFILL,
    MAX_NUM_SEQS,
    NONE,
    POLICY,
    flag_of,
)
from vllm_kvevict.policies.base import Need


def check_config(config: EvictionConfig, vllm_config: VllmConfig) -> None:
    """Raise ValueError if a config, the server's or that of a request, does not go with the model or the engine."""
    method = config.method()
    check_needs(config.policy, traits_of(method.policy).needs, missing_needs(vllm_config))
    check_pseudo_tokens(config.policy, method.policy, vllm_config)
    if config.budget == AUTO and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            f"{BUDGET}: 'auto' reads the logits of a prompt, which only the last pipeline stage has; give a "
            f"number, or drop --pipeline-parallel-size"
        )
    if method.schedule.between_chunks and vllm_config.model_config.is_mm_prefix_lm:
        raise ValueError(
            f"{DURING_PREFILL}: does not work with a model whose images see all of themselves, since a chunk "
            f"behind the first eviction sees only what came before; say {DURING_PREFILL} false"
        )
    if vllm_config.speculative_config is None:
        _check_reserve(config, method, vllm_config)
        return
    if method.schedule.num_deferred:
        raise ValueError(
            f"{POLICY}: policy {config.policy!r} counts the tokens of the answer, and does not work with "
            f"speculative decoding; drop --speculative-config, or choose another policy"
        )
    if method.schedule.is_bounded:
        option = DURING_DECODE if method.schedule.evicts_answer else DURING_PREFILL
        raise ValueError(
            f"{option}: does not work with speculative decoding, whose drafts may be rejected when what they displaced "
            f"is gone; drop --speculative-config, or say {option} false"
        )


def _check_reserve(config: EvictionConfig, method: Method, vllm_config: VllmConfig) -> None:
    """Raise ValueError if the engine keeps no memory ready for what a config asks for."""
    if not method.needs_reserve:
        return
    reserve = reserve_of(vllm_config)
    if reserve is None or (method.watches_answer and not reserve.max_num_seqs):
        option = POLICY
        if method.schedule.is_bounded:
            option = DURING_DECODE if method.schedule.evicts_answer else DURING_PREFILL
        raise ValueError(
            f"{option}: this server has reserved no memory for requests that are evicted between the chunks of their "
            f"prompts or while they decode; start it with {flag_of(MAX_NUM_SEQS)} N, the most of them at once"
        )
    if method.watches_answer and method.query_window > reserve.depth:
        raise ValueError(
            f"{POLICY}: {config.policy!r} with its allocator looks at the last {method.query_window} queries of "
            f"answers, and this server remembers {reserve.depth}; start it with that policy, or lower the window"
        )


def check_prompt(config: EvictionConfig, vllm_config: VllmConfig, has_embeds: bool, has_images: bool) -> None:
    """Raise ValueError if a request, whose config this is, cannot be evicted because of what its prompt is made of."""
    if config.budget == AUTO and (has_embeds or has_images):
        what = "embeddings" if has_embeds else "images, audio or video"
        raise ValueError(
            f"{BUDGET}: 'auto' is chosen by the likelihood of a prompt's tokens, and a prompt with {what} has "
            f"places without one; give a number of tokens, or a fraction, as {BUDGET}"
        )
    if has_images and vllm_config.model_config.uses_mrope and Need.ROTARY in traits_of(config.method().policy).needs:
        raise ValueError(
            f"{POLICY}: {config.policy!r} turns keys back by their places in the prompt, and this model gives tokens "
            f"of images, audio and video other positions; choose a policy that does not need the rotary embedding"
        )


def check_protected(config: EvictionConfig, vllm_config: VllmConfig, num_tokens: int, num_multimodal: int) -> None:
    """Raise ValueError if the budget of a prompt cannot hold its tokens of images, audio and video that must stay.

    A prompt that is within its budget is not evicted, unless its answer is.
    """
    method = config.method()
    is_evicted = method.schedule.evicts_answer or num_tokens > budget_tokens(num_tokens, config.most_kept)
    if num_multimodal and is_evicted:
        check_holds(config.budget, config.policy, method, vllm_config.cache_config.block_size, num_multimodal)


def says_none(params: SamplingParams | None) -> bool:
    """Whether a request asks for no eviction."""
    return params is not None and (params.extra_args or {}).get(POLICY) == NONE


def check_fits(cache: EmptyCache, prefill: PrefillPlan | None, num_tokens: int, by_request: bool) -> None:
    """Raise ValueError for a prompt of ``num_tokens`` that would wait for ever.

    prefill:    how it is evicted; None: it is kept whole
    by_request: whether that is what the request has asked for

    vLLM itself makes sure that the longest one fits, unless the server's own requests need no more than a part of it.
    """
    num_needed = cache.num_needed(prefill, num_tokens)
    if num_needed > cache.num_blocks:
        option, remedy = BUDGET, f"lower {BUDGET}"
        if by_request:
            option, remedy = POLICY, f"leave {POLICY} out"
        elif prefill is not None and not prefill.between_chunks:
            option, remedy = DURING_PREFILL, f"let it be evicted between its chunks: {DURING_PREFILL}"
        raise ValueError(
            f"{option}: a prompt of {num_tokens} tokens needs {num_needed} blocks with these options, and the KV cache "
            f"has {cache.num_blocks}, beside one that vLLM keeps; {remedy}"
        )


def empty_cache(
    vllm_config: VllmConfig, num_blocks: int, windows: tuple[SlidingWindow, ...], is_shared: bool | None = None
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
