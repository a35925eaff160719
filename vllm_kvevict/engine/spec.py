"""The cache specs of a model with eviction, and the managers of their blocks: what is freed, and what is shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.config import EvictionConfig

_hit_limit: ContextVar[int | None] = ContextVar("kvevict_hit_limit", default=None)


@contextmanager
def cache_hits_up_to(num_tokens: int) -> Iterator[None]:
    """Prefix-cache lookups inside this context cover at most ``num_tokens``."""
    token = _hit_limit.set(num_tokens)
    try:
        yield
    finally:
        _hit_limit.reset(token)


@dataclass
class RequestEviction:
    """What the scheduler knows of a request that is, or will be, evicted.

    num_shared_tokens: tokens after these, whole blocks of them, are neither taken from the prefix cache nor put into it
    plan:              set by the step that ends the prefill
    is_done:           whether the workers have evicted it
    freed_blocks:      set once the blocks are back in the pool
    """

    config: EvictionConfig
    num_shared_tokens: int
    plan: EvictionPlan | None = None
    is_done: bool = False
    freed_blocks: int | None = None


@dataclass
class CacheInUse:
    """What evicted requests hold of their prompts: tokens per KV head and layer, and blocks."""

    tokens: int = 0
    blocks: int = 0

    def add(self, plan: EvictionPlan, sign: int = 1) -> None:
        self.tokens += sign * plan.num_kept_tokens
        self.blocks += sign * plan.num_kept_blocks


class PrivateBlocks(SingleTypeKVCacheManager):
    """Blocks of requests that are evicted enter the prefix cache only where full attention keeps none of them.

    Full attention rewrites the kept blocks. What follows them was computed by looking at these, in every layer of the
    model, and no hash of the text fits it.

    ``evictions`` is the scheduler's; it is set once, before the first request.
    """

    evictions: dict[str, RequestEviction]

    def cache_blocks(
        self, request: Request, num_tokens: int, *args: Any, replay_boundaries: Sequence[int], **kwargs: Any
    ) -> None:
        eviction = self.evictions.get(request.request_id)
        if eviction is not None:
            num_tokens = min(num_tokens, eviction.num_shared_tokens)
            # sliding windows retain only what a request needs that goes on from here
            replay_boundaries = (eviction.num_shared_tokens,)
        super().cache_blocks(request, num_tokens, *args, replay_boundaries=replay_boundaries, **kwargs)


class PrivateSlidingWindowManager(PrivateBlocks, SlidingWindowManager):
    """Sliding-window layers beside evicted ones: untouched."""


class EvictionManager(PrivateBlocks, FullAttentionManager):
    """Full attention whose requests give the blocks before their kept ones back after the prefill."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.newly_freed: list[RequestEviction] = []
        self.in_use = CacheInUse()

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any) -> Any:
        limit = _hit_limit.get()
        if limit is not None:
            max_length = min(max_length, limit)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)
        eviction = self.evictions.get(request_id)
        if eviction is None or eviction.plan is None or eviction.freed_blocks is not None:
            return
        # with async scheduling the step that compacts may still be in flight
        if processed_computed_tokens >= eviction.plan.num_tokens:
            first_kept = eviction.plan.first_kept_block
            self._remove_blocks_in_range(request_id, 0, first_kept)
            eviction.freed_blocks = first_kept
            self.newly_freed.append(eviction)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        eviction = self.evictions.pop(request_id, None)
        if eviction is not None and eviction.plan is not None and eviction.is_done:
            self.in_use.add(eviction.plan, sign=-1)
        return super().pop_blocks_for_free(request_id)


# the built-in specs register lazily, and only into an empty registry
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=EvictionManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class EvictionSpec(FullAttentionSpec):
    """Full attention with eviction. Has no fields of its own: ``merge`` would drop them."""


@register_kv_cache_spec(manager_class=PrivateSlidingWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class PrivateSlidingWindowSpec(SlidingWindowSpec):
    """A sliding window beside layers with eviction."""


def with_eviction_managers(spec: AttentionSpec) -> AttentionSpec:
    """Return ``spec`` in our words, so that vLLM gives its layers one of our managers; other kinds unchanged.

    Layers that see the whole context will be evicted.
    """
    if type(spec) is SlidingWindowSpec:
        ours: type[AttentionSpec] = PrivateSlidingWindowSpec
    elif type(spec) is FullAttentionSpec and spec.sliding_window is None and spec.attention_chunk_size is None:
        ours = EvictionSpec
    else:
        return spec
    return ours(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
