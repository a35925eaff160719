"""Sums and products of tokens that go stretch by stretch, so that what stands behind a head's tokens changes no bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TILE, STRETCH = 1024, 64  # tokens


def in_stretches(x: torch.Tensor) -> torch.Tensor:
    """Return [num_heads, num_stretches, stretch, *], the tokens of ``x`` [num_heads, num_tokens, *], padded with 0.

    Work that goes stretch by stretch gives a head the same result, bit by bit, however many tokens others hold.
    """
    padding = [0, 0] * (x.dim() - 2) + [0, -x.shape[1] % STRETCH]
    stretches: torch.Tensor = F.pad(x, padding).unflatten(1, (-1, STRETCH))
    return stretches


def sum_of_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return [num_heads, *], the sum of the tokens of ``x`` [num_heads, num_tokens, *]; 0 behind changes no bit."""
    return in_stretches(x).sum(dim=2).cumsum(dim=1)[:, -1]


def products(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Return [num_heads, num_tokens, m], each row times its matrix; no bit depends on how many rows there are.

    rows:     [num_heads, num_tokens, n]
    matrices: [num_heads, n, m], or one for all
    """
    multiplied: torch.Tensor = in_stretches(rows) @ matrices[:, None]
    return multiplied.flatten(1, 2)[:, : rows.shape[1]]


def in_whole_stretches(num_tokens: int) -> int:
    """Return at least so many tokens, and no part of a stretch."""
    return -(-num_tokens // STRETCH) * STRETCH


def tile_size(stretch: int) -> int:
    """Return the tokens of a tile that cuts no stretch of ``stretch`` tokens, counted from the first one."""
    return max(TILE // stretch, 1) * stretch
