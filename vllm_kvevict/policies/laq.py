"""Lookahead Q-Cache: keep the tokens that a few greedy tokens attend to, made on a cheap cache and forgotten."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch

from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.inputs import ScoreInputs
from vllm_kvevict.policies.lookahead import Lookahead
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.snapkv import SnapKV


@POLICIES.register("laq")
@dataclass(frozen=True)
class LookaheadQCache(Lookahead):
    """Score a token by the attention it gets from ``num_lookahead`` greedy pseudo tokens that follow the prompt.

    Paper: Wang et al. 2025, arXiv:2505.20334. SnapKV chooses what the pseudo tokens see: ``capacity`` tokens of the
    prompt in every head, to which they add themselves. They cost as many passes of the model, of one token per
    request, and leave no trace: the answer starts from the logits of the prompt's last token. Generation stops early
    where a pseudo token ends the answer. With ``num_lookahead=0`` and ``window=32`` it is SnapKV.

    Departs from the public code, whose causal mask stands on the last tokens of the prompt though the pseudo tokens
    come after all of it: set ``misplaced_mask`` for that.

    window, pool_kernel: see ``Lookahead``
    num_lookahead:       pseudo tokens, >= 0, and >= 1 if ``window`` is 0
    first_window:        window of SnapKV for the cheap cache, in tokens, >= 1
    capacity:            tokens of the prompt in the cheap cache, >= first_window; None: as many as the budget keeps
    misplaced_mask:      hide the last keys of the prompt from the first queries as the public code does

    Raises ValueError for another value.
    """

    first_window: Annotated[int, at_least(1)] = 32
    capacity: Annotated[int, at_least(1)] | None = None
    misplaced_mask: bool = False
    name: ClassVar[str] = "laq"
    paper: ClassVar[str] = "Lookahead Q-Cache, arXiv:2505.20334"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_lookahead == self.window == 0:
            raise ValueError(
                f"{self.name}.num_lookahead: expected a whole number of at least 1 with a window of 0, got 0"
            )
        if self.capacity is not None and self.capacity < self.first_window:
            raise ValueError(
                f"{self.name}.capacity: expected at least {self.first_window} tokens (first_window), "
                f"got {self.capacity}"
            )

    @property
    def query_window(self) -> int:
        return max(self.window, self.first_window if self.num_lookahead else 0)

    @property
    def num_recent(self) -> int:
        return self.window

    @property
    def num_pseudo_tokens(self) -> int:
        return self.num_lookahead

    @property
    def supports_decode(self) -> bool:
        return False

    def preselect(self, inputs: ScoreInputs) -> torch.Tensor:
        window = min(self.first_window, inputs.kv_len)
        capacity = max(self.capacity or inputs.num_kept or 0, window)
        first = SnapKV(window=self.first_window, pool_kernel=self.pool_kernel)
        scores = first.score(replace(inputs, query=inputs.query[-window:]))
        scores[:, inputs.kv_len - window :] = float("inf")
        # pooled neighbours tie: of these the first ones, so that pseudo tokens do not depend on how a sort is done
        return scores.argsort(dim=1, descending=True, stable=True)[:, :capacity]

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        query, num_behind = inputs.query[max(len(inputs.query) - self.window, 0) :], 0
        if inputs.pseudo_query is not None:
            query = torch.cat([query, inputs.pseudo_query])
            num_behind = 0 if self.misplaced_mask else len(inputs.pseudo_query)
        seen = replace(inputs, query=query, kv_len=inputs.kv_len + num_behind)
        return self.rank(ScoreInputs.together([seen]), num_behind)[0, 0, :, : inputs.kv_len]


@POLICIES.register("laq++")
@dataclass(frozen=True)
class LookaheadQCachePlus(LookaheadQCache):
    """``LookaheadQCache`` with the last 8 queries of the prompt beside those of the pseudo tokens.

    Options: see ``LookaheadQCache``.
    """

    window: int = 8
    name: ClassVar[str] = "laq++"
