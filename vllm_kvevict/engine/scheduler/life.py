"""The life of a request that is evicted, as the scheduler keeps it: its states, and what each step does to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.config import AUTO, EvictionConfig
from vllm_kvevict.engine.fit import PrefillPlan
from vllm_kvevict.engine.messages import ChunkEnd, PrefillEnd, StepEvictions
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.protection import Spans
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies import Need

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class State(Enum):
    """Where a request stands. vLLM's own status knows nothing of evictions, and these follow it."""

    WAITING = "waiting"  # no step of it was scheduled yet
    PREFILLING = "prefilling"  # its first eviction is still to come, and so is a part of its prompt
    EVICTING = "evicting"  # a step that evicts from it is scheduled, and no worker has said that it was done
    EVICTED = "evicted"  # the workers have evicted, and more of its prefill is to come
    DECODING = "decoding"  # its answer grows, on what was kept or, where the first eviction is due later, on all of it
    PREEMPTED = "preempted"  # vLLM has taken its blocks away; it waits to start again
    RESUMED = "resumed"  # as prefilling, once more
    FAILED = "failed"  # an eviction has failed: it ends with an error
    FINISHED = "finished"


_LEGAL = {
    State.WAITING: {State.PREFILLING, State.FINISHED},
    State.PREFILLING: {State.EVICTING, State.DECODING, State.PREEMPTED, State.FAILED, State.FINISHED},
    State.EVICTING: {State.EVICTED, State.DECODING, State.PREEMPTED, State.FAILED, State.FINISHED},
    State.EVICTED: {State.EVICTING, State.DECODING, State.PREEMPTED, State.FAILED, State.FINISHED},
    State.DECODING: {State.EVICTING, State.PREEMPTED, State.FAILED, State.FINISHED},
    State.PREEMPTED: {State.RESUMED, State.FAILED, State.FINISHED},
    State.RESUMED: {State.EVICTING, State.DECODING, State.PREEMPTED, State.FAILED, State.FINISHED},
    State.FAILED: {State.FINISHED},
    State.FINISHED: set(),
}


class IllegalTransitionError(RuntimeError):
    """The scheduler has lost track of a request; to go on would be to read memory that is not its own."""


@dataclass(frozen=True)
class BlocksToFree:
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
class RequestLife:
    """One request from its arrival to its end. Every change of its state is one of ``_LEGAL``.

    Its kept tokens go into fresh blocks if there are any, so that nothing in the prefix cache is ever rewritten; a
    prompt too long for that is compacted in place, and the blocks it keeps are never shared.

    method:       of ``config``, built once: a third party's code may be in it
    prefill:      the one that goes on, or is next
    spans:        what is protected beside both ends of its prompt
    num_tokens:   in the cache once every step that was scheduled is through
    evictions:    of this prefill and the answer behind it, in the order in which they were scheduled
    num_pending:  of these, those that no worker has reported yet
    counted:      the last of them that was carried out, for the gauges
    fresh_blocks: taken for the first eviction, and held here until they enter the request's table
    to_free:      blocks to be freed, in order
    """

    config: EvictionConfig
    method: Method
    prefill: PrefillPlan
    spans: Spans = ()
    state: State = State.WAITING
    num_tokens: int = 0
    evictions: list[EvictionPlan] = field(default_factory=list)
    num_pending: int = 0
    counted: EvictionPlan | None = None
    fresh_blocks: list[KVCacheBlock] = field(default_factory=list)
    to_free: list[BlocksToFree] = field(default_factory=list)

    def _enter(self, state: State) -> None:
        if state is self.state:
            return
        if state not in _LEGAL[self.state]:
            raise IllegalTransitionError(f"a request that is {self.state.value} cannot become {state.value}")
        self.state = state

    @property
    def plan(self) -> EvictionPlan:
        """The last eviction that was scheduled, or the one that is due first."""
        return self.evictions[-1] if self.evictions else self.prefill.eviction

    @property
    def has_prefilled(self) -> bool:
        """Whether the last step of its prefill was scheduled."""
        return self.num_tokens >= self.prefill.num_tokens

    @property
    def is_decided(self) -> bool:
        """Whether nothing is left to decide: it decodes on what was kept."""
        return self.state is State.DECODING and bool(self.evictions) and not self._goes_on

    @property
    def num_shared_tokens(self) -> int:
        """Tokens after these, whole blocks of them, never enter the prefix cache."""
        plan = self.evictions[0] if self.evictions else self.prefill.eviction
        if not self.prefill.in_place:
            return plan.num_tokens // plan.block_size * plan.block_size
        return 0 if self.prefill.between_chunks else plan.first_kept_block * plan.block_size

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that may come from the prefix cache: none that will be rewritten, and none that a policy looks at."""
        prefill, window = self.prefill, self.method.query_window
        needs = traits_of(self.method.policy).needs
        if Need.ALL_QUERIES in needs or self.config.budget == AUTO:  # all of the prompt is looked at
            return 0
        most = min(self.num_shared_tokens, prefill.eviction.num_tokens - max(window, prefill.num_last))
        if prefill.between_chunks:  # a longer hit would have to be held at once, and the first eviction may follow it
            most = min(most, prefill.num_kept * prefill.eviction.block_size - window)
        return max(most, 0)

    def start(self, prefill: PrefillPlan) -> None:
        """A prefill is about to begin: the first one, or once more after a preemption."""
        if self.state not in (State.WAITING, State.PREEMPTED):
            raise IllegalTransitionError(f"a request that is {self.state.value} cannot start a prefill")
        self.prefill, self.num_tokens = prefill, 0

    def limit_chunk(self, num_computed: int, num_new: int) -> int:
        """Return how many of ``num_new`` tokens a step may compute of a request that has ``num_computed``.

        A chunk ends where the first eviction is due; the next one waits for the blocks that an eviction has emptied.
        """
        prefill = self.prefill
        has_prefilled = num_computed >= prefill.num_tokens
        waits = prefill.between_chunks and num_computed == prefill.num_tokens
        if self.state is State.EVICTING and (waits or not has_prefilled):
            return 0
        if has_prefilled:
            return num_new
        if prefill.between_chunks:
            num_new = min(num_new, prefill.chunk)
        missing = prefill.eviction.num_tokens - num_computed
        return min(num_new, missing) if missing > 0 else num_new

    def scheduled(self, req_id: str, num_tokens: int, step: StepEvictions) -> None:
        """A step was scheduled after which the request has ``num_tokens`` in the cache: tell the workers what to do."""
        if self.state in (State.WAITING, State.PREEMPTED):
            self._enter(State.PREFILLING if self.state is State.WAITING else State.RESUMED)
        had_prefilled, self.num_tokens = self.has_prefilled, num_tokens
        if self.evictions:
            self._evict_again(req_id, had_prefilled, step)
        else:
            self._evict_first(req_id, had_prefilled, step)
        if self.has_prefilled and not self.num_pending:
            self._enter(State.DECODING)

    def _evict_first(self, req_id: str, had_prefilled: bool, step: StepEvictions) -> None:
        due, num_tokens = self.prefill.eviction, self.num_tokens
        if num_tokens > due.num_tokens:
            raise IllegalTransitionError(f"a step ends at {num_tokens} tokens, an eviction was due at {due.num_tokens}")
        plan = self._first_plan(num_tokens)
        if plan is not None:
            blocks = BlocksToFree(plan.num_tokens, 0, plan.first_kept_block + len(self.fresh_blocks), self.fresh_blocks)
            self._evict(plan, blocks)
            fresh = None if self.prefill.in_place else [block.block_id for block in self.fresh_blocks]
            step.ending[req_id] = PrefillEnd(
                self.config, plan, fresh, is_late=had_prefilled, goes_on=self._goes_on, spans=self.spans
            )
        elif not had_prefilled:
            step.prefilling[req_id] = self.config
        elif num_tokens % due.block_size == 0:
            step.growing[req_id] = num_tokens

    def _evict_again(self, req_id: str, had_prefilled: bool, step: StepEvictions) -> None:
        plan, prefill, num_tokens = self.plan, self.prefill, self.num_tokens
        if had_prefilled:
            if prefill.evicts_answer and num_tokens % plan.block_size == 0:
                step.shrinking[req_id] = num_tokens
                self.num_pending += 1
                self._enter(State.EVICTING)
        elif prefill.between_chunks and (prefill.evicts_answer or num_tokens <= prefill.eviction.num_tokens):
            # the full blocks stay, and what was filled since then goes
            first, stop = plan.num_tokens // plan.block_size, num_tokens // plan.block_size
            num_kept = plan.num_full_blocks + (num_tokens % plan.block_size > 0)
            per_token = self.has_prefilled and self.method.schedule.per_token
            plan = replace(plan, num_tokens=num_tokens, num_kept_blocks=num_kept, per_token=per_token)
            self._evict(plan, BlocksToFree(num_tokens, first, stop, []))
            step.chunks[req_id] = ChunkEnd(plan, self._goes_on)

    def _evict(self, plan: EvictionPlan, blocks: BlocksToFree) -> None:
        self.evictions.append(plan)
        self.to_free.append(blocks)
        self.num_pending += 1
        self._enter(State.EVICTING)

    def _first_plan(self, num_tokens: int) -> EvictionPlan | None:
        """Return the plan of a first eviction in a step that ends at ``num_tokens``, None if it needs none."""
        due = self.prefill.eviction
        if num_tokens >= due.num_tokens:
            return due
        if not self.prefill.between_chunks or num_tokens >= self.prefill.num_tokens:
            return None
        block_size = due.block_size
        num_kept = self.prefill.num_kept + (num_tokens % block_size > 0)
        return EvictionPlan(num_tokens, num_kept, block_size) if num_kept < cdiv(num_tokens, block_size) else None

    @property
    def _goes_on(self) -> bool:
        """Whether more evictions follow the one that was scheduled last."""
        prefill = self.prefill
        return prefill.evicts_answer or (prefill.between_chunks and self.num_tokens < prefill.eviction.num_tokens)

    def num_fresh_blocks(self, num_tokens: int) -> int:
        """Return how many fresh blocks a step needs that computes the request up to ``num_tokens``."""
        if self.prefill.in_place or self.fresh_blocks or self.evictions:
            return 0
        plan = self._first_plan(num_tokens)
        return 0 if plan is None else plan.num_full_blocks

    def reuses_last_block(self, num_tokens: int, num_blocks: int) -> bool:
        """Return whether a request that holds ``num_blocks`` goes on to ``num_tokens`` in its last block.

        The answer has filled that block, and the workers empty it before they write to it again.
        """
        if not (self.evictions and self.has_prefilled and self.prefill.evicts_answer):
            return False
        is_of_the_answer = num_blocks > self.plan.num_tokens // self.plan.block_size
        return is_of_the_answer and num_tokens > num_blocks * self.plan.block_size

    def adopt(self, chosen: EvictionPlan) -> None:
        """The workers have chosen a plan that keeps fewer blocks than the one of the first eviction."""
        blocks = self.to_free[0]
        num_surplus = self.evictions[0].num_kept_blocks - chosen.num_kept_blocks
        self.evictions[0] = chosen
        if self.prefill.in_place:
            self.to_free[0] = replace(blocks, stop=blocks.stop + num_surplus)
        else:
            fresh = blocks.fresh
            self.to_free[0] = replace(blocks, fresh=fresh[num_surplus:], surplus=fresh[:num_surplus])

    def evicted(self) -> None:
        """The workers have carried out the eviction that was scheduled first of those that they have not reported."""
        if not self.num_pending:
            raise IllegalTransitionError(f"a request that is {self.state.value} waits for no eviction")
        self.num_pending -= 1
        if not self.num_pending:
            self._enter(State.DECODING if self.has_prefilled else State.EVICTED)

    def failed(self) -> None:
        """A worker could not evict, by a fault of a policy or an allocator: the request ends with an error."""
        self._enter(State.FAILED)

    def give_back(self) -> list[KVCacheBlock]:
        """The request loses its blocks: forget what was evicted, and return the fresh blocks that it held here."""
        fresh, self.fresh_blocks = self.fresh_blocks, []
        self.evictions, self.to_free, self.num_pending, self.counted = [], [], 0, None
        return fresh

    def preempted(self) -> None:
        """vLLM has taken its blocks away; a prefill follows that computes its answer, too."""
        self._enter(State.PREEMPTED)

    def finished(self) -> None:
        """It ends: by itself, with an error, or since its client has gone."""
        self._enter(State.FINISHED)
