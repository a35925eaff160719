"""Knorm: keep the tokens whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, ScoreInputs


@POLICIES.register("knorm")
@dataclass(frozen=True)
class Knorm(EvictionPolicy):
    """Score a token by the length of its key: the shorter the key, the more attention it tends to get.

    Paper: Devoto et al. 2024, "A simple and effective L2 norm-based strategy for KV cache compression",
    arXiv:2406.11430. Departs from the authors' code, which leaves the first layers whole: here all layers are evicted,
    as in kvpress; the allocator ``fixed`` can give the first ones more. No option and no protected token.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "L2 norm, arXiv:2406.11430"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        scores = inputs.new_scores()
        for start, end in inputs.tiles():
            scores[:, start:end] = -inputs.gather_keys(start, end).norm(dim=-1)
        return scores

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile
