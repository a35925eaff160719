"""Fixed: budgets measured offline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator


@ALLOCATORS.register("fixed")
@dataclass(frozen=True)
class Fixed(BudgetAllocator):
    """Share the pages by the weights in a JSON file: one number per layer, or one list of numbers per layer.

    file: [num_layers] or [num_layers][num_kv_heads] numbers of at least 0, any scale

    Raises ValueError if the file does not hold that.
    """

    file: str

    def __post_init__(self) -> None:
        self._weights()

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        weights = self._weights()
        weights = weights[:, None] if weights.ndim == 1 else weights
        layers, heads = scores.shape[:2]
        if weights.shape[0] != layers or weights.shape[1] not in (1, heads):
            raise ValueError(f"fixed.file: expected {layers} layers of 1 or {heads} heads, got {tuple(weights.shape)}")
        return weights.expand(layers, heads)

    def _weights(self) -> torch.Tensor:
        try:
            weights = torch.tensor(json.loads(Path(self.file).read_text()), dtype=torch.float64)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"fixed.file: expected a JSON file of weights, got {self.file!r}; {error}") from None
        if weights.ndim not in (1, 2) or not torch.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise ValueError(f"fixed.file: expected numbers of at least 0 per layer or head, got {weights.tolist()}")
        return weights
