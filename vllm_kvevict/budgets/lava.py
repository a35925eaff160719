"""LAVa: layers by the entropy of their scores, heads by the joint ranking inside a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, WishBatch, WishFacts, joint_shares, joint_summary
from vllm_kvevict.kernels.select import count_best
from vllm_kvevict.policies.options import between

_PIECE = 2**18  # scores of a layer that are summed up in float64 at once, whatever the scratch: sums depend on it
_BYTES_PER_SCORE = 36  # as they came, as masses, which are none, and pieces in float64


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
        num_reqs, num_layers, num_heads, _ = batch.shape
        tiles = batch.tiles(_BYTES_PER_SCORE).map(lambda scores: _masses(scores.flatten(0, 1), batch.is_ragged))
        shares = torch.cat([layer_entropies(free).view(num_reqs, -1) for free in tiles], dim=1)
        total = shares.sum(dim=1, keepdim=True)
        shares = torch.where(total > 0, shares / total, 1 / num_layers)
        spare = [kept - protected for kept, protected in zip(batch.num_tokens, batch.num_protected, strict=True)]
        layer_tokens = shares * batch.on_device(spare)[:, None] * num_layers  # per head
        counts = (layer_tokens * num_heads).round().to(torch.int64)
        wanted = counts.clamp(min=1).minimum(batch.lens[:, None] * num_heads)
        counted = [
            count_best(free, wanted[:, slice(*layers)].flatten())
            for layers, free in zip(tiles.bounds, tiles, strict=True)
        ]
        joint = joint_summary(counted, num_reqs)
        return torch.cat([joint, layer_tokens, wanted, counts], dim=1)

    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        layers = facts.num_layers
        layer_tokens, wanted, counts = summary[-3 * layers :].view(3, layers).unbind(0)
        shares = joint_shares(summary[: -3 * layers], wanted.to(torch.int64)) * (counts > 0)[:, None]
        floor = self.floor_alpha * layer_tokens[:, None]
        return shares * (1 - self.floor_alpha) + floor + facts.num_protected


def _masses(scores: torch.Tensor, is_ragged: bool) -> torch.Tensor:
    """Return the scores of the unprotected tokens as numbers of at least 0; 0 for the protected ones.

    LAVa's own are amounts of attention. Policies whose scores may be negative are shifted, layer by layer.

    scores:    [num_layers, num_kv_heads, kv_len]
    is_ragged: whether NaN, which stands behind the tokens of some requests, is to stay: it ranks below all masses
    """
    others = ~torch.isfinite(scores)
    masses = scores.masked_fill(others, 0.0)
    masses -= masses.amin(dim=(1, 2), keepdim=True).clamp(max=0)
    masses.masked_fill_(others, 0.0)
    return masses.masked_fill_(scores.isnan(), float("nan")) if is_ragged else masses


def layer_entropies(scores: torch.Tensor) -> torch.Tensor:
    """Return [num_layers] float64, the entropy of each layer's scores over its heads and tokens, in nats.

    scores: [num_layers, num_kv_heads, kv_len] >= 0, or NaN, which counts as 0
    """
    pieces = scores.flatten(1).split(_PIECE, dim=1)
    total = _sum([piece.to(torch.float64).nan_to_num().sum(dim=1) for piece in pieces])
    total = total.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return _sum([torch.special.entr(piece.to(torch.float64).nan_to_num().div_(total)).sum(dim=1) for piece in pieces])


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
