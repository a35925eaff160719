"""Global: all layers and heads compete for all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.adakv import guard_best
from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, WishBatch, WishFacts, joint_shares, joint_summary
from vllm_kvevict.kernels.select import count_best
from vllm_kvevict.policies.options import between


@ALLOCATORS.register("global")
@dataclass(frozen=True)
class Global(BatchAllocator):
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

    def summarise(self, batch: WishBatch) -> torch.Tensor:
        guarded = guard_best(batch, [int(num_tokens * self.head_floor) for num_tokens in batch.num_tokens])
        num_reqs, num_layers, num_heads, _ = guarded.shape
        parts = []
        if self.layer_floor:
            sure = [self._sure_of_layer(num_tokens, num_heads) for num_tokens in batch.num_tokens]
            totals = batch.on_device(sure).clamp(min=1)[:, None].expand(num_reqs, num_layers)
            parts.append(joint_summary(*count_best(guarded.flatten(0, 1), totals.flatten()), num_reqs))
            guarded = _guard_best_of_layers(guarded, totals, batch.on_device(sure))
        totals = batch.on_device([num_tokens * num_layers * num_heads for num_tokens in batch.num_tokens])
        parts.append(joint_summary(*count_best(guarded.flatten(1, 2), totals), num_reqs))
        return torch.cat(parts, dim=1)

    def _sure_of_layer(self, num_tokens: int, num_heads: int) -> int:
        return int(num_tokens * self.layer_floor) * num_heads

    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        shape = facts.num_layers, facts.num_kv_heads
        total = torch.tensor([facts.num_tokens * shape[0] * shape[1]])
        shares = joint_shares(summary[-2 * shape[0] * shape[1] :], total).view(shape)
        if sure := self._sure_of_layer(facts.num_tokens, facts.num_kv_heads):
            shares = shares.maximum(joint_shares(summary[: 2 * shares.numel()], torch.full(shape[:1], sure)))
        return shares


def _guard_best_of_layers(scores: torch.Tensor, totals: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
    """Return ``scores`` [num_reqs, num_layers, num_kv_heads, max_kv_len] with the best of each layer at +inf.

    Scores that tie for the last places stay as they are: no order of heads or layers may decide between them.

    totals: [num_reqs, num_layers] int64, how many of each layer, at least 1
    sure:   [num_reqs] 0 where it is none in fact
    """
    flat = scores.flatten(2)
    ordered = flat.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")).sort(dim=2, descending=True)
    last = ordered.values.gather(2, totals[..., None] - 1)
    is_clear = (flat >= last).sum(dim=2, keepdim=True) == totals[..., None]
    best = torch.where(is_clear, flat >= last, flat > last) & (sure > 0)[:, None, None]
    return flat.masked_fill(best, float("inf")).view_as(scores)
