"""How a request is evicted, as a paper publishes it: policy, allocator, protected tokens and schedule together."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvevict.budgets import BudgetAllocator
from vllm_kvevict.eviction.schedule import Schedule
from vllm_kvevict.eviction.traits import allocator_traits_of, traits_of
from vllm_kvevict.foreign.code import contained
from vllm_kvevict.policies.base import EvictionPolicy, Need

_AT_THE_END = Schedule()


@dataclass(frozen=True)
class Method:
    """A policy, an allocator, how many tokens both ends of the prompt are protected by, and when they are asked."""

    policy: EvictionPolicy
    allocator: BudgetAllocator
    num_sink: int
    num_recent: int
    schedule: Schedule = _AT_THE_END

    @property
    def num_protected(self) -> int:
        return self.num_sink + self.num_recent

    @property
    def query_window(self) -> int:
        """Last queries of the prompt that the policy or the allocator looks at."""
        return max(traits_of(self.policy).query_window, allocator_traits_of(self.allocator).query_window)

    @property
    def watches_answer(self) -> bool:
        """Whether the engine must remember queries of the answer."""
        is_watched = self.schedule.evicts_answer or self.schedule.num_deferred > 0
        return is_watched and (self.query_window > 0 or Need.ALL_QUERIES in traits_of(self.policy).needs)

    @property
    def needs_reserve(self) -> bool:
        """Whether the engine must hold more of a request than its pages: what its slots hold, or its last queries."""
        return self.schedule.is_bounded or self.watches_answer

    @property
    def min_tokens(self) -> int:
        """Tokens that a budget must hold: the protected ones, and those whose queries are looked at.

        A prefix-cache hit never covers the latter, so they are always computed and never scored in part. If each new
        token takes the slot of another one, that one is neither.
        """
        return self.min_tokens_with(0)

    def min_tokens_with(self, num_within: int) -> int:
        """Return ``min_tokens`` of a request of which so many tokens are protected beside both ends of its prompt."""
        return max(self.num_protected + num_within, self.query_window) + self.schedule.per_token


def are_equal(one: Method, other: Method) -> bool:
    """Return whether both evict alike. A third party's options may be tensors, whose equality is no truth value."""
    with contained():
        return one is other or one == other
    return False
