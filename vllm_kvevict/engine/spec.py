"""The cache specs of a model with eviction, and the managers of their blocks: what is freed, and what is shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.policies import Need

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

    Its kept tokens go into fresh blocks if there are any, so that nothing in the prefix cache is ever rewritten; a
    prompt too long for that is compacted in place, and the blocks it keeps are never shared.

    plan:         made when the prefill begins; the step that ends it makes it final
    in_place:     whether the kept tokens stay in the last blocks of the prompt
    is_late:      whether the eviction is due some way into the answer: the budget holds the prompt, or the policy waits
    fresh_blocks: taken in the step that ends the prefill, and held here until they enter the request's table
    has_prefilled: whether the last chunk of the prompt was scheduled; of interest if ``is_late``
    is_final:     whether the step that ends in an eviction was scheduled
    is_done:      whether the workers have evicted it
    freed_blocks: set once the blocks are back in the pool
    """

    config: EvictionConfig
    plan: EvictionPlan
    in_place: bool
    is_late: bool = False
    has_prefilled: bool = False
    fresh_blocks: list[KVCacheBlock] | None = None
    is_final: bool = False
    is_done: bool = False
    freed_blocks: int | None = None

    @property
    def num_shared_tokens(self) -> int:
        """Tokens after these, whole blocks of them, never enter the prefix cache."""
        plan = self.plan
        return plan.block_size * (plan.first_kept_block if self.in_place else plan.num_tokens // plan.block_size)

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that may come from the prefix cache: none that will be rewritten, and none that a policy looks at."""
        method = self.config.method()
        if Need.ALL_QUERIES in method.policy.needs:
            return 0
        return min(self.num_shared_tokens, self.plan.num_tokens - method.query_window)

    def num_fresh_blocks(self, num_tokens: int) -> int:
        """Return how many fresh blocks a step needs that computes the request up to ``num_tokens``."""
        is_due = not self.in_place and self.fresh_blocks is None and num_tokens >= self.plan.num_tokens
        return self.plan.num_full_blocks if is_due else 0

    def reuses_last_block(self, num_tokens: int, num_blocks: int) -> bool:
        """Return whether a request that holds ``num_blocks`` goes on to ``num_tokens`` in its last block.

        The answer has filled that block, and the workers empty it before they write to it again.
        """
        if not (self.is_final and self.config.method().during_decode):
            return False
        is_of_the_answer = num_blocks > self.plan.num_tokens // self.plan.block_size
        return is_of_the_answer and num_tokens > num_blocks * self.plan.block_size

    def end_prefill(self, num_tokens: int) -> None:
        """Make the plan final. The request may have grown since its prefill began; as many blocks are kept full."""
        plan = self.plan
        first_kept = plan.first_kept_block if self.in_place else num_tokens // plan.block_size - plan.num_full_blocks
        self.plan = replace(plan, num_tokens=num_tokens, num_kept_blocks=cdiv(num_tokens, plan.block_size) - first_kept)
        self.is_final = True


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

    ``evictions`` is the scheduler's; it is set once, before the first request.
    """

    evictions: dict[str, RequestEviction]

    def cache_blocks(
        self, request: Request, num_tokens: int, *args: Any, replay_boundaries: Sequence[int], **kwargs: Any
    ) -> None:
        eviction = self.evictions.get(request.request_id)
        if eviction is not None:
            num_tokens = min(num_tokens, eviction.num_shared_tokens)
            # sliding windows retain what a request needs that goes on from here: one with the same prompt, and a longer
            block_size = eviction.plan.block_size
            boundaries = {eviction.max_cached_tokens // block_size * block_size, eviction.num_shared_tokens}
            replay_boundaries = sorted(boundaries - {0})
        super().cache_blocks(request, num_tokens, *args, replay_boundaries=replay_boundaries, **kwargs)


class PrivateSlidingWindowManager(PrivateBlocks, SlidingWindowManager):
    """Sliding-window layers beside evicted ones: untouched."""


class EvictionManager(PrivateBlocks, FullAttentionManager):
    """Full attention whose requests give all blocks but the kept ones back after the prefill."""

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

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **kwargs: Any,
    ) -> int:
        num_blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            **kwargs,
        )
        eviction = self.evictions.get(request_id)
        if eviction is None:
            return num_blocks
        if eviction.reuses_last_block(num_tokens, len(self.req_to_blocks[request_id])):
            return num_blocks - 1
        return num_blocks + eviction.num_fresh_blocks(num_tokens_main_model)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        eviction = self.evictions.get(request_id)
        if eviction is not None and (num_fresh := eviction.num_fresh_blocks(num_tokens_main_model)):
            eviction.fresh_blocks = self.block_pool.get_new_blocks(num_fresh)
        blocks = self.req_to_blocks[request_id]
        if eviction is not None and eviction.reuses_last_block(num_tokens, len(blocks)):
            block, blocks[-1] = blocks[-1], self._null_block
            blocks.append(block)
            return [block]
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)
        eviction = self.evictions.get(request_id)
        if eviction is None or not eviction.is_final or eviction.freed_blocks is not None:
            return
        # with async scheduling the step that compacts may still be in flight
        if processed_computed_tokens >= eviction.plan.num_tokens:
            first_kept = eviction.plan.first_kept_block
            fresh, eviction.fresh_blocks = eviction.fresh_blocks or [], []
            self._remove_blocks_in_range(request_id, 0, first_kept + len(fresh))
            self.req_to_blocks[request_id][first_kept : first_kept + len(fresh)] = fresh
            eviction.freed_blocks = first_kept
            self.newly_freed.append(eviction)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        eviction = self.evictions.pop(request_id, None)
        if eviction is None:
            return blocks
        if eviction.is_done:
            self.in_use.add(eviction.plan, sign=-1)
        return blocks + (eviction.fresh_blocks or [])


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
