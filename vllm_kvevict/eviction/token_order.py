"""Where the tokens of requests are whose heads have evicted each what it liked: their slots, in order of positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.policies import scratch

# What is held at once by each slot: where its token stands in order, which tokens stay, and what moves.
_BYTES_PER_SLOT = 48


@dataclass(frozen=True)
class TokenOrder:
    """The slots of some requests, in tiles of heads that fit into the scratch. Heads are counted through all layers.

    Where one tile has all heads, their order is found once and kept, else each time that it is asked for.

    num_new, num_tail:          [num_reqs, 1, 1] int64, new tokens, and tokens of the partly filled last page that stays
    num_tokens:                 [num_reqs, 1, 1] int64
    kv_lens:                    [num_reqs, num_layers, num_kv_heads] int64, tokens that each head holds
    page_table, num_pages, num_full_pages: as in ``ResidentEvictions``
    """

    pool: PagePool
    residents: Residents
    page_table: torch.Tensor
    num_pages: torch.Tensor
    num_full_pages: torch.Tensor
    num_tokens: torch.Tensor
    num_new: torch.Tensor
    num_tail: torch.Tensor
    kv_lens: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """num_reqs, num_layers, num_kv_heads, num_slots of the longest row"""
        num_reqs, num_layers, num_kv_heads, max_pages = self.page_table.shape
        return num_reqs, num_layers, num_kv_heads, max_pages * self.pool.block_size

    @cached_property
    def tiles(self) -> list[tuple[int, int]]:
        """Bounds of heads."""
        num_reqs, num_layers, num_kv_heads, num_slots = self.shape
        return scratch.tiles([num_reqs * num_slots * _BYTES_PER_SLOT] * (num_layers * num_kv_heads))

    @cached_property
    def _only(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._of_tile(*self.tiles[0]) if len(self.tiles) == 1 else None

    def of_heads(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the slots of some heads [num_reqs, end - first, num_slots] int64 in the order of their tokens, those
        that hold none last, and whether each stays. The positions of new tokens are noted.
        """
        if self._only is None:
            return self._of_tile(first, end)
        slots, stays = self._only
        return slots[:, first:end], stays[:, first:end]

    def of_layers(self, layers: range) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, num_slots] int64, the slots of some layers."""
        num_reqs, _, num_kv_heads, num_slots = self.shape
        first, end, size = layers.start * num_kv_heads, layers.stop * num_kv_heads, self.tiles[0][1]
        if self._only is not None:
            slots = self.of_heads(first, end)[0]
        else:
            slots = self.page_table.new_empty(num_reqs, end - first, num_slots)
            for head in range(first, end, size):
                slots[:, head - first : head - first + size] = self.of_heads(head, min(head + size, end))[0]
        return slots.view(num_reqs, len(layers), num_kv_heads, num_slots)

    def is_held(self, first: int, end: int) -> torch.Tensor:
        """Return [num_reqs, end - first, num_slots] bool, whether there is a token at each place of the order."""
        return self._place < self.kv_lens.flatten(1)[:, first:end, None]

    @property
    def _place(self) -> torch.Tensor:
        return torch.arange(self.shape[3], device=self.page_table.device)

    def _of_tile(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        heads, block_size, place = slice(first, end), self.pool.block_size, self._place
        lane = torch.arange(block_size, device=place.device)
        slots = (self.page_table.flatten(1, 2)[:, heads, :, None] * block_size + lane).flatten(2)
        kv_lens = self.kv_lens.flatten(1)[:, heads, None]
        is_new = (place < kv_lens) & (place >= kv_lens - self.num_new)
        positions = self.residents.positions
        # all slots are written, those of no new token with what they have
        known = torch.where(is_new, (self.num_tokens - kv_lens + place).to(torch.int32), positions[slots])
        positions[slots] = known
        order = known.masked_fill_(place >= kv_lens, torch.iinfo(torch.int32).max).argsort(dim=-1)
        page = place // block_size
        is_tail = (page == self.num_pages.flatten(1)[:, heads, None] - 1) & (self.num_tail > 0)
        stays = (page < self.num_full_pages.flatten(1)[:, heads, None]) | is_tail
        return slots.gather(2, order), stays.gather(2, order)
