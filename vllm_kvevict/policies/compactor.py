"""Compactor: keep the keys that stand out from the others, and those that their surroundings attend to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch

from vllm_kvevict.cache.ragged import in_own_memory, padded, taken_apart
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.kernels.chunk_attention import chunk_attention
from vllm_kvevict.kernels.leverage import block_bytes, leverage
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.base import POLICIES, Need
from vllm_kvevict.policies.batch import Prompt, ScoreBatch
from vllm_kvevict.policies.batch_policy import BatchPolicy
from vllm_kvevict.policies.options import ODD, at_least
from vllm_kvevict.policies.prompt_chunks import PromptChunks
from vllm_kvevict.policies.stretches import STRETCH, in_whole_stretches
from vllm_kvevict.policies.window import pool_in_place

_TILE = 1024  # tokens
_NO_BUDGET_WEIGHT = 0.35  # kvpress's weight where it knows no compression ratio


@dataclass(frozen=True)
class _Observed:
    """What is left of the chunks of a prompt.

    queries:   [num_pending, num_heads, head_size], a copy: the queries of the attention chunk that is not complete
    attention: what the tokens of complete chunks received: [num_kv_heads, num_tokens] float32 each, in order
    """

    queries: torch.Tensor
    attention: tuple[torch.Tensor, ...]


@POLICIES.register("compactor")
@dataclass(frozen=True)
class Compactor(BatchPolicy):
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

    Departures: keys are un-rotated from the cache, so they carry its rounding. Beside the ridge 1e-12 of the trace is
    added, so that there is always an inverse: no retries with a larger ridge. The last chunk attends to
    itself only, whatever its length; both implementations let its padding draw or give attention. A last leverage
    block shorter than half a block joins the one before it. One sketch serves all layers, heads and requests, as in
    the engine; kvpress draws anew each time. The allocator is "adakv", since the experiments rank heads jointly; its
    ``alpha`` of 0.2 is a floor that the paper does not have (``allocator_options: {"alpha": 0}``). The attention inside
    a chunk is not the model's own, and knows neither its sinks nor its soft-capping.

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

    @property
    def layers_at_once(self) -> int:
        return 1  # what was observed of a layer is large

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # the leverage, of which blocks have room for half as much again, the attention, and which are judged
        held = 4 * num_kv_heads * (2 if self.leverage_block is None else 4)
        return held + 4 * num_kv_heads * self.exclude_protected + 9

    def state_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # the attention of complete chunks; the queries of the incomplete one do not grow with the prompt
        return 4 * num_kv_heads

    def observed_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        # the queries that wait, of at most four bytes a number
        return 4 * (self.chunk + self._num_excluded[1]) * num_heads * head_size

    def observe_chunks(self, states: Sequence[_Observed | None], chunks: PromptChunks) -> list[_Observed]:
        """Score the attention chunks that are complete; keep a copy of the queries of those that are not."""
        num_sink, num_recent = self._num_excluded
        earlier = [state or _Observed(chunks.query[:0], ()) for state in states]
        new = [
            queries[max(num_sink - kv_len + len(queries), 0) :]
            for queries, kv_len in zip(chunks.query.split([*chunks.num_queries]), chunks.kv_lens, strict=True)
        ]
        parts = [part for state, queries in zip(earlier, new, strict=True) for part in (state.queries, queries)]
        num_queries = [len(state.queries) + len(queries) for state, queries in zip(earlier, new, strict=True)]
        together = replace(chunks, query=torch.cat(parts), num_queries=num_queries)
        # tokens that turn out to be the prompt's last ones may have no part in it
        num_complete = [max(count - num_recent, 0) // self.chunk * self.chunk for count in num_queries]
        lens = [part for count, all_ in zip(num_complete, num_queries, strict=True) for part in (count, all_ - count)]
        received = taken_apart(self._attention(together, num_complete), lens)[::2]
        pending = [
            queries[count:] for queries, count in zip(together.query.split(num_queries), num_complete, strict=True)
        ]
        return [
            _Observed(queries, (*state.attention, of_prompt) if of_prompt.shape[1] else state.attention)
            for state, queries, of_prompt in zip(earlier, in_own_memory(pending), received, strict=True)
        ]

    def score_batch(self, batch: ScoreBatch) -> torch.Tensor:
        first, num_recent = self._num_excluded
        prompts = [prompt for prompt in batch.prompts for _ in batch.layers]
        num_judged = [max(prompt.num_tokens - first - num_recent, 0) for prompt in prompts]
        lens = to_device(np.array(num_judged, dtype=np.int64), batch.kv_lens.device)
        judged = self._leverage(batch, num_judged, lens)  # [num_prompts, num_kv_heads, width]
        judged *= self._weight(prompts, judged.device)
        judged += self._chunk_attention(batch, num_judged, lens, judged.shape[2])
        is_judged = torch.arange(judged.shape[2], device=judged.device) < lens[:, None, None]
        highest = judged.masked_fill(~is_judged, float("-inf")).amax(dim=(1, 2), keepdim=True)
        highest.masked_fill_(lens[:, None, None] == 0, 0.0)
        if not self.exclude_protected:
            return judged[..., : batch.max_kv_len].view(batch.shape)
        scores = batch.new_scores().view(len(prompts), -1, batch.max_kv_len)
        scores.copy_(highest)
        room = scores[..., first : first + judged.shape[2]]
        room.copy_(torch.where(is_judged, judged, highest)[..., : room.shape[2]])
        return scores.view(batch.shape)

    @property
    def _num_excluded(self) -> tuple[int, int]:
        return (self.num_sink, self.num_recent) if self.exclude_protected else (0, 0)

    def _weight(self, prompts: Sequence[Prompt], device: torch.device) -> torch.Tensor | float:
        """Return the weight of the leverage, of each prompt [num_prompts, 1, 1] if they differ."""
        if self.leverage_weight is not None:
            return self.leverage_weight
        weights = [
            _NO_BUDGET_WEIGHT if prompt.num_kept is None else 1 - prompt.num_kept / prompt.num_tokens
            for prompt in prompts
        ]
        return to_device(np.array(weights, dtype=np.float32), device)[:, None, None]

    def _chunk_attention(
        self, batch: ScoreBatch, num_judged: Sequence[int], lens: torch.Tensor, width: int
    ) -> torch.Tensor:
        """Return [num_prompts, num_kv_heads, width], z-scores of the attention that the judged tokens received."""
        observed: Sequence[_Observed] = batch.observed
        complete = [sum(part.shape[1] for part in of_prompt.attention) for of_prompt in observed]
        num_left = [judged - count for judged, count in zip(num_judged, complete, strict=True)]
        queries = [of_prompt.queries for of_prompt in observed]
        chunks = PromptChunks(
            torch.cat(queries),
            [*map(len, queries)],
            [prompt.num_tokens for prompt in batch.prompts for _ in batch.layers],
            batch.keys,
            batch.read_values,
            batch.page_table.flatten(0, 1),
            batch.scale / batch.key_scale,
            batch.key_scale,
            batch.value_scale,
        )
        received = self._attention(chunks, num_left).split(chunks.num_queries, dim=1)
        parts, room = [], []
        for of_prompt, left, count, num in zip(observed, received, complete, num_left, strict=True):
            parts += [*of_prompt.attention, left[:, :num]]
            room += [*(part.shape[1] for part in of_prompt.attention), width - count]
        attention = padded(parts, room, dim=1).view(-1, width)
        pool_in_place(attention, "avg", self.pool_kernel)
        by_prompt: torch.Tensor = attention.view(-1, len(observed), width).transpose(0, 1)
        standardise(by_prompt, lens, self.z_scope == "head")
        return by_prompt

    def _attention(self, chunks: PromptChunks, num_tokens: Sequence[int]) -> torch.Tensor:
        """Return [num_kv_heads, num_queries] float32: what tokens receive from the others of their attention chunk.

        num_tokens: of each prompt, how many of the queries are looked at, from the first one; anything is returned for
                    the others
        """
        found = [
            (row, kv_len - count + start, first + start, min(self.chunk, most - start))
            for row, (first, count, kv_len, most) in enumerate(
                zip(chunks.first_queries[:-1], chunks.num_queries, chunks.kv_lens, num_tokens, strict=True)
            )
            for start in range(0, most, self.chunk)
        ]
        if not found:
            return chunks.query.new_empty(chunks.num_kv_heads, len(chunks.query), dtype=torch.float32)
        scale = chunks.key_scale * (chunks.scale if self.scale_logits else 1.0)
        longest = max(count for *_, count in found)
        query, keys, page_table = chunks.query, chunks.keys, chunks.page_table
        received = chunk_attention(query, keys, page_table, chunks.on_device(found), longest, scale, self.group)
        return received.mul_(_value_norms(chunks)) if self.value_norm else received

    def _leverage(self, batch: ScoreBatch, num_judged: Sequence[int], lens: torch.Tensor) -> torch.Tensor:
        """Return [num_prompts, num_kv_heads, width], z-scores of the leverage of the judged keys in their blocks."""
        if batch.rotary is None:
            raise ValueError("compactor: expected the rotary embedding among the weights, got none")
        first, by_head = self._num_excluded[0], self.z_scope == "head"
        # of a prompt without any that is judged its first token, for nothing
        blocks = [
            [(row, *bounds) for bounds in self._blocks(first, first + count)] if count else [(row, 0, 1)]
            for row, count in enumerate(num_judged)
        ]
        leverages, block_lens = self._leverage_of_blocks(batch, batch.rotary, [*chain(*blocks)])
        if self.z_scope == "block":
            standardise(leverages, block_lens, by_head)
        if self.leverage_block is not None:
            leverages = self._in_prompts(leverages, [*map(len, blocks)], in_whole_stretches(max(*num_judged, 1)))
        if self.z_scope != "block":
            standardise(leverages, lens, by_head)
        return leverages

    def _leverage_of_blocks(
        self, batch: ScoreBatch, rotary: Rotary, blocks: list[tuple[int, int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [num_blocks, num_kv_heads, width] float32, and [num_blocks] int64, how many tokens each block has.

        blocks: of each its prompt, its first token, and past its last
        """
        num_kv_heads, head_size, device = batch.kv_lens.shape[2], batch.keys.shape[2], batch.keys.device
        bounds = to_device(np.array(blocks, dtype=np.int64), device)
        sketch = to_device(gaussian_sketch(head_size, self.sketch_rank, self.seed).numpy(), device)
        width = in_whole_stretches(max(end - start for _, start, end in blocks))
        rows, rest = batch.page_table.flatten(0, 1), (rotary, sketch, self.ridge, batch.key_scale)
        tiles = scratch.tiles([block_bytes(num_kv_heads, head_size, self.sketch_rank, width)] * len(blocks))
        leverages = [leverage(batch.keys, rows, bounds[start:end], width, *rest) for start, end in tiles]
        return torch.cat(leverages) if len(leverages) > 1 else leverages[0], bounds[:, 2] - bounds[:, 1]

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield bounds of the leverage blocks; the last one has at least half their size, if there are two."""
        size = self.leverage_block or last - first
        count = max((last - first + size // 2) // size, 1)
        for index in range(count):
            start = first + index * size
            yield start, start + size if index < count - 1 else last

    def _in_prompts(self, of_blocks: torch.Tensor, num_blocks: Sequence[int], width: int) -> torch.Tensor:
        """Return [num_prompts, num_kv_heads, width] of [num_blocks, num_kv_heads, *], the blocks of each in a row.

        num_blocks: of each prompt
        """
        device, size = of_blocks.device, self.leverage_block or width
        facts = to_device(np.array([num_blocks, [0, *accumulate(num_blocks)][:-1]], dtype=np.int64), device)
        count, first = facts[:, :, None, None].unbind()
        token = torch.arange(width, device=device)
        block = torch.minimum(token // size, count - 1)
        place = (token - block * size).clamp(max=of_blocks.shape[2] - 1)
        head = torch.arange(of_blocks.shape[1], device=device)[:, None]
        found: torch.Tensor = of_blocks[first + block, head, place]
        return found


def _value_norms(chunks: PromptChunks) -> torch.Tensor:
    """Return [num_kv_heads, num_queries] float32, the l2 norm of the value of each query's token."""
    prompts, lens = np.arange(len(chunks.kv_lens)), [*chunks.num_queries]
    tokens = [np.arange(kv_len - count, kv_len) for kv_len, count in zip(chunks.kv_lens, lens, strict=True)]
    index = to_device(np.stack([np.repeat(prompts, lens), np.concatenate(tokens)]), chunks.query.device)
    values, block_size = chunks.read_values(), chunks.keys.shape[1]
    norms = []
    for prompt, token in (tile.unbind() for tile in index.split(_TILE, dim=1)):
        pages = chunks.page_table[prompt, :, token // block_size]
        norms.append(values[pages, (token % block_size)[:, None]].float().norm(dim=-1))
    return torch.cat(norms).mul_(chunks.value_scale).t()


def standardise(scores: torch.Tensor, lens: torch.Tensor, by_head: bool) -> None:
    """In place: shift and scale the scores of each prompt, or of each of its heads, to mean 0 and variance 1.

    Differences below 1e-4 of the mean are rounding and are not blown up, as those of a few tokens would be, whose
    leverage is the same.

    scores: [num_prompts, num_kv_heads, width], the width in whole stretches; anything behind a prompt's tokens
    lens:   [num_prompts] int64, tokens of each
    """
    is_behind = torch.arange(scores.shape[2], device=scores.device) >= lens[:, None, None]
    count = lens[:, None, None] * (1 if by_head else scores.shape[1])
    mean = _total(scores.masked_fill_(is_behind, 0.0), by_head) / count.clamp(min=1)
    scores -= mean
    squares = _total(scores.masked_fill_(is_behind, 0.0), by_head, squared=True)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    scores /= torch.maximum(deviation, 1e-4 * mean.abs()).clamp(min=1e-12)


def _total(scores: torch.Tensor, by_head: bool, squared: bool = False) -> torch.Tensor:
    """Return [num_prompts, 1 or num_kv_heads, 1] float64: stretch by stretch, so that 0 behind changes no bit."""
    stretches = scores.unflatten(2, (-1, STRETCH))
    of_stretches = (
        torch.linalg.vector_norm(stretches, dim=3).double().square() if squared else stretches.sum(dim=3).double()
    )
    total: torch.Tensor = of_stretches.cumsum(dim=2)[..., -1:]
    return total if by_head else total.sum(dim=1, keepdim=True)


@lru_cache(maxsize=16)
def gaussian_sketch(head_size: int, rank: int, seed: int) -> torch.Tensor:
    """Return [head_size, rank] float64, independent entries of variance 1 / rank, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(head_size, rank, generator=generator, dtype=torch.float64) / math.sqrt(rank)
