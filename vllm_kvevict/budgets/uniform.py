"""Uniform: every layer and head keeps the same number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator


@ALLOCATORS.register("uniform")
@dataclass(frozen=True)
class Uniform(BudgetAllocator):
    """Share the pages equally, as SnapKV and most prefill-time methods publish it."""

    name: ClassVar[str] = "uniform"

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        return torch.full(scores.shape[:2], num_tokens, dtype=torch.float64)
