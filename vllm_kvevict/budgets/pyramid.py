"""PyramidKV: lower layers keep more tokens than higher ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, WishFacts
from vllm_kvevict.policies.options import at_least


@ALLOCATORS.register("pyramid")
@dataclass(frozen=True)
class Pyramid(BatchAllocator):
    """A linear fall over the layers, the same for every head of a layer.

    Paper: Cai et al. 2024, arXiv:2406.02069. With the clamps of kvpress's PyramidKVPress, the protected tokens in the
    place of its window: the lowest layer cannot keep more than the prompt, and budgets whose highest layer would
    not hold the protected tokens are uniform.

    beta: the highest layer keeps 1 / ``beta`` of an equal share, >= 1; 1 is uniform

    Raises ValueError for a value outside that range.
    """

    beta: Annotated[float, at_least(1)] = 20
    name: ClassVar[str] = "pyramid"

    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        kv_len, num_tokens, protected = facts.kv_len, facts.num_tokens, facts.num_protected
        lowest = num_tokens / self.beta
        highest = 2 * num_tokens - lowest
        if highest >= kv_len - protected:
            highest = kv_len - protected
            lowest = 2 * num_tokens - highest
        if not kv_len >= highest >= lowest >= protected:
            highest = lowest = num_tokens
        layers = torch.linspace(highest, lowest, facts.num_layers, dtype=torch.float64)
        return layers[:, None].expand(facts.num_layers, facts.num_kv_heads)
