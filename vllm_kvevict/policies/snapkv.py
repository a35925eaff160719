"""SnapKV: keep the tokens that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from vllm_kvevict.kernels.window_attention import window_attention
from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, ScoreInputs


@POLICIES.register("snapkv")
@dataclass(frozen=True)
class SnapKV(EvictionPolicy):
    """Score a token by the attention it gets from the last ``window`` queries of the prompt.

    Paper: Li et al. 2024, arXiv:2404.14469. Departs from its code: query heads that share a KV head are reduced
    to one score, since a paged GQA cache holds one copy of a token per KV head. The defaults are the paper's
    LongBench setting; ``SnapKV(window=64, pool="avg", pool_kernel=5)`` is the one of kvpress.

    window:      observation window in tokens, >= 1; these tokens are always kept
    pool:        how neighbours share their score: "max" or "avg" (zero padding counts at the edges)
    pool_kernel: width of the pool in tokens, odd, >= 1
    group:       reduction over the query heads of one KV head: "mean", "max" or "sum"

    Raises ValueError for a value outside those ranges.
    """

    window: int = 32
    pool: Literal["max", "avg"] = "max"
    pool_kernel: int = 7
    group: Literal["mean", "max", "sum"] = "mean"

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise ValueError(f"snapkv.window: expected at least 1 token, got {self.window!r}")
        if type(self.pool_kernel) is not int or self.pool_kernel < 1 or self.pool_kernel % 2 == 0:
            raise ValueError(f"snapkv.pool_kernel: expected an odd number of at least 1, got {self.pool_kernel!r}")
        if self.pool not in ("max", "avg"):
            raise ValueError(f"snapkv.pool: expected 'max' or 'avg', got {self.pool!r}")
        if self.group not in ("mean", "max", "sum"):
            raise ValueError(f"snapkv.group: expected 'mean', 'max' or 'sum', got {self.group!r}")

    @property
    def query_window(self) -> int:
        return self.window

    @property
    def num_recent(self) -> int:
        return self.window

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        window = len(inputs.query)
        num_kv_heads = inputs.page_table.shape[0]
        if window >= inputs.kv_len:  # every token observes: none is to be judged
            return inputs.query.new_zeros(num_kv_heads, inputs.kv_len, dtype=torch.float32)
        attention = window_attention(inputs.query, inputs.keys, inputs.page_table, inputs.kv_len, inputs.scale)
        grouped = self._reduce_group(attention.unflatten(0, (num_kv_heads, -1)) / window)
        # the window's own columns are cut off before pooling, so that they lend nothing to their neighbours
        pooled = self._pool(grouped[:, :-window])
        return torch.cat([pooled, pooled.amax().expand(num_kv_heads, window)], dim=1)

    def _reduce_group(self, attention: torch.Tensor) -> torch.Tensor:
        if self.group == "max":
            return attention.amax(dim=1)
        return attention.mean(dim=1) if self.group == "mean" else attention.sum(dim=1)

    def _pool(self, scores: torch.Tensor) -> torch.Tensor:
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d
        return pool(scores, self.pool_kernel, stride=1, padding=self.pool_kernel // 2)
