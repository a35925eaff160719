"""Uniform: every layer and head keeps the same number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, WishFacts


@ALLOCATORS.register("uniform")
@dataclass(frozen=True)
class Uniform(BatchAllocator):
    """Share the pages equally, as SnapKV and most prefill-time methods publish it."""

    name: ClassVar[str] = "uniform"

    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        return torch.full((facts.num_layers, facts.num_kv_heads), facts.num_tokens, dtype=torch.float64)
