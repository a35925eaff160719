"""Fixed: budgets measured offline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, WishFacts


@ALLOCATORS.register("fixed")
@dataclass(frozen=True)
class Fixed(BatchAllocator):
    """Share the pages by the weights in a JSON file: one number per layer, or one list of numbers per layer.

    file: [num_layers] or [num_layers][num_kv_heads] numbers of at least 0, any scale

    Raises ValueError if the file does not hold that.
    """

    file: str
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        _ = self._weights  # read now, so that it is checked now

    def check_model(self, num_layers: int, num_kv_heads: int) -> None:
        shape = self._weights.shape
        if shape not in ((num_layers,), (num_layers, 1), (num_layers, num_kv_heads)):
            raise ValueError(
                f"fixed.file: expected weights of {num_layers} layers of 1 or {num_kv_heads} heads in {self.file!r}, "
                f"got {tuple(shape)}"
            )

    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        layers, heads = facts.num_layers, facts.num_kv_heads
        self.check_model(layers, heads)
        weights = self._weights
        return (weights[:, None] if weights.ndim == 1 else weights).expand(layers, heads)

    @cached_property
    def _weights(self) -> torch.Tensor:
        try:
            weights = torch.tensor(json.loads(Path(self.file).read_text()), dtype=torch.float64)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"fixed.file: expected a JSON file of weights, got {self.file!r}; {error}") from None
        if weights.ndim not in (1, 2) or not torch.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise ValueError(f"fixed.file: expected numbers of at least 0 per layer or head, got {weights.tolist()}")
        return weights
