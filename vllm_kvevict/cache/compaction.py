"""Hole filling: move the survivors of freed pages into fresh pages, or into the slots of evicted tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from vllm_kvevict.cache.marks import Marks
from vllm_kvevict.cache.pages import BlockPages
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.cache.staging import to_device

# What is held at once: by each token that may move, by each token of a prompt, and by each page of a result.
BYTES_PER_MOVE, BYTES_PER_TOKEN, BYTES_PER_PAGE = 88, 6, 72

Moves = tuple[torch.Tensor, torch.Tensor]


class KeptPages(NamedTuple):
    """Where the kept tokens of several requests are once they have moved.

    page_table: [num_reqs, num_layers, num_kv_heads, max_pages] int32; full pages, then the tail page, then 0
    num_pages:  [num_reqs, num_layers, num_kv_heads] int64, pages of the row in use, the tail page included
    widths:     per request, pages of its longest row
    """

    page_table: torch.Tensor
    num_pages: torch.Tensor
    widths: list[int]


@dataclass(frozen=True)
class Compaction:
    """The page table of one request that holds once its tokens have moved.

    page_table: [num_layers, num_kv_heads, max_pages] int32; full pages, then the tail page, then null page ids (0)
    num_pages:  [num_layers, num_kv_heads] int64, pages of the row in use, the tail page included
    """

    page_table: torch.Tensor
    num_pages: torch.Tensor

    @property
    def pages(self) -> KeptPages:
        return KeptPages(self.page_table[None], self.num_pages[None], [self.page_table.shape[2]])


class Compactions:
    """The moves of several requests, and the page tables that hold once they are done.

    The kept tokens are laid out in fresh blocks, or in place in the last blocks of their prompts. The partly filled
    last block stays in both cases. A survivor in a page that its head keeps stays where it is. Every other one moves,
    once, into a fresh page, a slot of an evicted token, or a page that another head of the request gave away. Heads
    that give pages away come first: in place they write only into their own pages, and once they are done what they
    gave is free.

    Moves are planned for as many heads at once as fit into the scratch; those of the first ones now, so that it is
    known that there is memory for them. Where all fit, nothing is planned later.

    The number of launches does not depend on that of the requests, and nothing waits for the device.

    page_table: [num_reqs, num_layers, num_kv_heads, max_pages] int32
    num_pages:  [num_reqs, num_layers, num_kv_heads] int64
    """

    def __init__(
        self,
        kept: Marks,
        num_full_pages: torch.Tensor,
        own: BlockPages,
        plans: Sequence[EvictionPlan],
        fresh: BlockPages | None,
        tiles: Sequence[tuple[int, int]],
    ) -> None:
        """kept:        exactly num_full_pages * block_size + tail tokens each, none behind the tokens of a request
        num_full_pages: [num_reqs, num_layers, num_kv_heads] int64 on the CPU; those of a request sum to the pages of
                        its plan's full blocks
        own:            of the requests' blocks
        plans:          [num_reqs] alike in ``block_size`` and ``per_token``
        fresh:          of blocks that hold nothing yet, as many as the plans' full ones; None to compact in place
        tiles:          bounds of heads, counted through all layers, that are planned at once

        Raises ValueError if the pages do not add up to the blocks of the plans.
        """
        _check_pages(num_full_pages, plans)
        self._kept, self._tiles, self._is_in_place = kept, tiles, fresh is None
        self._layout = _Layout.of(num_full_pages, own, plans, fresh)
        self._widths = [
            max(most, 1) + (plan.num_tail_tokens > 0)
            for most, plan in zip(num_full_pages.flatten(1).amax(dim=1).tolist(), plans, strict=True)
        ]
        tables = [self._layout.page_table(*tile) for tile in tiles]
        shape = num_full_pages.shape
        self._pages = tables[0] if len(tables) == 1 else _joined(tables)
        self.page_table = self._pages[..., : max(self._widths)].view(*shape, -1)
        self.num_pages = (self._layout.want + (self._layout.num_tail > 0)).view(shape)
        self._first = self._planned(*tiles[0])

    @property
    def pages(self) -> KeptPages:
        return KeptPages(self.page_table, self.num_pages, self._widths)

    def of(self, req: int) -> Compaction:
        """Return the result for one request."""
        return Compaction(self.page_table[req, :, :, : self._widths[req]], self.num_pages[req])

    def moves(self) -> Iterator[Moves]:
        """Yield (source, destination) slots, int64 [num_moves] each, with gaps of -1, to run in this order.

        Inside one of them no slot is both read and written, so that it may run in any order and needs no scratch.
        """
        for giving in (True, False) if self._is_in_place else (None,):
            for tile in self._tiles:
                sources, destinations, gives = self._first if tile == self._tiles[0] else self._planned(*tile)
                if giving is None:
                    yield sources, destinations
                else:
                    others = gives if not giving else ~gives
                    yield sources.masked_fill(others, -1), destinations.masked_fill(others, -1)

    def _planned(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return sources and destinations of some heads, and whether each is of a head that gives pages away."""
        kept = self._kept.rows(first, end)
        sources, gives = self._layout.survivors(kept, first)
        return sources, self._layout.holes(kept, first, self._pages), gives


def _joined(tables: list[torch.Tensor]) -> torch.Tensor:
    """Return tables of some heads as one; what was joined is freed on the way."""
    ends = [0, *np.cumsum([table.shape[1] for table in tables]).tolist()]
    joined = tables[0].new_empty(len(tables[0]), ends[-1], tables[0].shape[2])
    for first, end in pairwise(ends):
        joined[:, first:end] = tables.pop(0)
    return joined


def _check_pages(num_full_pages: torch.Tensor, plans: Sequence[EvictionPlan]) -> None:
    heads = num_full_pages[0].numel()
    for pages, plan in zip(num_full_pages.flatten(1).sum(dim=1).tolist(), plans, strict=True):
        if pages != plan.num_full_blocks * heads:
            raise ValueError(f"num_full_pages: expected a sum of {plan.num_full_blocks * heads} pages, got {pages}")


def bytes_of_heads(num_full_pages: torch.Tensor, plans: Sequence[EvictionPlan]) -> list[int]:
    """Return what planning the moves of each head, counted through all layers, takes at once.

    num_full_pages: [num_reqs, num_layers, num_kv_heads] int64 on the CPU
    """
    pages, longest = num_full_pages.flatten(1).numpy(), max(plan.num_tokens for plan in plans)
    moves = pages.sum(axis=0) * plans[0].block_size + sum(plan.num_tail_tokens for plan in plans)
    fixed = len(plans) * (longest * BYTES_PER_TOKEN + (pages.max() + 1) * BYTES_PER_PAGE)
    of_heads: list[int] = (moves * BYTES_PER_MOVE + fixed).tolist()
    return of_heads


def _last(plan: EvictionPlan) -> int:
    """Return the block behind the full ones that a request keeps."""
    return plan.first_kept_block + plan.num_full_blocks


def _end_staying(plan: EvictionPlan) -> int:
    """Return the token behind those that may stay where they are."""
    return _last(plan) * plan.block_size if plan.per_token else plan.num_tokens


@dataclass(frozen=True)
class _Layout:
    """Which pages each head gets, of several requests. Here ``heads`` are those of all layers, of which most methods
    look at some.

    own:          of the requests' blocks
    shared:       of the blocks that are shared out: own ones, or fresh ones
    first:        [num_reqs, 1] where these begin
    want:         [num_reqs, heads] full pages of each head
    num_staying:  [num_reqs, heads] of these, pages in which its tokens are already: the last ones of its prompt
    given_before: [num_reqs, heads] pages that the heads before it give away
    taken_before: [num_reqs, heads] pages that the heads before it take
    num_full:     [num_reqs, 1] pages that the heads of a request get on average
    num_tail:     [num_reqs, 1] tokens of the partly filled last page
    last:         [num_reqs, 1] block behind the full ones that stay
    end_staying:  [num_reqs, 1] token behind those that may stay where they are
    wanted, staying: ``want`` and ``num_staying``, and the plans, as the host knows them
    """

    plans: Sequence[EvictionPlan]
    own: BlockPages
    shared: BlockPages
    first: torch.Tensor
    want: torch.Tensor
    num_staying: torch.Tensor
    given_before: torch.Tensor
    taken_before: torch.Tensor
    num_full: torch.Tensor
    num_tail: torch.Tensor
    last: torch.Tensor
    end_staying: torch.Tensor
    wanted: np.ndarray
    staying: np.ndarray

    @classmethod
    def of(
        cls, num_full_pages: torch.Tensor, own: BlockPages, plans: Sequence[EvictionPlan], fresh: BlockPages | None
    ) -> _Layout:
        """The arguments are those of ``Compactions``."""
        wanted = num_full_pages.flatten(1).numpy()
        sizes = np.array([[p.num_full_blocks, p.num_tail_tokens, _last(p), _end_staying(p)] for p in plans])
        own_share = np.minimum(wanted, sizes[:, :1])
        staying = own_share if fresh is None else np.zeros_like(wanted)
        given, taken = sizes[:, :1] - own_share, wanted - own_share
        sums = [numbers.cumsum(axis=1) - numbers for numbers in (given, taken)]
        heads = wanted.shape[1]
        copied = to_device(np.concatenate([sizes, wanted, staying, *sums], axis=1), own.to_blocks.device)
        num_full, num_tail, last, end_staying, want, num_staying, given_before, taken_before = copied.split(
            [1, 1, 1, 1, heads, heads, heads, heads], dim=1
        )
        shared, first = own, last - num_full
        if fresh is not None and fresh.to_blocks.shape[1]:
            shared, first = fresh, torch.zeros_like(last)
        before = given_before.contiguous(), taken_before
        sizes_on_device = num_full, num_tail, last, end_staying
        return cls(plans, own, shared, first, want, num_staying, *before, *sizes_on_device, wanted, staying)

    @property
    def block_size(self) -> int:
        return self.plans[0].block_size

    def _most_moves(self, heads: slice) -> int:
        num_tail = sum(plan.num_tail_tokens for plan in self.plans)
        wanted = self.wanted[:, heads]
        num_heads: int = wanted.shape[1]
        return int(wanted.sum()) * self.block_size + num_tail * num_heads

    def _first_staying(self, heads: slice) -> torch.Tensor:
        """[num_reqs, num_heads, 1] first token of the pages that a head stays in."""
        return ((self.last - self.num_staying[:, heads]) * self.block_size)[..., None]

    def page_table(self, first: int, end: int) -> torch.Tensor:
        """Return [num_reqs, end - first, 1 + most pages] int32: full pages, then the tail page, then 0."""
        pages, heads = self._full_pages(slice(first, end)), slice(first, end)
        if not any(plan.num_tail_tokens for plan in self.plans):
            return pages
        last_block = self.last.clamp(max=self.own.to_blocks.shape[1] - 1)
        tail_page = self.own.first_pages.flatten()[heads] + self.own.to_blocks.gather(1, last_block)
        tail_page = tail_page.masked_fill(self.num_tail == 0, 0)
        return pages.scatter_(2, self.want[:, heads, None], tail_page[..., None].to(torch.int32))

    def _full_pages(self, heads: slice) -> torch.Tensor:
        """Return [num_reqs, num_heads, 1 + most pages] int32, the full pages of each head, 0 past its count.

        A head keeps its own pages first, the latest of them; what it lacks comes from heads of its request that want
        fewer, and give away their first ones, in the order of heads.
        """
        column = torch.arange(int(self.wanted.max()) + 1, device=self.want.device)
        want = self.want[:, heads]
        num_own = want.minimum(self.num_full)[..., None]
        block = self.first[..., None] + (self.num_full[..., None] - num_own) + column
        own = self._shared_blocks(block.flatten(1)).view_as(block)
        own += self.shared.first_pages.flatten()[heads, None]
        own.masked_fill_(column >= num_own, 0)
        taken = (self.taken_before[:, heads, None] + (column - num_own)).clamp_(min=0).flatten(1)
        giver = torch.searchsorted(self.given_before, taken, right=True) - 1
        place = taken.sub_(self.given_before.gather(1, giver)).add_(self.first)
        pages = self._shared_blocks(place)
        pages += self.shared.first_pages.flatten()[giver]
        is_taken = (column >= num_own) & (column < want[..., None])
        return torch.where(is_taken, pages.view_as(own), own).to(torch.int32)

    def _shared_blocks(self, places: torch.Tensor) -> torch.Tensor:
        """Return page ids from block 0 to those of these places [num_reqs, num_places], which are no more needed."""
        blocks = self.shared.to_blocks
        found: torch.Tensor = blocks.gather(1, places.clamp_(0, blocks.shape[1] - 1))
        return found

    def survivors(self, kept: torch.Tensor, first_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the slots [num_moves] of the kept tokens that leave their page, head by head, then -1; and whether
        each is of a head that gives pages away.

        kept: [num_reqs, num_heads, max_tokens] of heads from ``first_head`` on
        """
        heads = slice(first_head, first_head + kept.shape[1])
        fewest = self.staying[:, heads].min(axis=1).tolist()
        ends = [
            plan.num_tokens if plan.per_token else (_last(plan) - few) * plan.block_size
            for plan, few in zip(self.plans, fewest, strict=True)
        ]
        token = torch.arange(max(ends), dtype=torch.int32, device=kept.device)
        leaves = (token < self._first_staying(heads)) | (token >= self.end_staying[..., None])
        leaves &= kept[..., : len(token)]
        req, head, token = leaves.nonzero_static(size=self._most_moves(heads)).unbind(dim=1)
        gives = (self.want < self.num_full)[:, heads][req, head]
        return self._own_slots(req, head, token, heads).masked_fill_(req < 0, -1), gives

    def holes(self, kept: torch.Tensor, first_head: int, pages: torch.Tensor) -> torch.Tensor:
        """Return the slots [num_moves] of the places that each head has to fill, head by head; then -1.

        Holes in the pages it stays in, and all slots of the pages it takes: fresh ones, or those of other heads.

        kept:  [num_reqs, num_heads, max_tokens] of heads from ``first_head`` on
        pages: [num_reqs, heads, 1 + most pages], the page table of all heads
        """
        heads = slice(first_head, first_head + kept.shape[1])
        staying = self.staying[:, heads]
        most, fewest = staying.max(axis=1).tolist(), int(staying.min())
        first = [(_last(plan) - many) * plan.block_size for plan, many in zip(self.plans, most, strict=True)]
        width = max(_end_staying(plan) - start for plan, start in zip(self.plans, first, strict=True))
        first_token = to_device(np.array(first, dtype=np.int64), kept.device)
        token = (first_token[:, None] + torch.arange(width, device=kept.device))[:, None]  # [num_reqs, 1, width]
        holes = (token >= self._first_staying(heads)) & (token < self.end_staying[..., None])
        holes &= ~kept.gather(2, token.clamp_(max=kept.shape[2] - 1).expand(-1, kept.shape[1], -1))

        column = torch.arange(fewest, pages.shape[2], device=kept.device)
        taken = (column >= self.num_staying[:, heads, None]) & (column < self.want[:, heads, None])
        holes = torch.cat([holes, taken[..., None].expand(-1, -1, -1, self.block_size).flatten(2)], dim=2)
        req, head, place = holes.nonzero_static(size=self._most_moves(heads)).unbind(dim=1)
        del holes, taken, token
        behind = (place - width).clamp_(min=0)
        of_taken = pages[:, heads][req, head, fewest + behind // self.block_size].to(torch.int64)
        of_taken.mul_(self.block_size).add_(behind.remainder_(self.block_size))
        own_token = place.clamp(max=width - 1).add_(first_token[req])
        of_own = self._own_slots(req, head, own_token, heads)
        return torch.where(place < width, of_own, of_taken).masked_fill_(req < 0, -1)

    def _own_slots(self, req: torch.Tensor, head: torch.Tensor, token: torch.Tensor, heads: slice) -> torch.Tensor:
        """Return the slots of tokens of some heads; anything for a token that is none."""
        block = (token // self.block_size).clamp_(max=self.own.to_blocks.shape[1] - 1)
        slots = self.own.at(req, head + heads.start, block).mul_(self.block_size)
        return slots.add_(token % self.block_size)
