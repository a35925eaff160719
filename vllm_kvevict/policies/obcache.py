"""OBCache: keep the tokens whose loss would change the attention outputs most, by Optimal Brain Damage."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vllm_kvevict.policies.attention import AttentionTile, attention_tiles
from vllm_kvevict.policies.base import POLICIES, Need, ScoreInputs
from vllm_kvevict.policies.window import ObservationWindow


@dataclass(frozen=True)
class OBCache(ObservationWindow):
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

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        window, num_kv_heads = len(inputs.query), inputs.num_kv_heads
        before = inputs.kv_len - window
        if before <= 0:  # every token observes: none is to be judged
            return inputs.query.new_zeros(num_kv_heads, inputs.kv_len, dtype=torch.float32)
        scores = inputs.new_scores()
        judged = scores[:, :before]
        for tile in attention_tiles(inputs):
            # the window's own columns are cut off before pooling, so that they lend nothing to their neighbours; they
            # alone have masked logits, which are infinite
            end = min(tile.end, before)
            if tile.start < end:
                judged[:, tile.start : end] = self._judge(tile, end, inputs)
        self.pool_scores(judged, self.pool)
        scores[:, before:] = judged.amax()
        return scores

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 4 * num_kv_heads  # the scores; all else is a tile

    def _judge(self, tile: AttentionTile, end: int, inputs: ScoreInputs) -> torch.Tensor:
        """Return [num_kv_heads, end - start] scores of the tile's tokens before ``end``."""
        attention, logits = (self._grouped(part[..., : end - tile.start]) for part in (tile.probabilities, tile.logits))
        values = inputs.gather_values(tile.start, end)[:, None]
        changes = self.squared_change(attention, logits, values, inputs).sum(dim=2)
        if self.group == "max":
            return changes.amax(dim=1)
        return changes.mean(dim=1) if self.group == "mean" else changes.sum(dim=1)

    def _grouped(self, part: torch.Tensor) -> torch.Tensor:
        """Return ``part`` [num_kv_heads, group, ...], averaged over the group where that comes first."""
        return part.mean(dim=1, keepdim=True) if self.group == "pre" else part

    def output(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return [num_kv_heads, group or 1, num_queries, head_size] float32, the outputs of the queries.

        Raises ValueError if the engine gathered none.
        """
        if inputs.output is None:
            raise ValueError(f"{self.name}: expected the attention outputs of the last queries, got none")
        return self._grouped(inputs.output.float().transpose(0, 1).unflatten(0, (inputs.num_kv_heads, -1)))

    @abstractmethod
    def squared_change(
        self, attention: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, inputs: ScoreInputs
    ) -> torch.Tensor:
        """Return [num_kv_heads, group or 1, num_queries, num_tokens], what each token does to each query's output.

        attention, logits: likewise, float32, all finite
        values:            [num_kv_heads, 1, num_tokens, head_size] float32
        """


@POLICIES.register("obcache_v")
@dataclass(frozen=True)
class OBCacheValue(OBCache):
    """Score a token by the squared change of the last queries' outputs if its value were zero. See ``OBCache``."""

    name: ClassVar[str] = "obcache_v"

    def squared_change(
        self, attention: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, inputs: ScoreInputs
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
        self, attention: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, inputs: ScoreInputs
    ) -> torch.Tensor:
        output = self.output(inputs)
        distance = _squared_distance(values, output, output @ values.transpose(2, 3))
        return (attention * logits).square() * distance


@POLICIES.register("obcache_joint")
@dataclass(frozen=True)
class OBCacheJoint(OBCacheKey):
    """Score a token by the squared change of the last queries' outputs if key and value were zero. See ``OBCache``."""

    name: ClassVar[str] = "obcache_joint"

    def squared_change(
        self, attention: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, inputs: ScoreInputs
    ) -> torch.Tensor:
        output, norm = self.output(inputs), _squared_norm(values)
        product = output @ values.transpose(2, 3)
        # |v + Z (v - o)|^2; rounding may take it below 0
        change = norm + logits.square() * _squared_distance(values, output, product) + 2 * logits * (norm - product)
        return attention.square() * change.clamp(min=0)


def _squared_norm(values: torch.Tensor) -> torch.Tensor:
    """Return [num_kv_heads, 1, 1, num_tokens]."""
    return values.square().sum(dim=-1)[:, :, None]


def _squared_distance(values: torch.Tensor, output: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """Return |v - o|^2 [num_kv_heads, group or 1, num_queries, num_tokens] from the products v o."""
    distance = _squared_norm(values) + output.square().sum(dim=-1, keepdim=True) - 2 * product
    return distance.clamp(min=0)  # v is close to o where one token has all the attention
