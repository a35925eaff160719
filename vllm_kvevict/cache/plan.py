"""How many blocks a prompt keeps: the arithmetic that the scheduler and the workers share."""

from __future__ import annotations

import math
from dataclasses import dataclass


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class EvictionPlan:
    """The block counts of one eviction. Made by the scheduler, obeyed by every worker.

    num_tokens:      tokens in the cache when the prefill ends
    num_kept_blocks: blocks the request keeps; they stand at the end of its block table
    block_size:      tokens per block
    per_token:       whether from now on each new token takes the slot of one that is evicted. Then the tokens of the
                     partly filled last block go where the others are; else decode goes on behind them
    """

    num_tokens: int
    num_kept_blocks: int
    block_size: int
    per_token: bool = False

    @property
    def num_blocks(self) -> int:
        """Blocks before the eviction, the partly filled last one included."""
        return cdiv(self.num_tokens, self.block_size)

    @property
    def first_kept_block(self) -> int:
        """Where the kept blocks begin in the table; null blocks stand before them."""
        return self.num_blocks - self.num_kept_blocks

    @property
    def num_tail_tokens(self) -> int:
        """Tokens that stay in the partly filled last block, 0 if the last block is full."""
        return 0 if self.per_token else self.num_tokens % self.block_size

    @property
    def num_full_blocks(self) -> int:
        """Kept blocks that are full; the pages of these are what an allocator shares out."""
        return self.num_kept_blocks - (self.num_tokens % self.block_size > 0)

    @property
    def num_kept_tokens(self) -> int:
        """Prompt tokens kept per KV head and layer, averaged over them."""
        return self.num_full_blocks * self.block_size + self.num_tail_tokens

    @property
    def num_evicted_tokens(self) -> int:
        """Prompt tokens dropped per KV head and layer, averaged over them."""
        return self.num_tokens - self.num_kept_tokens


def plan_eviction(
    num_tokens: int, budget: int | float, block_size: int, min_tokens: int, during_decode: bool = False
) -> EvictionPlan | None:
    """Return the plan for a prefill of ``num_tokens``, or None if its budget holds all of it.

    budget:        tokens per (layer, KV head) if int, fraction of the prompt kept if float; rounded up to blocks
    min_tokens:    a budget never keeps fewer blocks than these tokens need
    during_decode: the last block of the budget is for the answer, and never full when the prefill ends
    """
    num_kept = budget_blocks(num_tokens, budget, block_size, min_tokens, during_decode)
    if during_decode:
        num_kept -= num_tokens % block_size == 0
    if num_kept >= cdiv(num_tokens, block_size):
        return None
    return EvictionPlan(num_tokens, num_kept, block_size)


def plan_first_eviction(num_tokens: int, budget: int | float, block_size: int, min_tokens: int) -> EvictionPlan:
    """Return the plan for a request whose budget holds its prompt of ``num_tokens``, but not an answer of any length.

    It is carried out when the last block of the budget is full, which then is for what comes next.
    """
    num_blocks = budget_blocks(num_tokens, budget, block_size, min_tokens, during_decode=True)
    return EvictionPlan(num_blocks * block_size, num_blocks - 1, block_size)


def plan_per_token(num_tokens: int, budget: int | float, block_size: int, min_tokens: int) -> EvictionPlan:
    """Return the plan for a request whose new tokens take the slots of evicted ones as soon as its budget is full.

    One block of the budget is where vLLM writes new tokens to; what is kept fills the others. The plan is carried out
    when there are as many tokens as these hold, which may be at the end of the prompt, or some way into the answer.
    """
    num_full = budget_blocks(num_tokens, budget, block_size, min_tokens, during_decode=True) - 1
    num_tokens = max(num_tokens, num_full * block_size)
    return EvictionPlan(num_tokens, num_full + (num_tokens % block_size > 0), block_size, per_token=True)


def budget_blocks(num_tokens: int, budget: int | float, block_size: int, min_tokens: int, during_decode: bool) -> int:
    """Return the blocks that a request of ``num_tokens`` may hold; the arguments are those of ``plan_eviction``."""
    kept = cdiv(budget_tokens(num_tokens, budget), block_size)
    return max(kept, min_kept_blocks(min_tokens, block_size, during_decode))


def budget_tokens(num_tokens: int, budget: int | float) -> int:
    """Return the tokens that ``budget`` is, of ``num_tokens`` if it is a fraction."""
    # rounded first: 0.07 * 1600 is a little more than 112
    return budget if isinstance(budget, int) else math.ceil(round(budget * num_tokens, 6))


def min_kept_blocks(min_tokens: int, block_size: int, during_decode: bool = False) -> int:
    """Return the fewest blocks that hold ``min_tokens`` tokens even if the last block holds a single one.

    during_decode: even if the last block is empty
    """
    return cdiv(max(min_tokens, 1) - (not during_decode), block_size) + 1
