"""PyramidKV: lower layers keep more tokens than higher ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator, num_protected
from vllm_kvevict.policies.options import at_least


@ALLOCATORS.register("pyramid")
@dataclass(frozen=True)
class Pyramid(BudgetAllocator):
    """A linear fall over the layers, the same for every head of a layer.

    Paper: Cai et al. 2024, arXiv:2406.02069. With the clamps of kvpress's PyramidKVPress, the protected tokens in the
    place of its window: the lowest layer cannot keep more than the prompt, and budgets whose highest layer would
    not hold the protected tokens are uniform.

    beta: the highest layer keeps 1 / ``beta`` of an equal share, >= 1; 1 is uniform

    Raises ValueError for a value outside that range.
    """

    beta: Annotated[float, at_least(1)] = 20
    name: ClassVar[str] = "pyramid"

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        num_layers, num_heads, kv_len = scores.shape
        protected = num_protected(scores)
        lowest = num_tokens / self.beta
        highest = 2 * num_tokens - lowest
        if highest >= kv_len - protected:
            highest = kv_len - protected
            lowest = 2 * num_tokens - highest
        if not kv_len >= highest >= lowest >= protected:
            highest = lowest = num_tokens
        layers = torch.linspace(highest, lowest, num_layers, dtype=torch.float64)
        return layers[:, None].expand(num_layers, num_heads)
