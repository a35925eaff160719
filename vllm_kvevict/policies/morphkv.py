"""MorphKV: keep the tokens that the last tokens of the answer agree on, within a constant size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from vllm_kvevict.kernels.slot_scores import Group
from vllm_kvevict.policies.base import POLICIES
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.inputs import StepInputs
from vllm_kvevict.policies.options import at_least

# Scores of slots by single queries that are held at once while a step is scored.
_MAX_SCORES = 1 << 22


@POLICIES.register("morphkv")
@dataclass(frozen=True)
class MorphKV(BatchPolicy):
    """Score an older token by the attention it gets from the last ``window`` queries, of the prompt or of the answer.

    Paper: Ghadia et al. 2025 (MorphKV), arXiv:2503.00979. Its code has two algorithms, both here. Departs from it:
    eviction takes a block of tokens at a time unless it is asked to go token by token (``--kv-evict-interval 1``); the
    newest query counts, where the code for query caches leaves it out; and heads that share a KV head decide together,
    where the code masks the output of a step per query head and prunes the cache per KV head.

    window:      last queries, whose own tokens always stay, >= 1
    fusion:      over the queries: "sum" of what they attend to, or "max"
    variant:     "probabilities": softmax per query head, then ``group``; "logits": the products of the heads that share
                 a KV head are summed before one softmax, so that only "layer" is left to reduce
    group:       reduction over the query heads of one KV head: "max" or "mean"; "layer": the mean over all heads of the
                 layer, which then keep the same tokens with the allocator ``uniform``
    denominator: tokens over which the softmax runs: the "older" ones that are judged, or "all" that a query sees

    Raises ValueError for another value.
    """

    window: Annotated[int, at_least(1)] = 32
    fusion: Literal["sum", "max"] = "sum"
    variant: Literal["probabilities", "logits"] = "probabilities"
    group: Literal["max", "mean", "layer"] = "max"
    denominator: Literal["older", "all"] = "older"
    name: ClassVar[str] = "morphkv"
    paper: ClassVar[str] = "MorphKV, arXiv:2503.00979"

    @property
    def query_window(self) -> int:
        return self.window

    @property
    def num_recent(self) -> int:
        return self.window

    @property
    def evicts_during_decode(self) -> bool:
        return True

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        query, num_queries = batch.query, batch.query.shape[2]
        if self.variant == "logits":
            query = query.float().unflatten(3, (batch.kv_lens.shape[2], -1)).sum(dim=4)
        place = torch.arange(num_queries, device=query.device)
        newest_older = batch.kv_lens[..., None] - num_queries - 1
        last_seen = newest_older + (0 * place if self.denominator == "older" else place + 1)
        scores = self._fused(batch, query, last_seen)
        # of the queries' own tokens none is judged
        scores = batch.fill_last(scores, scores.new_zeros(1, 1, 1, 1))
        return batch.fill_last(scores).expand(batch.shape)

    def _fused(self, batch: ScoreBatch, query: torch.Tensor, last_seen: torch.Tensor) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads, max_kv_len] float32, of one head if one ranking is that of all.

        The arguments are those of ``ScoreBatch.slot_scores``.
        """
        if self.group != "layer":
            return batch.slot_scores(query, last_seen, self.group, self.fusion)
        if self.fusion == "sum":  # sums may change places
            return batch.mean_over_peers(batch.slot_scores(query, last_seen, "mean", "sum"))
        at_once = max(_MAX_SCORES // math.prod(batch.shape), 1)
        parts = [
            batch.mean_over_peers(batch.slot_scores(*part, "mean", "none")).amax(dim=3)
            for part in zip(query.split(at_once, dim=2), last_seen.split(at_once, dim=3), strict=True)
        ]
        return torch.stack(parts).amax(dim=0)

    def score_step(self, inputs: StepInputs) -> torch.Tensor:
        query = inputs.query
        if self.variant == "logits":
            query = inputs.grouped_query.sum(dim=2).transpose(1, 2)
        num_queries, newest = query.shape[1], inputs.num_tokens[:, None] - 1
        place = torch.arange(num_queries, device=query.device)
        last_seen = newest - num_queries + (0 * place if self.denominator == "older" else place + 1)
        group: Group = "max" if self.group == "max" else "mean"
        if self.group != "layer":
            return inputs.slot_scores(query, last_seen, group, self.fusion)
        if self.fusion == "sum":  # sums may change places
            return inputs.sum_over_heads(inputs.slot_scores(query, last_seen, group, "sum")[:, :, None])[:, :, 0]
        at_once = max(_MAX_SCORES // inputs.positions.numel(), 1)
        parts = [
            inputs.sum_over_heads(inputs.slot_scores(*part, group, "none")).amax(dim=2)
            for part in zip(query.split(at_once, dim=1), last_seen.split(at_once, dim=1), strict=True)
        ]
        return torch.stack(parts).amax(dim=0)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 12 * num_kv_heads + 8  # which token each slot has, and the scores
