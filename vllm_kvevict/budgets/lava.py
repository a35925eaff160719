"""LAVa: layers by the entropy of their scores, heads by the joint ranking inside a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS, BudgetAllocator, joint_counts, num_protected
from vllm_kvevict.policies.options import between


@ALLOCATORS.register("lava")
@dataclass(frozen=True)
class Lava(BudgetAllocator):
    """A layer whose scores are spread over many tokens keeps more of them; heads share a layer's budget by rank.

    Paper: Shen et al. 2025 (LAVa), arXiv:2509.09754. Layer budgets are proportional to the entropy of the layer's
    scores, normalised to sum to one over its heads and tokens. The protected tokens are left out of the entropy and
    come on top of every head's budget, as the paper's window does.

    floor_alpha: share of an equal budget that every head is sure of, 0 to 1. 0 is the paper; the public code means
                 0.2, though it computes that floor once from the configured capacity and never from the layer's

    Raises ValueError for a value outside that range.
    """

    floor_alpha: Annotated[float, between(0, 1)] = 0.0
    name: ClassVar[str] = "lava"

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        protected = num_protected(scores)
        free = _masses(scores)
        shares = layer_entropies(free).cpu()  # where the counts are
        shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
        heads = scores.shape[1]
        layer_tokens = shares * (num_tokens - protected) * len(shares)  # per head
        counts = joint_counts(free, (layer_tokens * heads).round().to(torch.int64))
        floor = self.floor_alpha * layer_tokens[:, None]
        return counts * (1 - self.floor_alpha) + floor + protected


def _masses(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores of the unprotected tokens as numbers of at least 0; 0 for the protected ones.

    LAVa's own are amounts of attention. Policies whose scores may be negative are shifted, layer by layer.
    """
    finite = torch.isfinite(scores)
    lowest = scores.masked_fill(~finite, 0.0).amin(dim=(1, 2), keepdim=True)
    return (scores - lowest.clamp(max=0)).masked_fill(~finite, 0.0)


def layer_entropies(scores: torch.Tensor) -> torch.Tensor:
    """Return [num_layers] float64, the entropy of each layer's scores over its heads and tokens, in nats.

    scores: [num_layers, num_kv_heads, kv_len] >= 0
    """
    flat = scores.flatten(1).to(torch.float64)
    probabilities = flat / flat.sum(dim=1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    entropies: torch.Tensor = torch.special.entr(probabilities).sum(dim=1)
    return entropies
