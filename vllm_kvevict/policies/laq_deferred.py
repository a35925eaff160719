"""Lookahead by the answer itself: keep the tokens that the first tokens of the real answer attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvevict.policies.attention import attention_tiles
from vllm_kvevict.policies.base import POLICIES, ScoreInputs
from vllm_kvevict.policies.window import ObservationWindow


@POLICIES.register("laq_deferred")
@dataclass(frozen=True)
class LookaheadDeferred(ObservationWindow):
    """Score a token by the attention it gets from the first ``num_lookahead`` tokens of the answer.

    After Lookahead Q-Cache (Wang et al. 2025, arXiv:2505.20334), which generates as many pseudo tokens on a cheap
    cache, scores the prompt by their queries and forgets them. Here the request decodes real tokens on its full cache
    and is evicted then: no pass of the model is added, the queries are the true ones, and the request holds all of its
    prompt for as many more steps. An answer that ends before that is never evicted. Query heads that share a KV head
    are averaged.

    window:        last tokens of the prompt whose queries count as well, and which always stay: 0 as in LAQ, 8 as in
                   LAQ++
    pool_kernel:   see ``ObservationWindow``
    num_lookahead: tokens of the answer, >= 1

    Raises ValueError for another value.
    """

    window: int = 0
    num_lookahead: int = 8
    name: ClassVar[str] = "laq_deferred"
    paper: ClassVar[str] = "Lookahead Q-Cache, arXiv:2505.20334"

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 0:
            raise ValueError(f"laq_deferred.window: expected at least 0 tokens, got {self.window!r}")
        if type(self.num_lookahead) is not int or self.num_lookahead < 1:
            raise ValueError(f"laq_deferred.num_lookahead: expected at least 1 token, got {self.num_lookahead!r}")
        self.check_pool_kernel()

    @property
    def query_window(self) -> int:
        return self.window + self.num_lookahead

    @property
    def num_recent(self) -> int:
        return self.query_window

    @property
    def num_deferred(self) -> int:
        return self.num_lookahead

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        num_keys = inputs.kv_len - self.num_lookahead  # tokens of the answer do not compete
        num_judged = num_keys - self.window
        if num_judged <= 0:
            return inputs.query.new_zeros(inputs.num_kv_heads, inputs.kv_len, dtype=torch.float32)
        tiles = [tile.probabilities.sum(dim=2).mean(dim=1) for tile in attention_tiles(inputs, num_keys=num_keys)]
        scores = self.pooled(torch.cat(tiles, dim=1)[:, :num_judged], "max")
        return torch.cat([scores, scores.amax().expand(inputs.num_kv_heads, self.query_window)], dim=1)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # the scores in tiles, in one piece, after the pool and at last, and the places of the maxima in int64
        return 24 * num_kv_heads
