"""AdaKV: the heads of a layer compete for its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator, joint_counts
from vllm_kvevict.kernels.select import select
from vllm_kvevict.policies.options import between


@ALLOCATORS.register("adakv")
@dataclass(frozen=True)
class AdaKV(BudgetAllocator):
    """Every layer keeps the same number of tokens: the best of all its heads together, after a share for each head.

    Paper: Feng et al. 2024, arXiv:2407.11550. The safeguard is the one of kvpress's AdaKVPress: each head's best
    ``alpha`` of an equal share stays, the rest is won in the joint ranking.

    alpha: share of an equal budget that every head is sure of, 0 to 1; 1 is uniform

    Raises ValueError for a value outside that range.
    """

    alpha: Annotated[float, between(0, 1)] = 0.2
    name: ClassVar[str] = "adakv"

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        sure = int(num_tokens * self.alpha)
        num_layers, num_heads, _ = scores.shape
        guarded = scores.masked_fill(select(scores, torch.full((num_layers, num_heads), sure)), float("inf"))
        return joint_counts(guarded, torch.full((num_layers,), num_tokens * num_heads))
