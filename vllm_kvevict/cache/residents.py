"""Which tokens the slots of a cache hold, for requests whose heads evict while they decode."""

from __future__ import annotations

import torch

from vllm_kvevict.cache.pages import PagePool


class Residents:
    """Beside each slot of a page pool: its token's position, and what a policy sums up of it.

    Only slots of requests that evict during decode are meaningful. Memory: 4 bytes per slot of a page, and 4 more once
    a policy keeps sums; taken when the first such request comes.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._positions: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the positions, and of the sums if there are any."""
        return sum(table.numel() * table.element_size() for table in (self._positions, self._sums) if table is not None)

    @property
    def positions(self) -> torch.Tensor:
        """[num_pages * block_size] int32, one per slot."""
        if self._positions is None:
            self._positions = self._table(torch.int32)
        return self._positions

    @property
    def sums(self) -> torch.Tensor:
        """[num_pages * block_size] float32, one per slot."""
        if self._sums is None:
            self._sums = self._table(torch.float32)
        return self._sums

    def _table(self, dtype: torch.dtype) -> torch.Tensor:
        num_slots = len(self._pool.pages) * self._pool.block_size
        return torch.zeros(num_slots, dtype=dtype, device=self._pool.pages.device)

    def move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Follow tokens that moved from slot to slot, [num_tokens] int64 each."""
        for table in (self._positions, self._sums):
            if table is not None:
                table[destination] = table[source]
