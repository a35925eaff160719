"""Which tokens of some heads are marked: a byte for each, or a bit where there are many."""

from __future__ import annotations

import torch


class Marks:
    """One truth value for every token of every head of some requests.

    shape: num_reqs, heads of all layers, max_tokens
    """

    def __init__(self, marks: torch.Tensor) -> None:
        """marks: [num_reqs, heads, max_tokens] bool, which are not copied"""
        self.shape, self._marks = marks.shape, marks

    def rows(self, first: int, end: int) -> torch.Tensor:
        """Return those of the heads from ``first`` to ``end``: [num_reqs, end - first, max_tokens] bool."""
        return self._marks[:, first:end]


class PackedMarks(Marks):
    """Those that take a bit each."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        """Marks that are to be ``put``."""
        super().__init__(torch.empty(*shape[:2], -(-shape[2] // 8), dtype=torch.uint8, device=device))
        self.shape = torch.Size(shape)

    def put(self, first: int, marks: torch.Tensor) -> None:
        """Set those of the heads from ``first`` on: [num_reqs, num_heads, max_tokens] bool."""
        bits = torch.nn.functional.pad(marks.view(torch.uint8), (0, -marks.shape[2] % 8)).unflatten(2, (-1, 8))
        packed = self._marks[:, first : first + marks.shape[1]].zero_()
        for bit in range(8):
            packed |= bits[..., bit] << bit

    def rows(self, first: int, end: int) -> torch.Tensor:
        bits = torch.arange(8, dtype=torch.uint8, device=self._marks.device)
        unpacked = (self._marks[:, first:end, :, None] >> bits).bitwise_and_(1).view(torch.bool)
        return unpacked.flatten(2)[..., : self.shape[2]]
