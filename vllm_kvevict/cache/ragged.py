"""Tensors of different lengths, put together and taken apart again in one launch, however many they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded(parts: Sequence[torch.Tensor], lens: Sequence[int], dim: int, value: int = 0) -> torch.Tensor:
    """Return ``parts``, which are alike but for their length, one behind another along ``dim``, each with ``value``
    behind it up to its length in ``lens``.
    """
    missing = [length - part.shape[dim] for part, length in zip(parts, lens, strict=True)]
    shape = list(parts[0].shape)
    shape[dim] = max(missing)
    padding = parts[0].new_full(shape, value)
    pieces = [
        piece for part, count in zip(parts, missing, strict=True) for piece in (part, padding.narrow(dim, 0, count))
    ]
    return torch.cat(pieces, dim=dim)


def in_own_memory(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of ``parts``, each in memory of its own: it is free once its owner is gone.

    A GPU has one launch for all only if each of them is without gaps.
    """
    return [*torch._foreach_mul([*parts], 1)]


def taken_apart(together: torch.Tensor, lens: Sequence[int]) -> list[torch.Tensor]:
    """Return the parts [num_rows, num_tokens] of [num_rows, sum of lens], each in memory of its own, in one launch."""
    parts = [together.new_empty(len(together), length) for length in lens]
    torch.split_with_sizes_copy(together, [*lens], dim=1, out=parts)
    return parts
