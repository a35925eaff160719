"""The cache specs of a model with eviction, and the managers of their blocks: what is freed, and what is shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import empty_cache
from vllm_kvevict.engine.fit import EmptyCache, SlidingWindow
from vllm_kvevict.engine.scheduler.life import BlocksToFree, RequestLife
from vllm_kvevict.engine.settings import eviction_config

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
class CacheInUse:
    """What evicted requests hold of their prompts: tokens per KV head and layer, and blocks."""

    tokens: int = 0
    blocks: int = 0

    def add(self, plan: EvictionPlan, sign: int = 1) -> None:
        self.tokens += sign * plan.num_kept_tokens
        self.blocks += sign * plan.num_kept_blocks


class PrivateBlocks(SingleTypeKVCacheManager):
    """Of the blocks of an evicted request, those that hold what their text says enter the prefix cache.

    Full attention may rewrite the kept blocks. What follows the prompt was computed by looking at what was kept, in
    every layer of the model, and no hash of the text fits it.

    ``lives`` are the scheduler's; they are set once, before the first request.
    """

    lives: dict[str, RequestLife]

    def cache_blocks(
        self, request: Request, num_tokens: int, *args: Any, replay_boundaries: Sequence[int], **kwargs: Any
    ) -> None:
        life = self.lives.get(request.request_id)
        if life is not None:
            num_tokens = min(num_tokens, life.num_shared_tokens)
            # sliding windows retain what a request needs that goes on from here: one with the same prompt, and a longer
            block_size = life.plan.block_size
            boundaries = {life.max_cached_tokens // block_size * block_size, life.num_shared_tokens}
            replay_boundaries = sorted(boundaries - {0})
        super().cache_blocks(request, num_tokens, *args, replay_boundaries=replay_boundaries, **kwargs)


class PrivateSlidingWindowManager(PrivateBlocks, SlidingWindowManager):
    """Sliding-window layers beside evicted ones: untouched."""


class PrivateChunkedLocalManager(PrivateBlocks, ChunkedLocalAttentionManager):
    """Layers that see their chunk of the context only, beside evicted ones: untouched."""


class EvictionManager(PrivateBlocks, FullAttentionManager):
    """Full attention whose requests give all blocks but the kept ones back after the prefill.

    cache: what one request finds, the scheduler's
    """

    cache: EmptyCache

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.newly_freed: list[tuple[EvictionConfig, int]] = []
        self.in_use = CacheInUse()

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any) -> Any:
        limit = _hit_limit.get()
        if limit is not None:
            max_length = min(max_length, limit)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        num_blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            *args,
            **kwargs,
        )
        life = self.lives.get(request_id)
        if life is None:
            return num_blocks
        if life.reuses_last_block(num_tokens, len(self.req_to_blocks[request_id])):
            return num_blocks - 1
        num_blocks += life.num_fresh_blocks(num_tokens_main_model)
        return min(num_blocks, self.cache.num_held(life.prefill, num_tokens)) if apply_admission_cap else num_blocks

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        life = self.lives.get(request_id)
        if life is None:
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if num_fresh := life.num_fresh_blocks(num_tokens_main_model):
            life.fresh_blocks = self.block_pool.get_new_blocks(num_fresh)
        blocks = self.req_to_blocks[request_id]
        if life.reuses_last_block(num_tokens, len(blocks)):
            block, blocks[-1] = blocks[-1], self._null_block
            blocks.append(block)
            return [block]
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)
        life = self.lives.get(request_id)
        # with async scheduling the step that compacts may still be in flight
        while life is not None and life.to_free and life.to_free[0].num_tokens <= processed_computed_tokens:
            self._free_evicted(request_id, life, life.to_free.pop(0))

    def _free_evicted(self, request_id: str, life: RequestLife, blocks: BlocksToFree) -> None:
        self._remove_blocks_in_range(request_id, blocks.start, blocks.stop)
        num_freed = blocks.stop - blocks.start - len(blocks.fresh)
        if life.fresh_blocks:
            self.req_to_blocks[request_id][blocks.stop - len(blocks.fresh) : blocks.stop] = blocks.fresh
            self.block_pool.free_blocks(blocks.surplus)
            life.fresh_blocks = []
        self.newly_freed.append((life.config, num_freed))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        life = self.lives.get(request_id)
        if life is None:
            return blocks
        if life.counted is not None:
            self.in_use.add(life.counted, sign=-1)
        return blocks + life.give_back()


# the built-in specs register lazily, and only into an empty registry
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=EvictionManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class EvictionSpec(FullAttentionSpec):
    """Full attention with eviction. Has no fields of its own: ``merge`` would drop them."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """As vLLM's, but for a server that evicts between the chunks of a prompt: what its longest one holds."""
        whole = super().max_memory_usage_bytes(vllm_config)
        config = eviction_config(vllm_config)
        if config is None or not config.during_prefill:
            return whole
        longest = vllm_config.model_config.max_model_len
        # blocks without a number, and one more for vLLM's null block
        cache = empty_cache(vllm_config, 0, windows=(), is_shared=False)
        num_blocks = cache.num_held(cache.plan_prefill(config, longest, longest), longest) + 1
        return min(whole, num_blocks * self.page_size_bytes)


@register_kv_cache_spec(manager_class=PrivateSlidingWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class PrivateSlidingWindowSpec(SlidingWindowSpec):
    """A sliding window beside layers with eviction."""


@register_kv_cache_spec(manager_class=PrivateChunkedLocalManager, uniform_type_base_spec=ChunkedLocalAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class PrivateChunkedLocalSpec(ChunkedLocalAttentionSpec):
    """Chunks of the context beside layers with eviction."""


def window_of(spec: KVCacheSpec, num_in_flight: int) -> SlidingWindow | None:
    """Return what layers hold that see a part of the context and are not evicted; None for other layers.

    num_in_flight: tokens of steps whose blocks are not given back yet
    """
    if isinstance(spec, SlidingWindowSpec):
        return SlidingWindow(spec.sliding_window - 1 + num_in_flight, spec.block_size)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return SlidingWindow(spec.attention_chunk_size + num_in_flight, spec.block_size)
    return None


def with_eviction_managers(spec: KVCacheSpec) -> KVCacheSpec:
    """Return ``spec`` in our words, so that vLLM gives its layers one of our managers; other kinds unchanged.

    Layers that see the whole context will be evicted.
    """
    if type(spec) is SlidingWindowSpec:
        ours: type[AttentionSpec] = PrivateSlidingWindowSpec
    elif type(spec) is ChunkedLocalAttentionSpec:
        ours = PrivateChunkedLocalSpec
    elif type(spec) is FullAttentionSpec and spec.sliding_window is None and spec.attention_chunk_size is None:
        ours = EvictionSpec
    else:
        return spec
    return ours(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})
