"""Which tokens the slots of a cache hold, for requests whose heads evict while they decode."""

from __future__ import annotations

import torch

from vllm_kvevict.cache.pages import PagePool


class Residents:
    """Beside each slot of a page pool: its token's position, and what a policy sums up of it.

    Only slots of requests that are evicted again are meaningful.

    positions: [num_pages * block_size] int32, one per slot
    sums:      [num_pages * block_size] float32, one per slot; empty if no policy that is used keeps sums
    """

    def __init__(self, pool: PagePool, has_positions: bool = True, has_sums: bool = True) -> None:
        """has_positions: whether any request is evicted again; else both are empty."""
        self._pool = pool
        num_slots, device = len(pool.pages) * pool.block_size, pool.pages.device
        self.positions = torch.zeros(num_slots * has_positions, dtype=torch.int32, device=device)
        self.sums = torch.zeros(num_slots * (has_positions and has_sums), dtype=torch.float32, device=device)

    @staticmethod
    def bytes_per_slot(has_positions: bool, has_sums: bool) -> int:
        """Return the bytes that are taken for each slot."""
        return 4 * has_positions + 4 * (has_positions and has_sums)

    @property
    def num_bytes(self) -> int:
        """Bytes of the positions and of the sums."""
        return self.positions.nbytes + self.sums.nbytes

    def move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Follow tokens that moved from slot to slot, [num_tokens] int64 each."""
        for table in (self.positions, self.sums):
            if len(table):
                table[destination] = table[source]
