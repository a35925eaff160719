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
    stays = ((torch.arange(plan.num_blocks, device=device) >= last) & plan.keeps_tail).repeat(heads, 1)
    if fresh_block_ids is None:
        full_pages, keeps = _assign_pages(own[:, plan.first_kept_block : last], want)
        stays[:, plan.first_kept_block : last] = keeps
    else:
        full_pages, _ = _assign_pages(
            pool.page_ids(fresh_block_ids.to(device)).reshape(heads, plan.num_full_blocks), want
        )
    page_table = _append_tail(full_pages, want, own, plan)

    survives = _by_page(kept.reshape(heads, -1), plan)  # [heads, num_blocks, block_size]
    lane = torch.arange(plan.block_size, device=device)
    slots = own[..., None] * plan.block_size + lane
    source_mask = survives & ~stays[..., None]
    hole_mask, hole_slots = _holes(survives, stays, full_pages, want, slots, plan)
    # head by head: what one has too many must not end up in the pages of another that lacks some
    num_sources, num_holes = source_mask.sum(dim=(1, 2)), hole_mask.sum(dim=(1, 2))
    if not torch.equal(num_sources, num_holes):
        raise ValueError(
            f"kept: expected as many survivors to move as holes in every head, {num_holes.tolist()}; "
            f"got {num_sources.tolist()}"
        )

    giver = want < plan.num_full_blocks
    phases = []
    for group in (giver, ~giver):
        source = slots[source_mask & group[:, None, None]]
        destination = hole_slots[hole_mask & group[:, None, None]]
        if source.numel():
            phases.append((source, destination))
    shape = num_full_pages.shape
    tail = int(plan.num_tail_tokens > 0)
    return Compaction(
        phases,
        page_table.reshape(*shape, -1),
        (want + tail).reshape(shape),
        (want * plan.block_size + plan.num_tail_tokens).reshape(shape),
    )


def _assign_pages(own: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the full pages of each head [heads, max], 0 past its count, and which of its own it keeps.

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
    return pages, keeps


def _append_tail(pages: torch.Tensor, want: torch.Tensor, own: torch.Tensor, plan: EvictionPlan) -> torch.Tensor:
    if plan.num_tail_tokens == 0:
        return pages
    table = torch.cat([pages, torch.zeros_like(pages[:, :1])], dim=1)
    return table.scatter_(1, want[:, None], own[:, -1:])


def _by_page(kept: torch.Tensor, plan: EvictionPlan) -> torch.Tensor:
    padding = plan.num_blocks * plan.block_size - plan.num_tokens
    padded: torch.Tensor = torch.nn.functional.pad(kept, (0, padding))
    return padded.reshape(len(kept), plan.num_blocks, plan.block_size)


def _holes(
    survives: torch.Tensor,
    stays: torch.Tensor,
    full_pages: torch.Tensor,
    want: torch.Tensor,
    slots: torch.Tensor,
    plan: EvictionPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a mask and slot ids [heads, pages, block_size] of the places each head has to fill.

    Holes in the pages it stays in (short of the tail's end), and all slots of pages taken from other heads.
    """
    lane = torch.arange(plan.block_size, device=slots.device)
    own_holes = stays[..., None] & ~survives
    if plan.num_tail_tokens:
        own_holes[:, -1] &= lane < plan.num_tail_tokens
    num_own = stays.sum(dim=1) - int(plan.num_tail_tokens > 0)
    column = torch.arange(full_pages.shape[1], device=slots.device)
    taken = (column >= num_own[:, None]) & (column < want[:, None])
    mask = torch.cat([own_holes, taken[..., None].expand(-1, -1, plan.block_size)], dim=1)
    return mask, torch.cat([slots, full_pages[..., None] * plan.block_size + lane], dim=1)
