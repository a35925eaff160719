"""Lookahead by the answer itself: keep the tokens that the first tokens of the real answer attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.lookahead import Lookahead
from vllm_kvevict.policies.options import at_least


@POLICIES.register("laq_deferred")
@dataclass(frozen=True)
class LookaheadDeferred(BatchPolicy, Lookahead):
    """Score a token by the attention it gets from the first ``num_lookahead`` tokens of the answer.

    After Lookahead Q-Cache, see ``policies/laq.py``, which generates as many pseudo tokens on a cheap cache and forgets
    them. Here the request decodes real tokens on its full cache and is evicted then: no pass of the model is added, the
    queries are the true ones, and the request holds all of its prompt for as many more steps. An answer that ends
    before that is never evicted.

    window, pool_kernel: see ``Lookahead``
    num_lookahead:       tokens of the answer, >= 1

    Raises ValueError for another value.
    """

    num_lookahead: Annotated[int, at_least(1)] = 8
    name: ClassVar[str] = "laq_deferred"
    paper: ClassVar[str] = "Lookahead Q-Cache, arXiv:2505.20334"

    @property
    def query_window(self) -> int:
        return self.window + self.num_lookahead

    @property
    def num_recent(self) -> int:
        return self.query_window

    @property
    def num_deferred(self) -> int:
        return self.num_lookahead

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        # tokens of the answer do not compete: nothing pays to them
        sees = torch.arange(-batch.query.shape[2], 0, device=batch.query.device).clamp(max=-self.num_lookahead - 1)
        return self.rank(batch, batch.kv_lens[..., None] + sees, self.query_window)
