"""KeyDiff: keep the tokens whose keys are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, ScoreInputs


@POLICIES.register("keydiff")
@dataclass(frozen=True)
class KeyDiff(EvictionPolicy):
    """Score a token by minus the cosine between its key and the anchor, the mean of all normalised keys of its head.

    Paper: Park et al. 2025 (KeyDiff), arXiv:2504.15364. Departs from the paper, which evicts block by block while the
    prompt is read: here, as in kvpress without its ``BlockPress``, once, over the keys of the whole prompt. No option
    and no protected token.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "KeyDiff, arXiv:2504.15364"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        anchor = _anchor(inputs)
        scores = inputs.new_scores()
        for start, end in inputs.tiles():
            scores[:, start:end] = -F.cosine_similarity(inputs.gather_keys(start, end), anchor, dim=-1)
        return scores

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile


def _anchor(inputs: ScoreInputs) -> torch.Tensor:
    """Return [num_kv_heads, 1, head_size] float32, the mean direction of the keys of each head."""
    sums = [F.normalize(inputs.gather_keys(*tile), dim=-1).sum(dim=1, keepdim=True) for tile in inputs.tiles()]
    return torch.stack(sums).sum(dim=0) / inputs.kv_len
