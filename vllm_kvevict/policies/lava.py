"""LAVa: attention of the last queries, weighted by the largest value of each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies.base import POLICIES
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

    @property
    def reduction(self) -> Reduction:
        return Reduction("max", "max", self.pool_kernel, weight="largest_value_norm")
