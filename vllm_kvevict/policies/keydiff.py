"""KeyDiff: keep the tokens whose keys are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.stretches import sum_of_tokens


@POLICIES.register("keydiff")
@dataclass(frozen=True)
class KeyDiff(BatchPolicy):
    """Score a token by minus the cosine between its key and the anchor, the mean of all normalised keys of its head.

    Paper: Park et al. 2025 (KeyDiff), arXiv:2504.15364. Departs from the paper, which evicts block by block while the
    prompt is read: here, as in kvpress without its ``BlockPress``, once, over the keys of the whole prompt. No option
    and no protected token.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "KeyDiff, arXiv:2504.15364"

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        scores = batch.new_scores()
        for heads in batch.head_tiles(12 * batch.keys.shape[2]):
            anchor = _anchor(batch, heads)
            for start, end in batch.token_tiles():
                keys = batch.gather_keys(heads, start, end)
                scores[heads, start:end] = -F.cosine_similarity(keys, anchor, dim=-1)
        return scores.view(batch.shape)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile


def _anchor(batch: ScoreBatch, heads: slice) -> torch.Tensor:
    """Return [num_heads, 1, head_size] float32, the mean direction of the keys of each of these heads."""
    total = torch.zeros((), device=batch.keys.device)
    for start, end in batch.token_tiles():
        directions = F.normalize(batch.gather_keys(heads, start, end), dim=-1)
        total = total + sum_of_tokens(directions.masked_fill_(batch.is_behind(heads, start, end)[..., None], 0.0))
    return (total / batch.kv_lens.flatten()[heads, None])[:, None]
