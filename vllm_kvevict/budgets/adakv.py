"""AdaKV: the heads of a layer compete for its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator, check_fraction, joint_counts


@ALLOCATORS.register("adakv")
@dataclass(frozen=True)
class AdaKV(BudgetAllocator):
    """Every layer keeps the same number of tokens: the best of all its heads together, after a share for each head.

    Paper: Feng et al. 2024, arXiv:2407.11550. The safeguard is the one of kvpress's AdaKVPress: each head's best
    ``alpha`` of an equal share stays, the rest is won in the joint ranking.

    alpha: share of an equal budget that every head is sure of, 0 to 1; 1 is uniform

    Raises ValueError for a value outside that range.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        check_fraction("adakv.alpha", self.alpha)

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        sure = int(num_tokens * self.alpha)
        guarded = scores.scatter(-1, scores.topk(sure, dim=-1).indices, float("inf"))
        return torch.stack([joint_counts(layer, num_tokens * len(layer)) for layer in guarded])
