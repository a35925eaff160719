"""Global: all layers and heads compete for all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator, check_fraction, joint_counts


@ALLOCATORS.register("global")
@dataclass(frozen=True)
class Global(BudgetAllocator):
    """The best tokens of all layers and heads together, after a share for each head and layer.

    Paper: Rehg 2024 (KV-Compress), arXiv:2410.00161. Scores of different layers must be comparable: attention
    probabilities are, as far as every query hands out the same sum in every layer.

    head_floor:  share of an equal budget that every head is sure of, 0 to 1
    layer_floor: share of an equal budget that every layer is sure of, 0 to 1; its heads compete for it

    Raises ValueError for a value outside those ranges.
    """

    head_floor: float = 0.0
    layer_floor: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("global.head_floor", self.head_floor)
        check_fraction("global.layer_floor", self.layer_floor)

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        num_heads = scores.shape[1]
        sure = scores.topk(int(num_tokens * self.head_floor), dim=-1).indices
        guarded = scores.scatter(-1, sure, float("inf")).flatten(1)  # [num_layers, num_kv_heads * kv_len]
        sure = guarded.topk(int(num_tokens * self.layer_floor) * num_heads, dim=-1).indices
        guarded = guarded.scatter(-1, sure, float("inf")).view_as(scores)
        total = num_tokens * scores.shape[0] * num_heads
        return joint_counts(guarded.flatten(0, 1), total).view(scores.shape[:2])
