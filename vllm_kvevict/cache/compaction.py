"""Hole filling: move the survivors of freed pages into fresh pages, or into the slots of evicted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.cache.staging import to_device


class KeptPages(NamedTuple):
    """Where the kept tokens of several requests are once they have moved.

    page_table: [num_reqs, num_layers, num_kv_heads, max_pages] int64; full pages, then the tail page, then 0
    num_pages:  [num_reqs, num_layers, num_kv_heads] int64, pages of the row in use, the tail page included
    widths:     per request, pages of its longest row
    """

    page_table: torch.Tensor
    num_pages: torch.Tensor
    widths: list[int]


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

    @property
    def pages(self) -> KeptPages:
        return KeptPages(self.page_table[None], self.num_pages[None], [self.page_table.shape[2]])


@dataclass(frozen=True)
class Compactions:
    """What a ``Compaction`` is, of several requests together.

    phases:     (source, destination) slots of all requests, int64 [num_moves] each, with gaps of -1
    page_table: [num_reqs, num_layers, num_kv_heads, max_pages] int64
    num_pages:  [num_reqs, num_layers, num_kv_heads] int64
    kv_lens:    [num_reqs, num_layers, num_kv_heads] int64
    widths:     per request, pages of its longest row
    """

    phases: list[tuple[torch.Tensor, torch.Tensor]]
    page_table: torch.Tensor
    num_pages: torch.Tensor
    kv_lens: torch.Tensor
    widths: list[int]

    @property
    def pages(self) -> KeptPages:
        return KeptPages(self.page_table, self.num_pages, self.widths)

    def of(self, req: int, phases: list[tuple[torch.Tensor, torch.Tensor]]) -> Compaction:
        """Return that of one request, to whom these moves belong."""
        page_table = self.page_table[req, :, :, : self.widths[req]]
        return Compaction(phases, page_table, self.num_pages[req], self.kv_lens[req])


def plan_compaction(
    kept: torch.Tensor,
    num_full_pages: torch.Tensor,
    block_ids: torch.Tensor,
    plan: EvictionPlan,
    pool: PagePool,
    fresh_block_ids: torch.Tensor | None = None,
) -> Compaction:
    """Return what ``plan_compactions`` does for a single request. Its moves have no gaps: this waits for the device.

    kept:            [num_layers, num_kv_heads, num_tokens] bool, exactly num_full_pages * block_size + tail each
    num_full_pages:  [num_layers, num_kv_heads] int64, sums to the pages of the plan's full blocks
    block_ids:       [num_blocks] the request's block table before the eviction
    fresh_block_ids: [num_full_blocks] blocks that hold nothing yet; None to compact in place

    Raises ValueError if the pages do not add up to the blocks of the plan, or a head keeps another number of tokens.
    """
    num_full_pages = num_full_pages.cpu()
    _check_pages(num_full_pages[None], [plan])
    num_kept, expected = kept.sum(dim=-1).cpu(), num_full_pages * plan.block_size + plan.num_tail_tokens
    if not num_kept.equal(expected):
        raise ValueError(
            f"kept: expected as many survivors to move as holes in every head, which are {expected.tolist()} tokens "
            f"with those that stay; got {num_kept.tolist()}"
        )
    own = pool.page_ids(block_ids.to(kept.device))[None]
    fresh = None if fresh_block_ids is None else pool.page_ids(fresh_block_ids.to(kept.device))[None]
    planned = plan_compactions(kept[None], num_full_pages[None], own, [plan], fresh)
    phases = [(source[source >= 0], destination[source >= 0]) for source, destination in planned.phases]
    return planned.of(0, [phase for phase in phases if phase[0].numel()])


def plan_compactions(
    kept: torch.Tensor,
    num_full_pages: torch.Tensor,
    own: torch.Tensor,
    plans: Sequence[EvictionPlan],
    fresh: torch.Tensor | None = None,
) -> Compactions:
    """Lay the kept tokens of several requests out in fresh blocks, or in place in the last blocks of their prompts.

    The partly filled last block stays in both cases. A survivor in a page that its head keeps stays where it is.
    Every other one moves, once, into a fresh page, a slot of an evicted token, or a page that another head of the
    request gave away. Heads that give pages away come first: in place they write only into their own pages, and once
    they are done what they gave is free.

    The number of launches does not depend on that of the requests, and nothing waits for the device.

    kept:           [num_reqs, num_layers, num_kv_heads, max_tokens] bool, exactly num_full_pages * block_size + tail
                    each, False behind the tokens of a request
    num_full_pages: [num_reqs, num_layers, num_kv_heads] int64 on the CPU; those of a request sum to the pages of its
                    plan's full blocks
    own:            [num_reqs, num_layers, num_kv_heads, max_blocks] int64, the pages of the requests' blocks
    plans:          [num_reqs] alike in ``block_size`` and ``per_token``
    fresh:          [num_reqs, num_layers, num_kv_heads, max_full_blocks] int64, pages that hold nothing yet; None to
                    compact in place

    Raises ValueError if the pages do not add up to the blocks of the plans.
    """
    _check_pages(num_full_pages, plans)
    layout = _Layout.of(num_full_pages, own, plans, fresh)
    kept = kept.flatten(1, 2)
    req, head, sources = layout.survivors(kept)
    destinations = layout.holes(kept)
    parts = [req >= 0]
    if fresh is None:
        gives = (layout.want < layout.num_full)[req, head]
        parts = [parts[0] & gives, parts[0] & ~gives]
    widths = [
        max(most, 1) + (plan.num_tail_tokens > 0)
        for most, plan in zip(num_full_pages.flatten(1).amax(dim=1).tolist(), plans, strict=True)
    ]
    shape = num_full_pages.shape
    return Compactions(
        [(sources.masked_fill(~part, -1), destinations.masked_fill(~part, -1)) for part in parts],
        layout.page_table()[..., : max(widths)].view(*shape, -1),
        (layout.want + (layout.num_tail > 0)).view(shape),
        (layout.want * layout.block_size + layout.num_tail).view(shape),
        widths,
    )


def _check_pages(num_full_pages: torch.Tensor, plans: Sequence[EvictionPlan]) -> None:
    heads = num_full_pages[0].numel()
    for pages, plan in zip(num_full_pages.flatten(1).sum(dim=1).tolist(), plans, strict=True):
        if pages != plan.num_full_blocks * heads:
            raise ValueError(f"num_full_pages: expected a sum of {plan.num_full_blocks * heads} pages, got {pages}")


def _last(plan: EvictionPlan) -> int:
    """Return the block behind the full ones that a request keeps."""
    return plan.first_kept_block + plan.num_full_blocks


def _end_staying(plan: EvictionPlan) -> int:
    """Return the token behind those that may stay where they are."""
    return _last(plan) * plan.block_size if plan.per_token else plan.num_tokens


@dataclass(frozen=True)
class _Layout:
    """Which pages each head gets, of several requests. Here ``heads`` are those of all layers.

    own:         [num_reqs, heads, max_blocks] pages of the requests' blocks
    full_pages:  [num_reqs, heads, 1 + most pages of a head], 0 past its count
    want:        [num_reqs, heads] full pages of each head
    num_staying: [num_reqs, heads] of these, pages in which its tokens are already: the last ones of its prompt
    num_full:    [num_reqs, 1] pages that the heads of a request get on average
    num_tail:    [num_reqs, 1] tokens of the partly filled last page
    last:        [num_reqs, 1] block behind the full ones that stay
    end_staying: [num_reqs, 1] token behind those that may stay where they are
    fewest, most: per request, of ``num_staying``; they and the plans are known to the host
    """

    plans: Sequence[EvictionPlan]
    own: torch.Tensor
    full_pages: torch.Tensor
    want: torch.Tensor
    num_staying: torch.Tensor
    num_full: torch.Tensor
    num_tail: torch.Tensor
    last: torch.Tensor
    end_staying: torch.Tensor
    fewest: list[int]
    most: list[int]

    @classmethod
    def of(
        cls, num_full_pages: torch.Tensor, own: torch.Tensor, plans: Sequence[EvictionPlan], fresh: torch.Tensor | None
    ) -> _Layout:
        """The arguments are those of ``plan_compactions``."""
        want = num_full_pages.flatten(1)
        staying = want.minimum(torch.tensor([[plan.num_full_blocks * (fresh is None)] for plan in plans]))
        sizes = [[plan.num_full_blocks, plan.num_tail_tokens, _last(plan), _end_staying(plan)] for plan in plans]
        copied = to_device(torch.cat([torch.tensor(sizes), want, staying], dim=1).numpy(), own.device)
        num_full, num_tail, last, end_staying, on_device, num_staying = copied.split(
            [1, 1, 1, 1, want.shape[1], want.shape[1]], dim=1
        )
        own = own.flatten(1, 2)
        # the pages that are shared out: own ones, or fresh ones
        shared, first = own, last - num_full
        if fresh is not None and fresh.shape[3]:
            shared, first = fresh.flatten(1, 2), torch.zeros_like(last)
        full_pages = _assign_pages(shared, first, num_full, on_device, max(map(max, want.tolist())) + 1)
        ends = staying.amin(dim=1).tolist(), staying.amax(dim=1).tolist()
        return cls(plans, own, full_pages, on_device, num_staying, num_full, num_tail, last, end_staying, *ends)

    @property
    def block_size(self) -> int:
        return self.plans[0].block_size

    @property
    def _most_moves(self) -> int:
        return sum(plan.num_kept_tokens for plan in self.plans) * self.want.shape[1]

    @property
    def _first_staying(self) -> torch.Tensor:
        """[num_reqs, heads, 1] first token of the pages that a head stays in."""
        return ((self.last - self.num_staying) * self.block_size)[..., None]

    def page_table(self) -> torch.Tensor:
        """Return [num_reqs, heads, max_pages], full pages, then the tail page, then 0."""
        if not any(plan.num_tail_tokens for plan in self.plans):
            return self.full_pages
        last_block = self.last.clamp(max=self.own.shape[2] - 1)[..., None].expand(-1, self.want.shape[1], -1)
        tail_page = self.own.gather(2, last_block).masked_fill(self.num_tail[..., None] == 0, 0)
        return self.full_pages.scatter(2, self.want[..., None], tail_page)

    def survivors(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return request, head and slot [num_moves] of the kept tokens that leave their page, head by head; then -1.

        kept: [num_reqs, heads, max_tokens]
        """
        ends = [
            plan.num_tokens if plan.per_token else (_last(plan) - fewest) * plan.block_size
            for plan, fewest in zip(self.plans, self.fewest, strict=True)
        ]
        token = torch.arange(max(ends), device=kept.device)
        leaves = (token < self._first_staying) | (token >= self.end_staying[..., None])
        found = (kept[..., : len(token)] & leaves).nonzero_static(size=self._most_moves)
        req, head, token = found.unbind(dim=1)
        return req, head, self._own_slots(req, head, token)

    def holes(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the slots [num_moves] of the places that each head has to fill, head by head; then -1.

        Holes in the pages it stays in, and all slots of the pages it takes: fresh ones, or those of other heads.

        kept: [num_reqs, heads, max_tokens]
        """
        first = [(_last(plan) - most) * plan.block_size for plan, most in zip(self.plans, self.most, strict=True)]
        width = max(_end_staying(plan) - start for plan, start in zip(self.plans, first, strict=True))
        first_token = to_device(np.array(first, dtype=np.int64), kept.device)
        token = (first_token[:, None] + torch.arange(width, device=kept.device))[:, None]  # [num_reqs, 1, width]
        is_staying = (token >= self._first_staying) & (token < self.end_staying[..., None])
        marks = kept.gather(2, token.clamp(max=kept.shape[2] - 1).expand(-1, kept.shape[1], -1))

        first_column = min(self.fewest)
        column = torch.arange(first_column, self.full_pages.shape[2], device=kept.device)
        taken = (column >= self.num_staying[..., None]) & (column < self.want[..., None])
        taken_slots = taken[..., None].expand(-1, -1, -1, self.block_size).flatten(2)
        holes = torch.cat([is_staying & ~marks, taken_slots], dim=2)
        req, head, place = holes.nonzero_static(size=self._most_moves).unbind(dim=1)
        behind = (place - width).clamp(min=0)
        column, lane = first_column + behind // self.block_size, behind % self.block_size
        of_taken = self.full_pages[req, head, column] * self.block_size + lane
        of_own = self._own_slots(req, head, first_token[req] + place.clamp(max=width - 1))
        return torch.where(place < width, of_own, of_taken).masked_fill(req < 0, -1)

    def _own_slots(self, req: torch.Tensor, head: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        block = (token // self.block_size).clamp(max=self.own.shape[2] - 1)  # of a token that is none
        return self.own[req, head, block] * self.block_size + token % self.block_size


def _assign_pages(
    shared: torch.Tensor, first: torch.Tensor, num_blocks: torch.Tensor, want: torch.Tensor, width: int
) -> torch.Tensor:
    """Return the full pages of each head [num_reqs, heads, width], 0 past its count.

    A head keeps its own pages first, the latest of them; what it lacks comes from heads of its request that want fewer.

    shared:     [num_reqs, heads, max_blocks] pages, of which ``num_blocks`` [num_reqs, 1] from ``first`` [num_reqs, 1]
                on are shared out
    want:       [num_reqs, heads]
    """
    block, column = (torch.arange(size, device=shared.device) for size in (shared.shape[2], width))
    num_own = want.minimum(num_blocks)[..., None]
    first_own = (first + num_blocks)[..., None] - num_own
    given = ((block >= first[..., None]) & (block < first_own)).flatten(1)
    place = torch.where(given, given.cumsum(dim=1) - 1, given.shape[1])
    given_pages = shared.new_zeros(len(shared), given.shape[1] + 1).scatter_(1, place, shared.flatten(1))
    is_taken = (column >= num_own) & (column < want[..., None])
    place = (is_taken.flatten(1).cumsum(dim=1) - 1).clamp(min=0)
    taken = given_pages.gather(1, place).view(is_taken.shape)
    own = shared.gather(2, (first_own + column).clamp(max=shared.shape[2] - 1))
    return torch.where(is_taken, taken, own.masked_fill(column >= num_own, 0))
