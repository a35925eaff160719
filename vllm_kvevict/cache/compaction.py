"""Hole filling: move the survivors of freed pages into fresh pages, or into the slots of evicted tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan


@dataclass(frozen=True)
class Compaction:
    """The moves of one request, and the page table that holds once they are done.

    phases:     (source, destination) slots, int64 [num_moves] each, to run in this order. Inside a phase no slot is
                both read and written, so a phase may run in any order and needs no scratch
    page_table: [num_layers, num_kv_heads, max_pages] int64; full pages, then the tail page, then null page ids (0)
    num_pages:  [num_layers, num_kv_heads] int64, pages of the row in use, the tail page included
    kv_lens:    [num_layers, num_kv_heads] int64, tokens kept
    """

    phases: list[tuple[torch.Tensor, torch.Tensor]]
    page_table: torch.Tensor
    num_pages: torch.Tensor
    kv_lens: torch.Tensor


def plan_compaction(
    kept: torch.Tensor,
    num_full_pages: torch.Tensor,
    block_ids: torch.Tensor,
    plan: EvictionPlan,
    pool: PagePool,
    fresh_block_ids: torch.Tensor | None = None,
) -> Compaction:
    """Lay the kept tokens of one request out in fresh blocks, or in place in the last blocks of its prompt.

    The partly filled last block stays in both cases. A survivor in a page that its head keeps stays where it is.
    Every other one moves, once, into a fresh page, a slot of an evicted token, or a page that another head of the
    request gave away. Heads that give pages away come first: in place they write only into their own pages, and once
    they are done what they gave is free.

    kept:            [num_layers, num_kv_heads, num_tokens] bool, exactly num_full_pages * block_size + tail each
    num_full_pages:  [num_layers, num_kv_heads] int64, sums to the pages of the plan's full blocks
    block_ids:       [num_blocks] the request's block table before the eviction
    fresh_block_ids: [num_full_blocks] blocks that hold nothing yet; None to compact in place

    Raises ValueError if the pages do not add up to the blocks of the plan, or a head keeps another number of tokens.
    """
    device = kept.device
    num_full_pages = num_full_pages.to(device)
    heads = num_full_pages.numel()
    if int(num_full_pages.sum()) != plan.num_full_blocks * heads:
        raise ValueError(
            f"num_full_pages: expected a sum of {plan.num_full_blocks * heads} pages, got {int(num_full_pages.sum())}"
        )
    own = pool.page_ids(block_ids.to(device)).reshape(heads, plan.num_blocks)
    want = num_full_pages.reshape(heads)
    last = plan.first_kept_block + plan.num_full_blocks
    if fresh_block_ids is None:
        shared, num_staying = own[:, plan.first_kept_block : last], want.clamp(max=plan.num_full_blocks)
    else:
        shared = pool.page_ids(fresh_block_ids.to(device)).reshape(heads, plan.num_full_blocks)
        num_staying = torch.zeros_like(want)
    full_pages = _assign_pages(shared, want)
    page_table = _append_tail(full_pages, want, own, plan)

    # the pages that a head stays in are its last ones: what survives before them moves, and behind them if anything
    first_staying = (last - num_staying) * plan.block_size
    end_staying = last * plan.block_size if plan.per_token else plan.num_tokens
    kept = kept.reshape(heads, plan.num_tokens)
    head, source = _survivors(kept, first_staying, end_staying, own, plan)
    hole_mask, hole_slots = _holes(kept, first_staying, end_staying, full_pages, want, num_staying, own, plan)
    # head by head: what one has too many must not end up in the pages of another that lacks some
    every_head = torch.arange(heads, device=device)
    num_sources = torch.searchsorted(head, every_head, right=True) - torch.searchsorted(head, every_head)
    num_holes = hole_mask.sum(dim=1)
    if not torch.equal(num_sources, num_holes):
        raise ValueError(
            f"kept: expected as many survivors to move as holes in every head, {num_holes.tolist()}; "
            f"got {num_sources.tolist()}"
        )
    destination = hole_slots[hole_mask]

    giver = (want < plan.num_full_blocks)[head]
    phases = [(source[group], destination[group]) for group in (giver, ~giver)]
    shape = num_full_pages.shape
    tail = int(plan.num_tail_tokens > 0)
    return Compaction(
        [phase for phase in phases if phase[0].numel()],
        page_table.reshape(*shape, -1),
        (want + tail).reshape(shape),
        (want * plan.block_size + plan.num_tail_tokens).reshape(shape),
    )


def _assign_pages(own: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return the full pages of each head [heads, max], 0 past its count.

    A head keeps its own pages first, the latest of them; what it lacks comes from heads that want fewer.

    own: [heads, num_full_blocks] pages to share out
    """
    num_blocks = own.shape[1]
    keeps = torch.arange(num_blocks, device=own.device) >= num_blocks - want[:, None]
    column = torch.arange(max(int(want.max()), 1), device=own.device)
    pages = torch.zeros(len(own), column.numel(), dtype=torch.int64, device=own.device)
    num_own = want.clamp(max=num_blocks)[:, None]
    pages[column < num_own] = own[keeps]
    pages[(column >= num_own) & (column < want[:, None])] = own[~keeps]
    return pages


def _append_tail(pages: torch.Tensor, want: torch.Tensor, own: torch.Tensor, plan: EvictionPlan) -> torch.Tensor:
    if plan.num_tail_tokens == 0:
        return pages
    table = torch.cat([pages, torch.zeros_like(pages[:, :1])], dim=1)
    return table.scatter_(1, want[:, None], own[:, -1:])


def _survivors(
    kept: torch.Tensor, first_staying: torch.Tensor, end_staying: int, own: torch.Tensor, plan: EvictionPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return head and slot [num_moves] of the kept tokens that leave their page, head by head."""
    end = int(first_staying.max()) if end_staying == plan.num_tokens else plan.num_tokens
    token = torch.arange(end, device=kept.device)
    leaves = (token < first_staying[:, None]) | (token >= end_staying)
    head, token = (kept[:, :end] & leaves).nonzero(as_tuple=True)
    return head, own[head, token // plan.block_size] * plan.block_size + token % plan.block_size


def _holes(
    kept: torch.Tensor,
    first_staying: torch.Tensor,
    end_staying: int,
    full_pages: torch.Tensor,
    want: torch.Tensor,
    num_staying: torch.Tensor,
    own: torch.Tensor,
    plan: EvictionPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a mask and slot ids [heads, places] of the places each head has to fill.

    Holes in the pages it stays in, and all slots of the pages it takes: fresh ones, or those of other heads.
    """
    heads, block_size, device = len(kept), plan.block_size, kept.device
    first = int(first_staying.min())
    token = torch.arange(first, end_staying, device=device)
    own_holes = ~kept[:, first:end_staying] & (token >= first_staying[:, None])
    own_slots = own[:, token // block_size] * block_size + token % block_size
    column = torch.arange(int(num_staying.min()), full_pages.shape[1], device=device)
    taken = (column >= num_staying[:, None]) & (column < want[:, None])
    lane = torch.arange(block_size, device=device)
    taken_slots = full_pages[:, column, None] * block_size + lane
    return (
        torch.cat([own_holes, taken.repeat_interleave(block_size, dim=1)], dim=1),
        torch.cat([own_slots, taken_slots.reshape(heads, -1)], dim=1),
    )
