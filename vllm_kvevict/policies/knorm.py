"""Knorm: keep the tokens whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy


@POLICIES.register("knorm")
@dataclass(frozen=True)
class Knorm(BatchPolicy):
    """Score a token by the length of its key: the shorter the key, the more attention it tends to get.

    Paper: Devoto et al. 2024, "A simple and effective L2 norm-based strategy for KV cache compression",
    arXiv:2406.11430. Departs from the authors' code, which leaves the first layers whole: here all layers are evicted,
    as in kvpress; the allocator ``fixed`` can give the first ones more. No option and no protected token.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "L2 norm, arXiv:2406.11430"

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        scores = batch.new_scores()
        for heads, start, end in batch.tiles(8 * batch.keys.shape[2]):
            scores[heads, start:end] = -batch.gather_keys(heads, start, end).norm(dim=-1)
        return scores.view(batch.shape)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile
