"""MorphKV: keep the tokens that the last tokens of the answer agree on, within a constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from vllm_kvevict.kernels.slot_scores import Group
from vllm_kvevict.policies.attention import attention_tiles
from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, ScoreInputs, StepInputs
from vllm_kvevict.policies.options import at_least

# Scores of slots by single queries that are held at once while a step is scored.
_MAX_SCORES = 1 << 22


@POLICIES.register("morphkv")
@dataclass(frozen=True)
class MorphKV(EvictionPolicy):
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

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        num_older = inputs.kv_len - len(inputs.query)
        scores = inputs.query.new_zeros(inputs.num_kv_heads, inputs.kv_len, dtype=torch.float32)
        if num_older <= 0:  # every token observes: none is to be judged
            return scores
        query = inputs.grouped_query
        if self.variant == "logits":
            query = query.sum(dim=1, keepdim=True)
        for tile in attention_tiles(inputs, query, num_older if self.denominator == "older" else None):
            end = min(tile.end, num_older)
            if tile.start < end:
                scores[:, tile.start : end] = self._fused(tile.probabilities[..., : end - tile.start])
        scores[:, num_older:] = scores.amax()
        return scores

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

    def _fused(self, attention: torch.Tensor) -> torch.Tensor:
        """Return [num_kv_heads or 1, num_tokens] from [num_kv_heads, group or 1, num_queries, num_tokens]."""
        if self.group == "max":
            of_heads = attention.amax(dim=1)
        else:
            of_heads = attention.mean(dim=1) if self.group == "mean" else attention.mean(dim=(0, 1))[None]
        return of_heads.sum(dim=1) if self.fusion == "sum" else of_heads.amax(dim=1)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile
