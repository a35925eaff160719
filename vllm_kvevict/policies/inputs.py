"""What a policy sees: of one layer of one request, and of several requests after a step of their decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.kernels.slot_scores import Fusion, Group, SlotBatch, slot_scores
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores
from vllm_kvevict.policies.batch import Prompt, ScoreBatch, by_kv_head, gather_tokens, sinks_for
from vllm_kvevict.policies.prompt_chunks import PromptChunks


@dataclass(frozen=True)
class LayerWeights:
    """What the model does around the attention of one layer; None where no policy needs it.

    rotary:            how queries and keys were rotated
    output_projection: [hidden_size, num_heads * head_size], W_O
    key_scale:         what the keys of an fp8 cache are to be multiplied by when they are read; 1 for other caches
    value_scale:       likewise for the values
    softcap:           logits x become softcap * tanh(x / softcap); 0: they stay
    sinks:             [num_heads] float32, the logit of a sink of each query head, which takes a part of its attention
                       and which no key has; None: there are none
    """

    rotary: Rotary | None = None
    output_projection: torch.Tensor | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def of_heads(self, kv_heads: torch.Tensor, num_kv_heads: int) -> LayerWeights:
        """Return what belongs to some of the KV heads [num_some] int64, and to the query heads that read them."""

        def chosen(of_all: torch.Tensor | None, dim: int) -> torch.Tensor | None:
            if of_all is None:
                return None
            by_head: torch.Tensor = of_all.unflatten(dim, (num_kv_heads, -1))
            return by_head.index_select(dim, kv_heads).flatten(dim, dim + 1)

        return replace(self, output_projection=chosen(self.output_projection, 1), sinks=chosen(self.sinks, 0))


def sinks_of(layers: Sequence[LayerWeights]) -> torch.Tensor | None:
    """Return [num_layers, num_heads] float32, the sinks of layers that all have some; None if they have none."""
    sinks = [weights.sinks for weights in layers if weights.sinks is not None]
    return torch.stack(sinks) if sinks else None


def projections_of(layers: Sequence[LayerWeights]) -> list[torch.Tensor]:
    """Return W_O of each layer, as far as it is known."""
    return [weights.output_projection for weights in layers if weights.output_projection is not None]


@dataclass(frozen=True)
class ScoreInputs:
    """One layer of one request, at the end of its prefill or, for ``observe``, at the end of a chunk of it. Read only.

    query:      [num_queries, num_heads, head_size] the last queries that were computed, RoPE applied. Query i belongs
                to token kv_len - num_queries + i
    keys:       [num_pages, block_size, head_size] a view of the whole page pool, RoPE applied; as stored, which for
                an fp8 cache is not what attention sees: the methods below return that
    values:     [num_pages, block_size, head_size] likewise
    page_table: [num_kv_heads, num_prompt_blocks] int64, logical page -> page id
    kv_len:     tokens in the cache, the queries' own included; slots of the last page past it hold garbage
    scale:      softmax scale
    output:     [num_queries, num_heads, head_size] what attention returned for the queries, if ``Need.OUTPUTS``
    weights:    the layer's weights, as far as needs name them
    state:      what the policy's ``observe`` returned for the last chunk, if ``Need.ALL_QUERIES``
    num_kept:   tokens that a head will keep on average; None where that is not known yet
    layer:      index of the layer
    pseudo_query: [num_pseudo_tokens or fewer, num_heads, head_size] queries of the tokens that the engine generated
                behind the prompt, which are not in the cache; None if the policy asked for none
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor
    kv_len: int
    scale: float
    output: torch.Tensor | None = None
    weights: LayerWeights = LayerWeights()
    state: Any = None
    num_kept: int | None = None
    layer: int = 0
    pseudo_query: torch.Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return len(self.page_table)

    def new_scores(self) -> torch.Tensor:
        """Return [num_kv_heads, kv_len] float32 to be filled, tile by tile."""
        return self.keys.new_empty(self.num_kv_heads, self.kv_len, dtype=torch.float32)

    def gather_keys(self, start: int, end: int) -> torch.Tensor:
        """Return [num_kv_heads, end - start, head_size] float32, the keys of tokens ``start`` to ``end``."""
        return gather_tokens(self.keys, self.page_table, self.weights.key_scale, start, min(end, self.kv_len))

    def gather_values(self, start: int, end: int) -> torch.Tensor:
        """Return [num_kv_heads, end - start, head_size] float32, the values of tokens ``start`` to ``end``."""
        return gather_tokens(self.values, self.page_table, self.weights.value_scale, start, min(end, self.kv_len))

    def window_scores(self, query: torch.Tensor, kv_len: int, reduction: Reduction) -> torch.Tensor:
        """Return [num_kv_heads, kv_len] float32, scores of the tokens by the attention that ``query`` pays to them.

        What is not scored is 0: the queries' own tokens, unless the reduction says that they count.

        query:  [num_queries, num_heads, head_size] queries of consecutive tokens, RoPE applied
        kv_len: tokens in the cache at the last of these queries
        """
        batch = WindowBatch(
            query[None],
            self.keys,
            self.values,
            self.page_table[None],
            torch.full((1,), kv_len, device=query.device),
            kv_len,
            self.scale * self.weights.key_scale,
            self.weights.value_scale,
            self.weights.softcap,
            None if self.weights.sinks is None else self.weights.sinks[None],
        )
        return window_scores(batch, reduction)[0]

    @staticmethod
    def together(layers: Sequence[ScoreInputs]) -> ScoreBatch:
        """Return a batch of some layers of one prompt, which have the same scales."""
        first = layers[0]
        kv_lens = torch.full((1, len(layers), first.num_kv_heads), first.kv_len, device=first.query.device)
        outputs = [inputs.output for inputs in layers if inputs.output is not None]
        pseudo = [inputs.pseudo_query for inputs in layers if inputs.pseudo_query is not None]
        # of a single layer not copied: it grows with the prompt
        page_table = torch.stack([inputs.page_table for inputs in layers]) if layers[1:] else first.page_table[None]
        return ScoreBatch(
            torch.stack([inputs.query for inputs in layers])[None],
            first.keys,
            lambda: first.values,
            page_table[None],
            kv_lens,
            first.kv_len,
            first.scale * first.weights.key_scale,
            first.weights.value_scale,
            alike=True,
            key_scale=first.weights.key_scale,
            layers=[inputs.layer for inputs in layers],
            num_kept=None if first.num_kept is None else kv_lens.new_full(kv_lens.shape, first.num_kept),
            output=torch.stack(outputs)[None] if outputs else None,
            projections=projections_of([inputs.weights for inputs in layers]),
            prompts=[Prompt(first.kv_len, first.num_kept)],
            observed=[inputs.state for inputs in layers],
            rotary=first.weights.rotary,
            pseudo_query=torch.stack(pseudo)[None] if pseudo else None,
            num_pseudo=kv_lens.new_full((1,), len(pseudo[0])) if pseudo else None,
            softcap=first.weights.softcap,
            sinks=sinks_of([inputs.weights for inputs in layers]),
        )

    @property
    def chunk(self) -> PromptChunks:
        """A chunk of one prompt, whose queries these are."""
        return PromptChunks(
            self.query,
            [len(self.query)],
            [self.kv_len],
            self.keys,
            lambda: self.values,
            self.page_table[None],
            self.scale,
            self.weights.key_scale,
            self.weights.value_scale,
            self.weights.rotary,
            self.weights.softcap,
            self.weights.sinks,
        )

    def tiles(self, start: int = 0, end: int | None = None, size: int = 1024) -> Iterator[tuple[int, int]]:
        """Yield bounds of tiles of at most ``size`` tokens, so that scratch memory does not grow with the prompt."""
        last = self.kv_len if end is None else end
        for first in range(start, last, size):
            yield first, min(first + size, last)


@dataclass(frozen=True)
class StepInputs:
    """Several requests after a step of their decode, for policies that evict token by token. Read only.

    A row is one request in one layer; layers come together that have the same scales, and those of a policy that asks
    for ``weights`` one by one. What a head holds is in no order: ``positions`` say which tokens they are.

    query:      [num_rows, num_queries, num_heads, head_size] the last queries, RoPE applied; the newest stands last
    keys:       [num_pages, block_size, head_size] a view of the whole page pool, as in ``ScoreInputs``
    page_table: [num_rows, num_kv_heads, max_pages] int64, every page full; page 0 behind those of shorter heads
    positions:  [num_rows, num_kv_heads, max_pages * block_size] int64, -1 where a head holds nothing
    num_tokens: [num_rows] int64, true lengths, the newest token included
    max_tokens: the longest of these, or more
    scale:      softmax scale
    weights:    as in ``ScoreInputs``; of several layers those of the first
    state:      [num_rows, num_kv_heads, max_pages * block_size] float32, what the policy has summed up of each token
                before this step, 0 for the newest one; None if it does not observe all queries
    sinks:      [num_rows, num_heads] float32, those of each row's layer, as in ``LayerWeights``; None: there are none
    """

    query: torch.Tensor
    keys: torch.Tensor
    page_table: torch.Tensor
    positions: torch.Tensor
    num_tokens: torch.Tensor
    max_tokens: int
    scale: float
    weights: LayerWeights = LayerWeights()
    state: Any = None
    sinks: torch.Tensor | None = None

    @property
    def is_held(self) -> torch.Tensor:
        """[num_rows, num_kv_heads, num_slots] bool, the slots in which a token of the request is."""
        return self.positions >= 0

    def slot_scores(self, query: torch.Tensor, last_seen: torch.Tensor, group: Group, fusion: Fusion) -> torch.Tensor:
        """Return [num_rows, num_kv_heads, num_slots] float32, scores by the attention that ``query`` pays to each slot.

        query:     [num_rows, num_queries, num_heads, head_size], any number of heads for each KV head
        last_seen: [num_rows, num_queries] int64, a query sees what the head holds up to this position
        group:     over the query heads of one KV head, of each query by itself
        fusion:    over the queries, then; "none" returns [num_rows, num_kv_heads, num_queries, num_slots]
        """
        scale = self.scale * self.weights.key_scale
        sinks = None
        if self.sinks is not None:
            sinks = sinks_for(self.sinks, query.shape[2], self.page_table.shape[1]).flatten(1).contiguous()
        batch = SlotBatch(
            query,
            self.keys,
            self.page_table,
            self.positions,
            last_seen.contiguous(),
            scale,
            self.weights.softcap,
            sinks,
        )
        return slot_scores(batch, group, fusion)

    def newest_attention(self) -> torch.Tensor:
        """Return [num_rows, num_kv_heads, num_slots] float32, what the newest query pays, mean over each group."""
        return self.slot_scores(self.query[:, -1:], self.num_tokens[:, None] - 1, "mean", "sum")

    def sum_over_heads(self, of_heads: torch.Tensor) -> torch.Tensor:
        """Return [num_rows, num_kv_heads, num_queries, num_slots], for every token the sum over the heads that hold it.

        of_heads: likewise, of one head each; 0 where a head holds nothing
        """
        by_query = of_heads.transpose(1, 2).flatten(2)
        index = self.positions.clamp(min=0).flatten(1)[:, None].expand_as(by_query)
        of_tokens = by_query.new_zeros(*by_query.shape[:2], self.max_tokens).scatter_add_(2, index, by_query)
        summed: torch.Tensor = of_tokens.gather(2, index).unflatten(2, (of_heads.shape[1], -1)).transpose(1, 2)
        return summed

    @property
    def grouped_query(self) -> torch.Tensor:
        """[num_rows, num_kv_heads, group, num_queries, head_size] float32, the queries by the KV head they read."""
        return by_kv_head(self.query, self.page_table.shape[1])
