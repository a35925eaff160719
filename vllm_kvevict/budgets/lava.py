"""LAVa: layers by the entropy of their scores, heads by the joint ranking inside a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, WishBatch, WishFacts, joint_shares, joint_summary
from vllm_kvevict.kernels.select import count_best
from vllm_kvevict.policies.options import between


@ALLOCATORS.register("lava")
@dataclass(frozen=True)
class Lava(BatchAllocator):
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

    def summarise(self, batch: WishBatch) -> torch.Tensor:
        num_reqs, num_layers, num_heads, _ = batch.scores.shape
        free = _masses(batch.scores.flatten(0, 1))
        shares = layer_entropies(free).view(num_reqs, num_layers)
        total = shares.sum(dim=1, keepdim=True)
        shares = torch.where(total > 0, shares / total, 1 / num_layers)
        spare = [kept - protected for kept, protected in zip(batch.num_tokens, batch.num_protected, strict=True)]
        layer_tokens = shares * batch.on_device(spare)[:, None] * num_layers  # per head
        counts = (layer_tokens * num_heads).round().to(torch.int64)
        wanted = counts.clamp(min=1).minimum(batch.lens[:, None] * num_heads)
        if batch.is_ragged:  # what no request holds ranks below its scores, which are at least 0
            free = free.masked_fill(batch.scores.flatten(0, 1).isnan(), float("nan"))
        joint = joint_summary(*count_best(free, wanted.flatten()), num_reqs)
        return torch.cat([joint, layer_tokens, wanted, counts], dim=1)

    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        layers = facts.num_layers
        layer_tokens, wanted, counts = summary[-3 * layers :].view(3, layers).unbind(0)
        shares = joint_shares(summary[: -3 * layers], wanted.to(torch.int64)) * (counts > 0)[:, None]
        floor = self.floor_alpha * layer_tokens[:, None]
        return shares * (1 - self.floor_alpha) + floor + facts.num_protected


def _masses(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores of the unprotected tokens as numbers of at least 0; 0 for the protected ones.

    LAVa's own are amounts of attention. Policies whose scores may be negative are shifted, layer by layer.

    scores: [num_layers, num_kv_heads, kv_len]
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
