"""CriticalKV: another policy's ranking, weighted by what each value does to the output of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.kernels.select import select
from vllm_kvevict.policies.base import POLICIES, Need
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.options import at_least, between
from vllm_kvevict.policies.stretches import products
from vllm_kvevict.policies.wrapper import WrapperPolicy


@POLICIES.register("criticalkv")
@dataclass(frozen=True)
class CriticalKV(WrapperPolicy):
    """Keep the best of another policy for half of the budget; rank the rest by score times the l1 norm of W_O v.

    Paper: Feng et al. 2025, arXiv:2502.03805; the code is kvpress's CriticalKVPress. W_O v is taken per query head and
    its norm averaged over the heads of one KV head.

    Departures: tokens of the first stage are ranked above all others, and among themselves, by what the second stage
    gives them; kvpress has them tie at the largest float. With an allocator that ranks heads jointly, the first stage
    is a share of the average budget, so every head is sure of it; CriticalAdaKV gives each head a share of its own
    budget. Where the budget is not known only the second stage applies.

    Meant for policies whose scores are amounts of attention: a score below 0 would sink with a larger norm.

    policy, policy_options: see ``WrapperPolicy``
    first_stage_ratio:      share of the budget that goes to its best tokens, 0 to 1; at least one token if it is not 0
    epsilon:                added to its scores before they are weighted, >= 0

    Raises ValueError for a value outside those ranges.
    """

    first_stage_ratio: Annotated[float, between(0, 1)] = 0.5
    epsilon: Annotated[float, at_least(0)] = 1e-4
    name: ClassVar[str] = "criticalkv"
    paper: ClassVar[str] = "CriticalKV, arXiv:2502.03805"

    @property
    def needs(self) -> frozenset[Need]:
        return self.wrapped.needs | {Need.OUTPUT_PROJECTION}

    @property
    def default_allocator(self) -> str:
        return self.wrapped.default_allocator

    @property
    def layers_at_once(self) -> int:
        return 1  # the output projection of a layer may be a copy

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # its scores, ours, and what is behind the tokens or which are the best of the first stage
        return max(self.wrapped.scratch_bytes(num_heads, num_kv_heads, head_size), 9 * num_kv_heads + 8)

    def rescore(self, batch: ScoreBatch, scores: torch.Tensor) -> torch.Tensor:
        by_host, critical = scores.flatten(0, 2), projected_value_norms(batch)
        for heads, start, end in batch.tiles(4):
            critical[heads, start:end].mul_(by_host[heads, start:end] + self.epsilon)
        if batch.num_kept is not None and self.first_stage_ratio > 0:
            share = (batch.num_kept.double() * self.first_stage_ratio).long().clamp_(min=1)
            num_first = share.minimum(batch.kv_lens)
            span = _spans(batch, critical)[:, None]
            is_first = select(by_host, num_first.flatten(), 0, 0, batch.kv_lens.flatten())
            for heads, start, end in batch.tiles(4):
                critical[heads, start:end].add_(span[heads].where(is_first[heads, start:end], 0.0))
        return critical.view(batch.shape)


def projected_value_norms(batch: ScoreBatch) -> torch.Tensor:
    """Return [num_reqs * num_layers * num_kv_heads, max_kv_len] float32, the l1 norm of W_O v, mean over the query
    heads of a KV head; anything behind the tokens of a head.

    One query head of a layer at a time: what it adds to the output is [num_reqs, num_tokens, hidden_size].
    """
    norms, num_layers, num_kv_heads = batch.new_scores(), *batch.shape[1:3]
    if len(batch.projections) != num_layers:
        raise ValueError("criticalkv: expected the output projections of all layers, got others")
    for place, projection in enumerate(batch.projections):
        head_size, hidden_size = batch.values.shape[2], len(projection)
        by_kv_head = projection.t().unflatten(0, (num_kv_heads, -1, head_size))  # [kv heads, group, D, hidden]
        for number, of_group in enumerate(by_kv_head, place * num_kv_heads):
            query_heads = of_group.float().split(1)
            in_all_requests = range(number, len(norms), num_layers * num_kv_heads)
            for heads in batch.head_tiles(8 * head_size + 4 * hidden_size, heads=in_all_requests):
                for start, end in batch.token_tiles():
                    values = batch.gather_values(heads, start, end)
                    parts = (products(values, head).abs_().sum(dim=-1) for head in query_heads)
                    norms[heads, start:end] = reduce(torch.add, parts) / len(query_heads)
    return norms


def _spans(batch: ScoreBatch, scores: torch.Tensor) -> torch.Tensor:
    """Return [num_reqs * num_layers * num_kv_heads] float32, the highest of the scores of the heads of a layer that
    hold as many tokens less the lowest.

    scores: [num_reqs * num_layers * num_kv_heads, max_kv_len], of which what is behind the tokens is overwritten
    """
    is_behind = batch.is_behind(slice(None), 0, batch.max_kv_len)
    highest = batch.max_over_peers(scores.masked_fill_(is_behind, float("-inf")).amax(dim=1).view(batch.shape[:3]))
    lowest = -batch.max_over_peers(-scores.masked_fill_(is_behind, float("inf")).amin(dim=1).view(batch.shape[:3]))
    return (highest - lowest).expand(batch.shape[:3]).flatten()
