"""When a request is evicted: what may combine, and the first eviction that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vllm_kvevict.cache.plan import (
    EvictionPlan,
    budget_blocks,
    plan_eviction,
    plan_first_eviction,
    plan_per_token,
)


class DuringDecode(Enum):
    """How eviction goes on while an answer grows."""

    NOT = "not"
    BY_BLOCK = "a block at a time"
    BY_TOKEN = "token by token"


@dataclass(frozen=True)
class Schedule:
    """When a request is evicted.

    num_deferred:   tokens of the answer that the first eviction waits for; 0: it is due at the end of the prompt
    between_chunks: whether each chunk of the prompt is evicted before the next one
    during_decode:  whether, and how, eviction goes on while the answer grows

    Raises ValueError for a combination that nothing can carry out.
    """

    num_deferred: int = 0
    between_chunks: bool = False
    during_decode: DuringDecode = DuringDecode.NOT

    def __post_init__(self) -> None:
        if self.num_deferred and self.between_chunks:
            raise ValueError("the policy holds the whole prompt until it has seen the answer")

    @property
    def evicts_answer(self) -> bool:
        """Whether eviction goes on while the answer grows."""
        return self.during_decode is not DuringDecode.NOT

    @property
    def per_token(self) -> bool:
        """Whether each new token of the answer takes the slot of one that goes."""
        return self.during_decode is DuringDecode.BY_TOKEN

    @property
    def is_bounded(self) -> bool:
        """Whether what an eviction leaves may be evicted again."""
        return self.between_chunks or self.evicts_answer

    def first_eviction(self, num_tokens: int, budget: int, block_size: int, min_tokens: int) -> EvictionPlan | None:
        """Return the plan of the first eviction of a prefill of ``num_tokens``, None if its budget holds all of it.

        It is due when as many tokens as it says are in the cache: at the end of the prefill, or later.

        budget, min_tokens: tokens per KV head and layer, as in ``plan_eviction``
        """
        sizes = (num_tokens + self.num_deferred, budget, block_size, min_tokens)
        if self.per_token:
            return plan_per_token(*sizes)
        plan = plan_eviction(*sizes, self.evicts_answer)
        return plan_first_eviction(*sizes) if plan is None and self.evicts_answer else plan

    def blocks_between_chunks(self, num_tokens: int, budget: int, block_size: int, min_tokens: int) -> int:
        """Return how many full blocks stay between the chunks of a prompt; the arguments are as above."""
        return budget_blocks(num_tokens + self.num_deferred, budget, block_size, min_tokens, during_decode=True) - 1
