"""The cache specs of a model with eviction, and the managers of their blocks: what is freed, and what is shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from vllm_kvevict.cache.plan import EvictionPlan, budget_blocks, cdiv
from vllm_kvevict.config import AUTO, EvictionConfig
from vllm_kvevict.engine.install import eviction_config
from vllm_kvevict.engine.requests import chunk_blocks
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


@dataclass(frozen=True)
class Release:
    """Blocks of a request that are free once so many of its tokens have been processed.

    start, stop: their places in its block table, where null blocks take over
    fresh:       blocks that take the last of these places
    surplus:     fresh blocks that were not needed
    """

    num_tokens: int
    start: int
    stop: int
    fresh: list[KVCacheBlock]
    surplus: list[KVCacheBlock] = field(default_factory=list)


@dataclass
class RequestEviction:
    """What the scheduler knows of a request that is, or will be, evicted.

    Its kept tokens go into fresh blocks if there are any, so that nothing in the prefix cache is ever rewritten; a
    prompt too long for that is compacted in place, and the blocks it keeps are never shared.

    plan:          made when the prefill begins; the step of the first eviction makes it final, and later ones renew it
    in_place:      whether the kept tokens stay in the last blocks of the prompt
    is_late:       whether the eviction is due in the answer: the budget holds the prompt, or the policy waits
    num_chunk_blocks: full blocks that are kept between the chunks of the prompt; None if it is evicted at its end only
    has_prefilled: whether the last chunk of the prompt was scheduled
    fresh_blocks:  taken in the step of the first eviction, and held here until they enter the request's table
    plans:         of every eviction that was scheduled
    counted:       the last of these that the workers have carried out
    releases:      blocks to be freed, in order
    """

    config: EvictionConfig
    plan: EvictionPlan
    in_place: bool
    is_late: bool = False
    num_chunk_blocks: int | None = None
    has_prefilled: bool = False
    fresh_blocks: list[KVCacheBlock] | None = None
    plans: list[EvictionPlan] = field(default_factory=list)
    counted: EvictionPlan | None = None
    releases: list[Release] = field(default_factory=list)

    @property
    def is_final(self) -> bool:
        """Whether the step of the first eviction was scheduled."""
        return bool(self.plans)

    @property
    def num_shared_tokens(self) -> int:
        """Tokens after these, whole blocks of them, never enter the prefix cache."""
        plan = self.plans[0] if self.plans else self.plan
        if not self.in_place:
            return plan.num_tokens // plan.block_size * plan.block_size
        return 0 if self.num_chunk_blocks is not None else plan.first_kept_block * plan.block_size

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that may come from the prefix cache: none that will be rewritten, and none that a policy looks at."""
        method = self.config.method()
        if Need.ALL_QUERIES in method.policy.needs or self.config.budget == AUTO:  # which looks at all of the prompt
            return 0
        most = min(self.num_shared_tokens, self.plan.num_tokens - method.query_window)
        if self.num_chunk_blocks is not None:  # a longer hit would have to be held at once
            most = min(most, self.num_chunk_blocks * self.plan.block_size)
        return most

    def chunk_plan(self, num_tokens: int) -> EvictionPlan | None:
        """Return the plan for the end of a chunk of the prompt, None if it needs none."""
        if self.num_chunk_blocks is None:
            return None
        block_size = self.plan.block_size
        num_kept = self.num_chunk_blocks + (num_tokens % block_size > 0)
        return EvictionPlan(num_tokens, num_kept, block_size) if num_kept < cdiv(num_tokens, block_size) else None

    def num_fresh_blocks(self, num_tokens: int) -> int:
        """Return how many fresh blocks a step needs that computes the request up to ``num_tokens``."""
        if self.in_place or self.fresh_blocks is not None:
            return 0
        plan = self.plan if num_tokens >= self.plan.num_tokens else self.chunk_plan(num_tokens)
        return 0 if plan is None else plan.num_full_blocks

    def reuses_last_block(self, num_tokens: int, num_blocks: int) -> bool:
        """Return whether a request that holds ``num_blocks`` goes on to ``num_tokens`` in its last block.

        The answer has filled that block, and the workers empty it before they write to it again.
        """
        if not (self.is_final and self.has_prefilled and self.config.method().during_decode):
            return False
        is_of_the_answer = num_blocks > self.plan.num_tokens // self.plan.block_size
        return is_of_the_answer and num_tokens > num_blocks * self.plan.block_size

    def final_plan(self, num_tokens: int) -> EvictionPlan:
        """Return the plan for a request that may have grown since it was made; as many blocks are kept full."""
        plan = self.plan
        first_kept = plan.first_kept_block if self.in_place else num_tokens // plan.block_size - plan.num_full_blocks
        return replace(plan, num_tokens=num_tokens, num_kept_blocks=cdiv(num_tokens, plan.block_size) - first_kept)

    def begin(self, plan: EvictionPlan) -> None:
        """The step of the first eviction, by ``plan``, is scheduled."""
        self.plan = plan
        self.plans.append(plan)
        fresh = self.fresh_blocks or []
        self.releases.append(Release(plan.num_tokens, 0, plan.first_kept_block + len(fresh), fresh))

    def settle(self, chosen: EvictionPlan) -> None:
        """The workers have chosen a plan that keeps fewer blocks than the one of the first eviction."""
        release = self.releases[0]
        num_surplus = self.plan.num_kept_blocks - chosen.num_kept_blocks
        self.plan = self.plans[0] = chosen
        if self.in_place:
            self.releases[0] = replace(release, stop=release.stop + num_surplus)
        else:
            fresh = release.fresh
            self.releases[0] = replace(release, fresh=fresh[num_surplus:], surplus=fresh[:num_surplus])

    def go_on(self, num_tokens: int) -> None:
        """The step of the next eviction is scheduled: the full blocks stay, and what was filled since then goes."""
        plan = self.plan
        num_kept = plan.num_full_blocks + (num_tokens % plan.block_size > 0)
        keeps_tail = not (self.has_prefilled and self.config.method().per_token)
        self.plan = replace(plan, num_tokens=num_tokens, num_kept_blocks=num_kept, keeps_tail=keeps_tail)
        self.plans.append(self.plan)
        start, stop = plan.num_tokens // plan.block_size, num_tokens // plan.block_size
        self.releases.append(Release(num_tokens, start, stop, []))


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
    """Full attention whose requests give all blocks but the kept ones back after the prefill.

    chunk_blocks: the most blocks that one chunk of a prompt fills; the scheduler's
    """

    chunk_blocks: int

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
        eviction = self.evictions.get(request_id)
        if eviction is None:
            return num_blocks
        if eviction.reuses_last_block(num_tokens, len(self.req_to_blocks[request_id])):
            return num_blocks - 1
        num_blocks += eviction.num_fresh_blocks(num_tokens_main_model)
        if apply_admission_cap and eviction.num_chunk_blocks is not None:
            num_blocks = min(num_blocks, bounded_blocks(eviction.num_chunk_blocks, self.chunk_blocks))
        return num_blocks

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
        # with async scheduling the step that compacts may still be in flight
        while (
            eviction is not None and eviction.releases and eviction.releases[0].num_tokens <= processed_computed_tokens
        ):
            self._release(request_id, eviction, eviction.releases.pop(0))

    def _release(self, request_id: str, eviction: RequestEviction, release: Release) -> None:
        self._remove_blocks_in_range(request_id, release.start, release.stop)
        num_freed = release.stop - release.start - len(release.fresh)
        if eviction.fresh_blocks:
            self.req_to_blocks[request_id][release.stop - len(release.fresh) : release.stop] = release.fresh
            self.block_pool.free_blocks(release.surplus)
            eviction.fresh_blocks = []
        self.newly_freed.append((eviction.config, num_freed))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        eviction = self.evictions.pop(request_id, None)
        if eviction is None:
            return blocks
        if eviction.counted is not None:
            self.in_use.add(eviction.counted, sign=-1)
        return blocks + (eviction.fresh_blocks or [])


def bounded_blocks(num_chunk_blocks: int, chunk_blocks: int) -> int:
    """Return the most blocks that a prompt holds which is evicted chunk by chunk.

    At its first eviction: a hit in the prefix cache, a chunk, and fresh blocks; behind that what is kept, and a chunk.

    num_chunk_blocks: full blocks that are kept between its chunks
    chunk_blocks:     blocks that a chunk may fill, or enter
    """
    return 2 * num_chunk_blocks + chunk_blocks


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
        longest, method = vllm_config.model_config.max_model_len, config.method()
        num_blocks = budget_blocks(longest, config.most_kept, self.block_size, method.min_tokens, during_decode=True)
        most = bounded_blocks(num_blocks - 1, chunk_blocks(vllm_config))
        return min(whole, most * self.page_size_bytes)


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
