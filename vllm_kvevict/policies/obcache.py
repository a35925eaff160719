"""OBCache: keep the tokens whose loss would change the attention outputs most, by Optimal Brain Damage."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vllm_kvevict.policies.attention import AttentionTile, attention_tiles
from vllm_kvevict.policies.base import POLICIES, Need
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.window import ObservationWindow


@dataclass(frozen=True)
class OBCache(BatchPolicy, ObservationWindow):
    """Score a token by how much the attention outputs of the last ``window`` queries change without it.

    Paper: Gu et al. 2025 (OBCache), arXiv:2510.07651, hosted by SnapKV. A token loses its value, its key or both by
    setting them to zero, and the squared change of the outputs is summed over the queries. With A the attention, Z the
    scaled logits, v the value of a token and o the output of a query, before the output projection, the change is

        obcache_v      A v                 exact
        obcache_k      A Z (v - o)         to first order; depends on constants in Z, unlike the attention
        obcache_joint  A v + A Z (v - o)   to first order

    Departs from the paper's experiments, which keep a cache per query head and reduce nothing: its appendix does.

    window, pool_kernel: see ``ObservationWindow``
    pool:        how neighbours share their score: "max" or "avg" (zero padding counts at the edges)
    group:       query heads of one KV head: "sum" (the paper's appendix), "mean" or "max" of their scores; "pre" scores
                 the means of their A, Z and o instead, as the authors' code does by default. The mean of o is what the
                 mean of A gives, but the mean of Z is not what gives the mean of A

    Raises ValueError for another value.
    """

    window: int = 16
    pool: Literal["max", "avg"] = "max"
    group: Literal["sum", "mean", "max", "pre"] = "sum"
    paper: ClassVar[str] = "OBCache, arXiv:2510.07651"

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        scores, (num_queries, num_heads, head_size) = batch.new_scores(), batch.query.shape[2:]
        kv_lens = batch.kv_lens.flatten()
        # attention, logits and four steps from them to a change; the values, and what they are made of or squared
        num_bytes = 24 * num_queries * num_heads // batch.kv_lens.shape[2] + 8 * head_size
        for heads in batch.head_tiles(num_bytes):
            for tile in attention_tiles(batch, heads):
                scores[heads, tile.start : tile.end] = self._judge(tile, batch, heads)
            self.pool_scores(scores[heads], kv_lens[heads], num_queries, self.pool)
        scores = scores.view(batch.shape)
        return batch.fill_last(scores)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 5 * num_kv_heads + 8  # the scores, and which tokens are not judged; all else is a tile

    def _judge(self, tile: AttentionTile, batch: ScoreBatch, heads: slice) -> torch.Tensor:
        """Return [num_heads, num_tokens] scores of the tile's tokens; anything where a query does not see one."""
        attention, logits = self._grouped(tile.probabilities, 2), self._grouped(tile.logits, 2)
        values = batch.gather_values(heads, tile.start, tile.end)
        changes = self.squared_change(attention, logits, values, batch, heads)
        if self.group == "max":
            return changes.sum(dim=3).amax(dim=2)
        summed = changes.sum(dim=(2, 3))
        return summed.div_(changes.shape[2]) if self.group == "mean" else summed

    def _grouped(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """Return ``part``, averaged over the group, which is its dimension ``dim``, where that comes first."""
        return part.mean(dim=dim, keepdim=True) if self.group == "pre" else part

    def output(self, batch: ScoreBatch, heads: slice) -> torch.Tensor:
        """Return [num_heads, group or 1, num_queries, head_size] float32, the outputs of the queries.

        Raises ValueError if the engine gathered none.
        """
        if batch.grouped_output is None:
            raise ValueError(f"{self.name}: expected the attention outputs of the last queries, got none")
        # in one layout: a mean rounds by it
        return self._grouped(batch.grouped_output[heads].contiguous(), 1)

    @abstractmethod
    def squared_change(
        self, attention: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, batch: ScoreBatch, heads: slice
    ) -> torch.Tensor:
        """Return [num_heads, num_tokens, group or 1, num_queries], what each token does to each query's output.

        attention, logits: likewise, float32; infinite where a query does not see a token
        values:            [num_heads, num_tokens, head_size] float32
        """


@POLICIES.register("obcache_v")
@dataclass(frozen=True)
class OBCacheValue(OBCache):
    """Score a token by the squared change of the last queries' outputs if its value were zero. See ``OBCache``."""

    name: ClassVar[str] = "obcache_v"

    def squared_change(
        self, attention: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, batch: ScoreBatch, heads: slice
    ) -> torch.Tensor:
        return attention.square() * _squared_norm(values)


@POLICIES.register("obcache_k")
@dataclass(frozen=True)
class OBCacheKey(OBCache):
    """Score a token by the squared change of the last queries' outputs if its key were zero. See ``OBCache``."""

    name: ClassVar[str] = "obcache_k"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.OUTPUTS})

    def squared_change(
        self, attention: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, batch: ScoreBatch, heads: slice
    ) -> torch.Tensor:
        output = self.output(batch, heads)
        distance = _squared_distance(_squared_norm(values), output, _products(values, output))
        # where one token has all the attention v is close to o
        return (attention * logits).square() * distance.clamp_(min=0)


@POLICIES.register("obcache_joint")
@dataclass(frozen=True)
class OBCacheJoint(OBCacheKey):
    """Score a token by the squared change of the last queries' outputs if key and value were zero. See ``OBCache``."""

    name: ClassVar[str] = "obcache_joint"

    def squared_change(
        self, attention: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, batch: ScoreBatch, heads: slice
    ) -> torch.Tensor:
        output, norm = self.output(batch, heads), _squared_norm(values)
        product = _products(values, output)
        # |v + Z (v - o)|^2 = |v|^2 + Z (Z |v - o|^2 + 2 v (v - o)); rounding may take it below 0
        slope = (logits * _squared_distance(norm, output, product)).add_(norm - product, alpha=2)
        return attention.square() * slope.mul_(logits).add_(norm).clamp_(min=0)


def _squared_norm(values: torch.Tensor) -> torch.Tensor:
    """Return [num_heads, num_tokens, 1, 1]."""
    return values.square().sum(dim=-1)[:, :, None, None]


def _products(values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return v o [num_heads, num_tokens, group or 1, num_queries]."""
    products: torch.Tensor = (values @ output.flatten(1, 2).transpose(1, 2)).unflatten(2, output.shape[1:3])
    return products


def _squared_distance(norm: torch.Tensor, output: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """Return |v - o|^2 [num_heads, num_tokens, group or 1, num_queries] from |v|^2 and v o.

    Rounding may take it below 0.
    """
    return (norm + output.square().sum(dim=-1)[:, None]).sub_(product, alpha=2)
