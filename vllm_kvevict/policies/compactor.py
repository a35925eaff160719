"""Compactor: keep the keys that stand out from the others, and those that their surroundings attend to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch

from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.kernels.chunk_attention import chunk_attention
from vllm_kvevict.kernels.leverage import leverage
from vllm_kvevict.policies.base import POLICIES, EvictionPolicy, Need
from vllm_kvevict.policies.inputs import ScoreInputs
from vllm_kvevict.policies.options import ODD, at_least
from vllm_kvevict.policies.window import pool_in_place

_NO_BUDGET_WEIGHT = 0.35  # kvpress's weight where it knows no compression ratio


@dataclass(frozen=True)
class _Observed:
    """What is left of the chunks of a prompt.

    queries:   [num_pending, num_heads, head_size], a copy: the queries of the attention chunk that is not complete
    attention: of each complete chunk, in order, what its tokens received: [num_kv_heads, chunk] float32
    """

    queries: torch.Tensor
    attention: list[torch.Tensor]


@POLICIES.register("compactor")
@dataclass(frozen=True)
class Compactor(EvictionPolicy):
    """Score a token by z(attention it receives inside its chunk, uncausal) + weight * z(leverage of its pre-RoPE key).

    Paper: Chari and Van Durme 2025, arXiv:2507.08143. The leverage of a key is x^T (X^T X + ridge I)^-1 x, where the
    rows of X are the head's keys times one Gaussian matrix [head_size, sketch_rank], centred over a block of tokens.

    The paper, the authors' engine (compactor-vllm) and kvpress differ. The defaults are the paper's as far as we know
    it, and the engine's where we do not (protection, no value norm, unscaled logits). The other two by options:

    | option            | default | engine  | kvpress |
    |-------------------|---------|---------|---------|
    | leverage_weight   | 0.3     | 0.5     | null    |
    | chunk             | 256     | 128     | 256     |
    | leverage_block    | null    | 512     | null    |
    | ridge             | 0.0     | 0.005   | 0.01    |
    | z_scope           | "layer" | "block" | "layer" |
    | value_norm        | false   | false   | true    |
    | pool_kernel       | 3       | 1       | 3       |
    | num_sink          | 16      | 16      | 8       |
    | num_recent        | 64      | 64      | 4       |
    | exclude_protected | false   | false   | true    |

    Departures: keys are un-rotated from the cache, so they carry its rounding. The inverse comes from eigenvalues, of
    which those below 1e-12 of the largest count as zero: no retries with a larger ridge. The last chunk attends to
    itself only, whatever its length; both implementations let its padding draw or give attention. A last leverage
    block shorter than half a block joins the one before it. One sketch serves all layers, heads and requests, as in
    the engine; kvpress draws anew each time. The allocator is "adakv", since the experiments rank heads jointly; its
    ``alpha`` of 0.2 is a floor that the paper does not have (``allocator_options: {"alpha": 0}``).

    leverage_weight:   weight of the leverage, >= 0; None: the fraction of the prompt that goes
    sketch_rank:       columns of the sketch, >= 1
    chunk:             tokens that attend to each other, >= 1
    leverage_block:    tokens whose keys are compared with each other, >= 2; None: the whole prompt
    ridge:             added to the eigenvalues of X^T X, >= 0
    z_scope:           what z standardises over: "layer": all heads and tokens; "block": the same, the leverage inside
                       its block; "head": the tokens of a head
    scale_logits:      whether the attention has its 1 / sqrt(head_size); public code leaves it out
    value_norm:        whether attention is multiplied by the l2 norm of the value
    pool_kernel:       width in tokens of the mean over neighbours of the attention, odd, >= 1; zeros past the edges
    group:             reduction over the query heads of one KV head: "mean" or "max"; a sum would be the same as "mean"
    num_sink:          tokens at the start that are protected, >= 0
    num_recent:        tokens at the end that are protected, >= 0
    exclude_protected: whether these take no part in chunks, leverage and z either
    seed:              of the sketch

    Raises ValueError for a value outside those ranges.
    """

    leverage_weight: Annotated[float, at_least(0)] | None = 0.3
    sketch_rank: Annotated[int, at_least(1)] = 48
    chunk: Annotated[int, at_least(1)] = 256
    leverage_block: Annotated[int, at_least(2)] | None = None
    ridge: Annotated[float, at_least(0)] = 0.0
    z_scope: Literal["layer", "block", "head"] = "layer"
    scale_logits: bool = False
    value_norm: bool = False
    pool_kernel: Annotated[int, ODD, at_least(1)] = 3
    group: Literal["mean", "max"] = "mean"
    num_sink: Annotated[int, at_least(0)] = 16
    num_recent: Annotated[int, at_least(0)] = 64
    exclude_protected: bool = False
    seed: Annotated[int, at_least(0)] = 0
    name: ClassVar[str] = "compactor"
    paper: ClassVar[str] = "Compactor, arXiv:2507.08143"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ALL_QUERIES, Need.ROTARY})

    @property
    def default_allocator(self) -> str:
        return "adakv"

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 8 * num_kv_heads  # the scores, and the leverage or the attention that go into them

    def state_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # the attention of complete chunks; the queries of the incomplete one do not grow with the prompt
        return 4 * num_kv_heads

    def observe(self, state: _Observed | None, inputs: ScoreInputs) -> _Observed:
        """Score the attention chunks that are complete; keep a copy of the queries of the one that is not."""
        earlier = state or _Observed(inputs.query[:0], [])
        start = inputs.kv_len - len(inputs.query)
        skipped = max(self._num_excluded[0] - start, 0)
        queries = torch.cat([earlier.queries, inputs.query[skipped:]])
        # tokens that turn out to be the prompt's last ones may have no part in it
        num_chunks = max(len(queries) - self._num_excluded[1], 0) // self.chunk
        for rows in queries[: num_chunks * self.chunk].split(self.chunk):
            if len(rows):
                earlier.attention.append(self._attention(rows, inputs, inputs.kv_len - len(queries)))
                queries = queries[self.chunk :]
        return _Observed(queries.clone(), earlier.attention)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        first = min(self._num_excluded[0], inputs.kv_len)
        last = max(inputs.kv_len - self._num_excluded[1], first)
        if first == last:
            return inputs.query.new_zeros(inputs.num_kv_heads, inputs.kv_len, dtype=torch.float32)
        scores = inputs.new_scores()
        judged = scores[:, first:last]
        for start, end in self._blocks(first, last):
            scores[:, start:end] = self._leverage(inputs, start, end)
        blocks = list(self._blocks(0, last - first))
        self._standardise(judged, blocks if self.z_scope == "block" else [(0, last - first)])
        judged *= self._weight(inputs)
        judged += self._chunk_attention(inputs, last)
        scores[:, :first] = scores[:, last:] = judged.amax()
        return scores

    @property
    def _num_excluded(self) -> tuple[int, int]:
        return (self.num_sink, self.num_recent) if self.exclude_protected else (0, 0)

    def _weight(self, inputs: ScoreInputs) -> float:
        if self.leverage_weight is not None:
            return self.leverage_weight
        return _NO_BUDGET_WEIGHT if inputs.num_kept is None else 1 - inputs.num_kept / inputs.kv_len

    def _chunk_attention(self, inputs: ScoreInputs, last: int) -> torch.Tensor:
        """Return [num_kv_heads, num_tokens] z-scores of the attention that tokens before ``last`` received."""
        observed: _Observed = inputs.state
        received = list(observed.attention)
        start = inputs.kv_len - len(observed.queries)
        if start < last:
            received.append(self._attention(observed.queries[: last - start], inputs, start))
        attention = torch.cat(received, dim=1)
        pool_in_place(attention, "avg", self.pool_kernel)
        self._standardise(attention, [(0, attention.shape[1])])
        return attention

    def _attention(self, queries: torch.Tensor, inputs: ScoreInputs, start: int) -> torch.Tensor:
        """Return [num_kv_heads, len(queries)], what tokens from ``start`` on receive from each other."""
        scale = inputs.weights.key_scale * (inputs.scale if self.scale_logits else 1.0)
        reduced = chunk_attention(queries, inputs.keys, inputs.page_table, start, scale, self.group)
        if self.value_norm:
            reduced *= inputs.gather_values(start, start + len(queries)).norm(dim=-1)
        return reduced

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield bounds of the leverage blocks; the last one has at least half their size, if there are two."""
        size = self.leverage_block or last - first
        count = max((last - first + size // 2) // size, 1)
        for index in range(count):
            start = first + index * size
            yield start, start + size if index < count - 1 else last

    def _leverage(self, inputs: ScoreInputs, start: int, end: int) -> torch.Tensor:
        """Return [num_kv_heads, end - start] float32, the leverage of the keys inside a block of them."""
        rotary = inputs.weights.rotary
        if rotary is None:
            raise ValueError("compactor: expected the rotary embedding among the weights, got none")
        drawn = gaussian_sketch(inputs.keys.shape[2], self.sketch_rank, self.seed)
        sketch = to_device(drawn.numpy(), inputs.keys.device)
        scale = inputs.weights.key_scale
        return leverage(inputs.keys, inputs.page_table, start, end, rotary, sketch, self.ridge, scale)

    def _standardise(self, scores: torch.Tensor, blocks: list[tuple[int, int]]) -> None:
        """Shift and scale ``scores`` [num_kv_heads, num_tokens] in place, per block, to mean 0 and variance 1.

        Differences below 1e-4 of the mean are rounding and are not blown up, as those of a few tokens would be, whose
        leverage is the same.
        """
        dims = (1,) if self.z_scope == "head" else (0, 1)
        for start, end in blocks:
            part = scores[:, start:end]
            count = part.shape[1] * (1 if self.z_scope == "head" else len(part))
            mean = part.mean(dim=dims, keepdim=True)
            part -= mean
            length = torch.linalg.vector_norm(part, dim=dims, keepdim=True)
            deviation = length / math.sqrt(max(count - 1, 1))
            part /= torch.maximum(deviation, 1e-4 * mean.abs()).clamp(min=1e-12)


@lru_cache(maxsize=16)
def gaussian_sketch(head_size: int, rank: int, seed: int) -> torch.Tensor:
    """Return [head_size, rank] float64, independent entries of variance 1 / rank, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(head_size, rank, generator=generator, dtype=torch.float64) / math.sqrt(rank)
