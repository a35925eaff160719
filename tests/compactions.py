"""The moves of one request as plain pairs of slots, and how many tokens each head holds after them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvevict.cache.compaction import Compaction, Compactions
from vllm_kvevict.cache.marks import Marks
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan


@dataclass(frozen=True)
class PlannedCompaction(Compaction):
    """phases: (source, destination) slots, int64 [num_moves] each without gaps, to run in this order; none is empty"""

    phases: list[tuple[torch.Tensor, torch.Tensor]]


def plan_compaction(
    kept: torch.Tensor,
    num_full_pages: torch.Tensor,
    block_ids: torch.Tensor,
    plan: EvictionPlan,
    pool: PagePool,
    fresh_block_ids: torch.Tensor | None = None,
    heads_at_once: int = 1000,
) -> PlannedCompaction:
    """Return what ``Compactions`` has of one request.

    kept:           [num_layers, num_kv_heads, num_tokens] bool
    num_full_pages: [num_layers, num_kv_heads] int64
    """
    own = pool.pages_of(block_ids[None])
    fresh = None if fresh_block_ids is None else pool.pages_of(fresh_block_ids[None])
    tiles = [
        (first, min(first + heads_at_once, num_full_pages.numel()))
        for first in range(0, num_full_pages.numel(), heads_at_once)
    ]
    marks = Marks(kept.flatten(0, 1)[None])
    planned = Compactions(marks, num_full_pages[None], own, [plan], fresh, tiles)
    phases = [(source[source >= 0], destination[source >= 0]) for source, destination in planned.moves()]
    of_request = planned.of(0)
    phases = [phase for phase in phases if phase[0].numel()]
    return PlannedCompaction(of_request.page_table, of_request.num_pages, phases)


def kv_lens_of(compaction: Compaction, plan: EvictionPlan) -> torch.Tensor:
    """Return [num_layers, num_kv_heads] int64, the tokens that each head holds."""
    has_tail = plan.num_tail_tokens > 0
    return (compaction.num_pages - int(has_tail)) * plan.block_size + plan.num_tail_tokens
