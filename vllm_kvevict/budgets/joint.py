"""The best of scores that are too many to be seen at once: what ``count_best`` counts, tile by tile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from vllm_kvevict.budgets.batch import Tiles

_PIECE = 2**19  # scores whose digits are counted at once


def kth_highest(tiles: Iterable[torch.Tensor], totals: torch.Tensor) -> torch.Tensor:
    """Return [num_groups] float32, the ``totals``-th highest score of every group.

    tiles:  [num_groups, num_scores] float32 each; they are gone through four times
    totals: [num_groups] int64, at least 1, and at most as many as are none of NaN
    """
    found, missing = torch.zeros_like(totals), totals
    for shift in (24, 16, 8, 0):
        counts = totals.new_zeros(len(totals), 256)
        for keys in _keys(tiles):
            is_candidate = (keys >> (shift + 8)) == found[:, None]
            counts.scatter_add_(1, keys.bitwise_right_shift_(shift).bitwise_and_(255), is_candidate.to(torch.int64))
        from_digit = counts.flip(1).cumsum(1).flip(1)
        digit = (from_digit >= missing[:, None]).sum(dim=1) - 1
        missing = missing - (from_digit - counts).gather(1, digit[:, None])[:, 0]
        found = (found << 8) + digit
    return _ordered((found - 2**31).to(torch.int32)).view(torch.float32)


def count_best_of_tiles(tiles: Tiles[torch.Tensor], totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``count_best`` does, of groups whose rows come in tiles [num_groups, num_rows, kv_len].

    totals: [num_groups] int64, as for ``kth_highest``
    """
    flat = tiles.map(lambda tile: tile.flatten(1))
    threshold = kth_highest(flat, totals)[:, None, None]
    counts = [((tile > threshold).sum(dim=2), (tile == threshold).sum(dim=2)) for tile in tiles]
    above, ties = (torch.cat(parts, dim=1) for parts in zip(*counts, strict=True))
    are_split = above.sum(dim=1, keepdim=True) + ties.sum(dim=1, keepdim=True) > totals[:, None]
    return torch.where(are_split, above, above + ties), ties * are_split


def _keys(tiles: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield [num_groups, num_scores] int64 in 32 bits, ordered like scores; NaN is 0, both zeros are alike."""
    for tile in tiles:
        for piece in tile.split(max(_PIECE // len(tile), 1), dim=1):
            bits = piece.contiguous().view(torch.int32)
            yield _ordered(bits).to(torch.int64).add_(2**31).masked_fill_(piece.isnan(), 0)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Map the bits of float32 numbers to int32 that are ordered like the numbers, and back: it is its own inverse."""
    return torch.where(bits < 0, torch.iinfo(torch.int32).min - bits, bits)
