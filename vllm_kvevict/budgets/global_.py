"""Global: all layers and heads compete for all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator, joint_counts
from vllm_kvevict.kernels.select import select
from vllm_kvevict.policies.options import between


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

    head_floor: Annotated[float, between(0, 1)] = 0.0
    layer_floor: Annotated[float, between(0, 1)] = 0.0
    name: ClassVar[str] = "global"

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        num_layers, num_heads, _ = scores.shape
        sure_of_head = int(num_tokens * self.head_floor)
        guarded = scores.masked_fill(select(scores, torch.full((num_layers, num_heads), sure_of_head)), float("inf"))
        floors = torch.zeros(num_layers, num_heads, dtype=torch.float64)
        if sure_of_layer := int(num_tokens * self.layer_floor) * num_heads:
            floors = joint_counts(guarded, torch.full((num_layers,), sure_of_layer))
            guarded = _guard_best(guarded.flatten(1), sure_of_layer).view_as(scores)
        total = torch.tensor([num_tokens * num_layers * num_heads])
        return joint_counts(guarded.flatten(0, 1)[None], total).view(num_layers, num_heads).maximum(floors)


def _guard_best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``scores`` [num_layers, *] with the ``count`` highest of each layer at +inf.

    Scores that tie for the last places stay as they are: no order of heads or layers may decide between them.
    """
    last = scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values
    is_clear = (scores >= last).sum(dim=1, keepdim=True) == count
    return scores.masked_fill(torch.where(is_clear, scores >= last, scores > last), float("inf"))
