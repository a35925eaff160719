"""Lookahead Q-Cache: keep the tokens that a few greedy tokens attend to, made on a cheap cache and forgotten."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.inputs import ScoreInputs
from vllm_kvevict.policies.lookahead import Lookahead
from vllm_kvevict.policies.options import at_least
from vllm_kvevict.policies.snapkv import SnapKV


@POLICIES.register("laq")
@dataclass(frozen=True)
class LookaheadQCache(BatchPolicy, Lookahead):
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
        return self.preselect_batch(ScoreInputs.together([inputs]))[0, 0]

    def preselect_batch(self, batch: ScoreBatch) -> torch.Tensor:
        query = batch.query[:, :, max(batch.query.shape[2] - self.first_window, 0) :]
        window = query.shape[2]
        first = SnapKV(window=self.first_window, pool_kernel=self.pool_kernel)
        scores = first.score_batch(replace(batch, query=query))
        place, kv_lens = torch.arange(scores.shape[3], device=scores.device), batch.kv_lens[..., None]
        scores.masked_fill_(place >= kv_lens - window, float("inf")).masked_fill_(place >= kv_lens, float("-inf"))
        capacities = [
            min(max(self.capacity or prompt.num_kept or 0, window), prompt.num_tokens) for prompt in batch.prompts
        ]
        # pooled neighbours tie: of these the first ones, so that pseudo tokens do not depend on how a sort is done
        chosen = scores.argsort(dim=3, descending=True, stable=True)[..., : max(capacities)]
        capacity = to_device(np.array(capacities), scores.device)[:, None, None, None]
        return chosen.masked_fill(place[: max(capacities)] >= capacity, -1)

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        query = batch.query[:, :, max(batch.query.shape[2] - self.window, 0) :]
        last_seen = batch.kv_lens[..., None] + torch.arange(-query.shape[2], 0, device=query.device)
        if batch.pseudo_query is not None and batch.num_pseudo is not None:
            num_pseudo = batch.num_pseudo[:, None, None, None]
            if self.misplaced_mask:
                last_seen = last_seen - num_pseudo
            # as many for all, so that a score does not depend on how many others have
            padding = self.num_lookahead - batch.pseudo_query.shape[2]
            query = torch.cat([query, F.pad(batch.pseudo_query, (0, 0, 0, 0, 0, padding))], dim=2)
            last_seen = torch.cat([last_seen, self._seen_by_pseudo(batch.kv_lens[..., None], num_pseudo)], dim=3)
        return self.rank(replace(batch, query=query), last_seen, self.window)

    def _seen_by_pseudo(self, kv_lens: torch.Tensor, num_pseudo: torch.Tensor) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, num_lookahead], the last token of the prompt that each sees."""
        place = torch.arange(self.num_lookahead, device=kv_lens.device)
        seen = kv_lens - num_pseudo + place if self.misplaced_mask else kv_lens - torch.ones_like(place)
        return seen.masked_fill(place >= num_pseudo, -1)


@POLICIES.register("laq++")
@dataclass(frozen=True)
class LookaheadQCachePlus(LookaheadQCache):
    """``LookaheadQCache`` with the last 8 queries of the prompt beside those of the pseudo tokens.

    Options: see ``LookaheadQCache``.
    """

    window: int = 8
    name: ClassVar[str] = "laq++"
