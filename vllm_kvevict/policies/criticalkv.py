"""CriticalKV: another policy's ranking, weighted by what each value does to the output of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES, Need, ScoreInputs
from vllm_kvevict.policies.options import at_least, between
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

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # its scores, ours, and the best of the first stage of one head with their indices
        return max(self.wrapped.scratch_bytes(num_heads, num_kv_heads, head_size), 8 * num_kv_heads + 12)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        by_host = self.wrapped.score(inputs)
        critical = torch.empty_like(by_host)
        for start, end in inputs.tiles():
            weighted = (by_host[:, start:end] + self.epsilon) * projected_value_norm(inputs, start, end)
            critical[:, start:end] = weighted
        num_first = self._num_first(inputs)
        if num_first:
            span = critical.amax() - critical.amin()
            for of_head, ours in zip(by_host, critical, strict=True):
                best = of_head.topk(num_first).indices
                ours.scatter_add_(0, best, span.expand(best.shape))
        return critical

    def _num_first(self, inputs: ScoreInputs) -> int:
        """Return how many tokens of each head the first stage chooses."""
        if inputs.num_kept is None or self.first_stage_ratio == 0:
            return 0
        return min(max(int(inputs.num_kept * self.first_stage_ratio), 1), inputs.kv_len)


def projected_value_norm(inputs: ScoreInputs, start: int, end: int) -> torch.Tensor:
    """Return [num_kv_heads, end - start] float32, the l1 norm of W_O v, mean over the query heads of a KV head.

    One query head at a time: what it adds to the output of the layer is [num_kv_heads, end - start, hidden_size].
    """
    projection = inputs.weights.output_projection
    if projection is None:
        raise ValueError("criticalkv: expected the output projection among the weights, got none")
    values = inputs.gather_values(start, end)
    by_head = projection.t().unflatten(0, (inputs.num_kv_heads, -1, values.shape[2]))  # [kv heads, group, D, hidden]
    norms = [
        torch.stack([(value @ head.float()).abs_().sum(dim=-1) for head in heads]).mean(dim=0)
        for value, heads in zip(values, by_head, strict=True)
    ]
    return torch.stack(norms)
