"""What fits into a KV cache: the one answer for the check at arrival, the admission and the start-up."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_kvevict.cache.plan import EvictionPlan, budget_tokens, cdiv

if TYPE_CHECKING:
    from vllm_kvevict.config import EvictionConfig


@dataclass(frozen=True)
class SlidingWindow:
    """A group of layers that see the last tokens only, by a sliding window or in chunks, and are never evicted.

    num_tokens: that it holds of one request at most
    block_size: tokens per block
    """

    num_tokens: int
    block_size: int

    def num_blocks(self, num_tokens: int) -> int:
        """Return the most blocks that a request of ``num_tokens`` holds; the window may begin inside one."""
        return cdiv(min(num_tokens, self.num_tokens), self.block_size) + 1


@dataclass(frozen=True)
class PrefillPlan:
    """How a request is evicted whose prefill begins.

    num_tokens:     tokens to be computed until it decodes: of its prompt, and of its answer if it was preempted
    eviction:       the eviction that is due when so many tokens are in the cache
    evicts_answer:  whether the answer is evicted as it grows
    chunk:          the most tokens of a chunk if each of them is evicted, up to that eviction; 0 if none is
    num_kept:       full blocks that stay between these chunks
    in_place:       whether the kept tokens stay in the last blocks of the prompt, and not in fresh ones
    num_last:       tokens before the eviction that are always computed, whatever the prefix cache has
    """

    num_tokens: int
    eviction: EvictionPlan
    evicts_answer: bool
    chunk: int = 0
    num_kept: int = 0
    in_place: bool = False
    num_last: int = 1

    @property
    def between_chunks(self) -> bool:
        """Whether it is evicted between the chunks of its prompt."""
        return self.chunk > 0

    @property
    def is_late(self) -> bool:
        """Whether the first eviction is due some way into the answer."""
        return self.eviction.num_tokens > self.num_tokens


@dataclass(frozen=True)
class EmptyCache:
    """The KV cache as one request finds it that has all of it to itself.

    num_blocks: blocks that can be allocated; vLLM's null block is none of them
    block_size: tokens per block, in layers that are evicted
    max_tokens: the longest request, tokens
    chunk:      the most tokens that a step computes of a prompt which is evicted between its chunks
    num_drafts: tokens beyond those of the request that a step needs slots for
    num_late:   steps that are scheduled before the blocks which a step gives back are back
    windows:    the other groups of layers
    is_shared:  whether blocks enter a prefix cache
    """

    num_blocks: int
    block_size: int
    max_tokens: int
    chunk: int
    num_drafts: int = 0
    num_late: int = 0
    windows: tuple[SlidingWindow, ...] = ()
    is_shared: bool = True

    def plan_prefill(
        self, config: EvictionConfig, num_prompt: int, num_tokens: int, num_within: int = 0
    ) -> PrefillPlan | None:
        """Return how a prefill of ``num_tokens`` is evicted, None if the budget holds all of the request for ever.

        Only a request that evicts its answer treats that as prompt when it was preempted and starts again. Any other
        one is evicted where its prompt ends, as before.

        num_prompt: tokens of its prompt, which the budget is a fraction of
        num_within: of these, the ones that are protected beside both ends
        """
        method, auto = config.method(), config.auto_budget()
        schedule = method.schedule
        whole = num_prompt + schedule.num_deferred
        budget = budget_tokens(whole, config.most_kept)
        min_tokens = method.min_tokens_with(num_within)
        sizes = (num_tokens if schedule.evicts_answer else num_prompt, budget, self.block_size, min_tokens)
        eviction = schedule.first_eviction(*sizes) if auto is None else auto.plan_most(whole, self.block_size)
        if eviction is None:
            return None
        # vLLM pads a step of one token with drafts, which would be evicted where that token ends the prefill
        prefill = PrefillPlan(num_tokens, eviction, schedule.evicts_answer, num_last=2 if self.num_drafts else 1)
        if schedule.between_chunks:
            prefill = replace(prefill, chunk=self.chunk, num_kept=schedule.blocks_between_chunks(*sizes))
        # fresh blocks are for the prefix cache's sake
        num_ever = max(num_tokens, eviction.num_tokens)
        if self.is_shared and self.fits(prefill, num_ever):
            return prefill
        prefill = replace(prefill, in_place=True)
        if prefill.evicts_answer and num_tokens > num_prompt and not self.fits(None, num_tokens):
            # it has outgrown the cache; what it held, and as long a chunk as fits beside that, does not
            num_kept = schedule.blocks_between_chunks(*sizes)
            num_free = self.num_blocks - self._num_in_windows(num_tokens) - num_kept - 1
            return replace(prefill, chunk=min(num_free * self.block_size, self.chunk), num_kept=num_kept)
        return prefill

    def num_needed(self, prefill: PrefillPlan | None, num_tokens: int) -> int:
        """Return the most blocks that a request holds until ``num_tokens`` of it are computed.

        prefill: how it is evicted; None: it is kept whole
        """
        return self.num_held(prefill, num_tokens) + self._num_in_windows(num_tokens)

    def num_held(self, prefill: PrefillPlan | None, num_tokens: int) -> int:
        """Return ``num_needed`` of layers that are evicted."""
        whole = self._num_blocks(num_tokens)
        if prefill is None:
            return whole
        eviction = prefill.eviction
        before = self._num_blocks(min(num_tokens, eviction.num_tokens + self.num_late))
        if not prefill.in_place and num_tokens >= eviction.num_tokens:
            before += eviction.num_full_blocks
        elif not prefill.in_place and prefill.between_chunks:
            before += prefill.num_kept
        if prefill.between_chunks:
            # what is kept, and a chunk; with fresh blocks what is kept is there twice, as a hit in the prefix cache
            bounded = prefill.num_kept * (1 if prefill.in_place else 2) + cdiv(prefill.chunk, self.block_size) + 1
            before = min(before, bounded)
        if num_tokens <= eviction.num_tokens:
            return before
        return max(before, self.num_decoding(prefill, num_tokens))

    def num_decoding(self, prefill: PrefillPlan, num_tokens: int) -> int:
        """Return the most blocks that a request holds behind its eviction, until ``num_tokens`` of it are computed; of
        layers that are evicted.
        """
        eviction = prefill.eviction
        if prefill.evicts_answer:  # beside what is kept, the block that the answer is written to, and the one before
            return eviction.num_full_blocks + 2
        num_kept = max(eviction.num_kept_blocks, prefill.num_kept + 1)
        return self._num_blocks(num_tokens) - eviction.num_blocks + num_kept

    def fits(self, prefill: PrefillPlan | None, num_tokens: int) -> bool:
        """Return whether a request can hold what it needs until ``num_tokens`` of it are computed."""
        return self.num_needed(prefill, num_tokens) <= self.num_blocks

    def longest(self, prefill: PrefillPlan | None) -> int:
        """Return the most tokens, up to ``max_tokens``, of which a request can hold what it needs."""
        return bisect_right(range(self.max_tokens), self.num_blocks, key=lambda n: self.num_needed(prefill, n + 1))

    def _num_in_windows(self, num_tokens: int) -> int:
        return sum(window.num_blocks(num_tokens) for window in self.windows)

    def _num_blocks(self, num_tokens: int) -> int:
        return cdiv(min(num_tokens + self.num_drafts, self.max_tokens), self.block_size)
