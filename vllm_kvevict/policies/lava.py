"""LAVa: attention of the last queries, weighted by the largest value of each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES, ScoreInputs
from vllm_kvevict.policies.window import WindowPolicy


@POLICIES.register("lava")
@dataclass(frozen=True)
class Lava(WindowPolicy):
    """Score a token by its attention from the last ``window`` queries, times the largest l1 norm of V of its head.

    Paper: Shen et al. 2025 (LAVa), arXiv:2509.09754. The norm is one number per head, over the tokens before the
    window: it makes heads comparable and changes nothing inside one. Query heads of one KV head: the largest counts.
    LAVa as published is this score with the allocator of the same name, which is the default here.

    window, pool_kernel: see ``ObservationWindow``; the pool takes the maximum
    """

    name: ClassVar[str] = "lava"
    paper: ClassVar[str] = "LAVa, arXiv:2509.09754"

    @property
    def default_allocator(self) -> str:
        return "lava"

    def judge(self, attention: torch.Tensor, inputs: ScoreInputs) -> torch.Tensor:
        pooled = self.pooled(attention.amax(dim=1), "max")
        return pooled * _largest_value_norm(inputs, attention.shape[2])[:, None]


def _largest_value_norm(inputs: ScoreInputs, num_tokens: int) -> torch.Tensor:
    """Return [num_kv_heads] float32, the largest l1 norm of the first ``num_tokens`` values of each head."""
    norms = [inputs.gather_values(*tile).abs().sum(dim=-1).amax(dim=1) for tile in inputs.tiles(end=num_tokens)]
    return torch.stack(norms).amax(dim=0)
