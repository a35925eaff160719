"""CAKE: layers by how widely attention is spread and how much it shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, WishBatch, WishFacts
from vllm_kvevict.policies.attention import attention_bytes, attention_tiles
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.inputs import ScoreInputs
from vllm_kvevict.policies.options import above, at_least
from vllm_kvevict.policies.stretches import sum_of_tokens


@ALLOCATORS.register("cake")
@dataclass(frozen=True)
class Cake(BatchAllocator):
    """A layer's budget grows with the entropy H and the variance V of its attention: H^(1/tau1) * V^(1/tau2).

    Paper: Qin et al. 2025 (CAKE), arXiv:2503.12491. H sums -p log p and V the variance of a key's attention between
    the last ``window`` queries (of which the divisor cancels), both over all heads and the keys before the window.
    The budgets are those of the last stage of the paper's cascade. What a layer cannot use since the prompt is too
    short is shared equally by the others. The heads of a layer get the same.

    tau1, tau2: temperatures of H and V, > 0; the paper tunes them per model and budget
    window:     last queries that are looked at, >= 2; their own keys are left out

    Raises ValueError for a value outside those ranges.
    """

    tau1: Annotated[float, above(0)] = 1.0
    tau2: Annotated[float, above(0)] = 1.0
    window: Annotated[int, at_least(2)] = 32
    name: ClassVar[str] = "cake"

    @property
    def query_window(self) -> int:
        return self.window

    def measure(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return [2] float64: H and V of one layer."""
        return self.measure_batch(ScoreInputs.together([inputs]))[0, 0]

    def measure_batch(self, batch: ScoreBatch) -> torch.Tensor:
        before = batch.kv_lens.flatten()[:, None] - batch.query.shape[2]
        spread = torch.zeros(len(before), 2, dtype=torch.float64, device=before.device)
        for heads in batch.head_tiles(2 * attention_bytes(batch)):
            for tile in attention_tiles(batch, heads):
                is_judged = torch.arange(tile.start, tile.end, device=before.device) < before[heads]
                attention = tile.probabilities.masked_fill_(~is_judged[..., None, None], 0.0)
                entropy = torch.special.entr(attention).sum(dim=(2, 3), dtype=torch.float64)
                variance = attention.var(dim=3, correction=0).sum(dim=2, dtype=torch.float64)
                spread[heads] += sum_of_tokens(torch.stack([entropy, variance], dim=2))
        return spread.view(*batch.shape[:3], 2).sum(dim=2)

    def summarise(self, batch: WishBatch) -> torch.Tensor:
        return batch.measures.flatten(1)

    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        num_layers, protected = facts.num_layers, facts.num_protected
        entropy, variance = summary.view(num_layers, 2).clamp(min=0).unbind(dim=1)
        preference = entropy ** (1 / self.tau1) * variance ** (1 / self.tau2)
        if preference.sum() == 0:
            preference = torch.ones_like(preference)
        free = preference / preference.sum() * (facts.num_tokens - protected) * num_layers
        layers = _spread_excess(free, facts.kv_len - protected) + protected
        return layers[:, None].expand(num_layers, facts.num_kv_heads)


def _spread_excess(tokens: torch.Tensor, most: int) -> torch.Tensor:
    """Cut [num_layers] at ``most`` and share what was cut equally among the layers below, until all of it fits."""
    for _ in range(len(tokens)):
        excess = (tokens - most).clamp(min=0).sum()
        below = tokens < most
        if excess == 0 or not below.any():
            break
        tokens = torch.where(below, tokens + excess / below.sum(), most)
    return tokens
