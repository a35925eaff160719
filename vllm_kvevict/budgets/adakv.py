"""AdaKV: the heads of a layer compete for its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, WishBatch, WishFacts, joint_shares, joint_summary
from vllm_kvevict.kernels.select import count_best, select
from vllm_kvevict.policies.options import between

# what ``guard_best`` and ``count_best`` hold by each score: as it came, as it is guarded, and what is the best
BYTES_PER_GUARDED = 10


@ALLOCATORS.register("adakv")
@dataclass(frozen=True)
class AdaKV(BatchAllocator):
    """Every layer keeps the same number of tokens: the best of all its heads together, after a share for each head.

    Paper: Feng et al. 2024, arXiv:2407.11550. The safeguard is the one of kvpress's AdaKVPress: each head's best
    ``alpha`` of an equal share stays, the rest is won in the joint ranking.

    alpha: share of an equal budget that every head is sure of, 0 to 1; 1 is uniform

    Raises ValueError for a value outside that range.
    """

    alpha: Annotated[float, between(0, 1)] = 0.2
    name: ClassVar[str] = "adakv"

    def summarise(self, batch: WishBatch) -> torch.Tensor:
        num_reqs, _, num_heads, _ = batch.shape
        totals = batch.on_device([num_tokens * num_heads for num_tokens in batch.num_tokens])
        sure = [int(num_tokens * self.alpha) for num_tokens in batch.num_tokens]

        def count(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            of_layers = totals[:, None].expand(scores.shape[:2])
            return count_best(guard_best(batch, scores, sure).flatten(0, 1), of_layers.flatten())

        return joint_summary(batch.tiles(BYTES_PER_GUARDED).map(count), num_reqs)

    def share(self, summary: torch.Tensor, facts: WishFacts) -> torch.Tensor:
        return joint_shares(summary, torch.full((facts.num_layers,), facts.num_tokens * facts.num_kv_heads))


def guard_best(batch: WishBatch, scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return ``scores`` of some layers with the ``counts`` [num_reqs] highest of every head at +inf."""
    shape = scores.shape[:3]
    num_sure, lens = (numbers[:, None, None].expand(shape) for numbers in (batch.on_device(counts), batch.lens))
    best = select(scores, num_sure, 0, 0, lens if batch.is_ragged else None)
    return scores.masked_fill(best, float("inf"))
