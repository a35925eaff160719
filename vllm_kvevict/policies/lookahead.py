"""What the lookahead policies share: attention from queries behind the prompt, the answer's or ones that stand in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from vllm_kvevict.policies.attention import attention_tiles
from vllm_kvevict.policies.base import ScoreInputs
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

    def rank(self, inputs: ScoreInputs, num_keys: int) -> torch.Tensor:
        """Return [num_kv_heads, kv_len] float32, the pooled attention that ``inputs.query`` pays to each token.

        The last ``window`` of the first ``num_keys`` tokens, and what stands behind them, get the highest score.
        """
        num_judged = num_keys - self.window
        if num_judged <= 0:  # every token observes: none is to be judged
            return inputs.query.new_zeros(inputs.num_kv_heads, inputs.kv_len, dtype=torch.float32)
        scores = inputs.new_scores()
        for tile in attention_tiles(inputs, num_keys=num_keys):
            scores[:, tile.start : tile.end] = tile.probabilities.sum(dim=2).mean(dim=1)
        judged = scores[:, :num_judged]
        self.pool_scores(judged, "max")
        scores[:, num_judged:] = judged.amax()
        return scores

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile
