"""What the lookahead policies share: attention from queries behind the prompt, the answer's or ones that stand in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from vllm_kvevict.policies.attention import attention_bytes, attention_tiles
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.window import ObservationWindow


@dataclass(frozen=True)
class Lookahead(ObservationWindow):
    """Judges the prompt by tokens behind it, and by the last ``window`` ones of the prompt, which always stay.

    Lookahead Q-Cache (Wang et al. 2025, arXiv:2505.20334). Query heads that share a KV head are averaged, since a
    paged GQA cache holds one copy of a token per KV head.

    window:        last tokens of the prompt whose queries count as well: 0 as in LAQ, 8 as in LAQ++
    pool_kernel:   see ``ObservationWindow``
    num_lookahead: tokens behind the prompt

    Raises ValueError for a wrong value.
    """

    window: Annotated[int, at_least(0)] = 0
    num_lookahead: Annotated[int, at_least(0)] = 8

    def rank(self, batch: ScoreBatch, last_seen: torch.Tensor, num_last: int) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, the pooled attention that the queries pay.

        last_seen: [num_reqs, num_layers, num_kv_heads, num_queries] int64, the last cache index that a query sees; -1
                   for one that does not count
        num_last:  last tokens of each head, which are not judged: they get the highest score of the layer, unless the
                   head holds nothing else
        """
        scores, kv_lens, last_seen = batch.new_scores(), batch.kv_lens.flatten(), last_seen.flatten(0, 2)
        for heads in batch.head_tiles(attention_bytes(batch)):
            for tile in attention_tiles(batch, heads, last_seen[heads]):
                scores[heads, tile.start : tile.end] = tile.probabilities.sum(dim=3).mean(dim=2)
            self.pool_scores(scores[heads], kv_lens[heads], num_last, "max")
        return batch.fill_last(scores.view(batch.shape), num_last=num_last)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 5 * num_kv_heads + 8  # the scores, and which tokens are not judged; all else is a tile
