"""Global: all layers and heads compete for all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.budgets.adakv import guard_best
from vllm_kvevict.budgets.base import ALLOCATORS
from vllm_kvevict.budgets.batch import BatchAllocator, Tiles, WishBatch, WishFacts, joint_shares, joint_summary
from vllm_kvevict.budgets.joint import count_best_of_tiles, kth_highest
from vllm_kvevict.kernels.select import count_best
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.options import between

_BYTES_PER_SORTED = 16  # with its place
_BYTES_PER_SCORE = 16  # as they came, as they are guarded once and twice, and what is the best


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
        num_reqs, num_layers, num_heads, _ = batch.shape
        sure_of_heads = [int(num_tokens * self.head_floor) for num_tokens in batch.num_tokens]
        tiles = batch.tiles(_BYTES_PER_SCORE).map(lambda scores: guard_best(batch, scores, sure_of_heads))
        parts = []
        if self.layer_floor:
            sure = batch.on_device([self._sure_of_layer(num_tokens, num_heads) for num_tokens in batch.num_tokens])
            counts = [count_best(guarded.flatten(0, 1), _of_layers(sure, guarded).flatten()) for guarded in tiles]
            parts.append(joint_summary(counts, num_reqs))
            tiles = tiles.map(lambda guarded: _guard_best_of_layers(guarded, sure))
        totals = batch.on_device([num_tokens * num_layers * num_heads for num_tokens in batch.num_tokens])
        parts.append(joint_summary([_count_best(tiles, totals)], num_reqs))
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


def _count_best(tiles: Tiles[torch.Tensor], totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two of [num_reqs, heads], what ``count_best`` counts of all layers of each request together."""
    rows = tiles.map(lambda guarded: guarded.flatten(1, 2))
    if len(rows.bounds) > 1:
        return count_best_of_tiles(rows, totals)
    (only,) = rows
    return count_best(only, totals)


def _of_layers(sure: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return [num_reqs, num_layers] int64, how many tokens each layer is sure of, at least 1."""
    return sure.clamp(min=1)[:, None].expand(scores.shape[:2])


def _guard_best_of_layers(scores: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
    """Return ``scores`` [num_reqs, num_layers, num_kv_heads, max_kv_len] with the best of each layer at +inf.

    Scores that tie for the last places stay as they are: no order of heads or layers may decide between them.

    sure: [num_reqs] int64, how many of each layer
    """
    flat, totals = scores.flatten(2), _of_layers(sure, scores)
    last = _last_of_layers(flat, totals)
    is_clear = (flat >= last).sum(dim=2, keepdim=True) == totals[..., None]
    best = (flat > last).logical_or_((flat == last).logical_and_(is_clear)).logical_and_((sure > 0)[:, None, None])
    return flat.masked_fill(best, float("inf")).view_as(scores)


def _last_of_layers(scores: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """Return [num_reqs, num_layers, 1], of each layer's scores the ``totals``-th highest: sorted, if there is room."""
    if not scratch.fits(_BYTES_PER_SORTED * scores.numel()):
        return kth_highest([scores.flatten(0, 1)], totals.flatten()).view(*totals.shape, 1)
    ranked = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    return ranked.sort(dim=2, descending=True).values.gather(2, totals[..., None] - 1)
