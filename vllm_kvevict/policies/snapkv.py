"""SnapKV: keep the tokens that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.window import WindowPolicy


@POLICIES.register("snapkv")
@dataclass(frozen=True)
class SnapKV(WindowPolicy):
    """Score a token by the attention it gets from the last ``window`` queries of the prompt.

    Paper: Li et al. 2024, arXiv:2404.14469. Departs from its code: query heads that share a KV head are reduced
    to one score, since a paged GQA cache holds one copy of a token per KV head. The defaults are the paper's
    LongBench setting; ``SnapKV(window=64, pool="avg", pool_kernel=5)`` is the one of kvpress.

    window, pool_kernel: see ``ObservationWindow``
    pool:                how neighbours share their score: "max" or "avg" (zero padding counts at the edges)
    group:               reduction over the query heads of one KV head: "mean", "max" or "sum"

    Raises ValueError for another value.
    """

    pool: Literal["max", "avg"] = "max"
    group: Literal["mean", "max", "sum"] = "mean"
    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, arXiv:2404.14469"

    @property
    def reduction(self) -> Reduction:
        return Reduction(self.group, self.pool, self.pool_kernel)
