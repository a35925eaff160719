"""The same verbs while an answer grows: whenever a block of it is full, every head makes room for the next one.

A bounded request holds full pages and one that its answer fills. When that one is full, each head evicts as many tokens
as it holds; what survives of it moves into their slots, and the block is used again. The request holds the same blocks
from then on, and vLLM allocates nothing for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import perf_counter

import torch

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.cache.selection import protect, select
from vllm_kvevict.evictor import Method
from vllm_kvevict.kernels.move_tokens import ELEMENT_VIEWS, move_tokens
from vllm_kvevict.policies.base import LayerWeights, Need, ScoreInputs


@dataclass
class DecodeEviction:
    """One request's eviction at the end of a block of its answer.

    num_tokens: tokens it has, a multiple of the block size
    num_new:    of these, since the last eviction: they fill the end of the last page
    page_table: [num_layers, num_kv_heads, max_pages] int64, its full pages; the last one in use is the answer's
    num_pages:  [num_layers, num_kv_heads] int64, pages in use
    seconds:    what scoring, selection and compaction took so far
    """

    method: Method
    num_tokens: int
    num_new: int
    pool: PagePool
    residents: Residents
    page_table: torch.Tensor
    num_pages: torch.Tensor
    seconds: float = 0.0
    _slots: torch.Tensor = field(init=False)
    _kept: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Put the slots of every head into the order of their tokens; entries past its pages come last."""
        start = perf_counter()
        block_size = self.pool.block_size
        lane = torch.arange(block_size, device=self.page_table.device)
        slots = (self.page_table[..., None] * block_size + lane).flatten(2)
        is_used = torch.arange(slots.shape[2], device=slots.device) < self.num_pages[..., None] * block_size
        new = self._last_page()[..., block_size - self.num_new :]
        positions = self.residents.positions
        positions[new] = torch.arange(self.num_tokens - self.num_new, self.num_tokens).to(positions)
        order = positions[slots].masked_fill(~is_used, torch.iinfo(torch.int32).max).argsort(dim=-1)
        self._slots = slots.gather(2, order)
        self._kept = torch.zeros_like(is_used)
        self.seconds += perf_counter() - start

    def _last_page(self) -> torch.Tensor:
        """Return the slots [num_layers, num_kv_heads, block_size] of the page that the answer has filled."""
        pages = self.page_table.gather(2, self.num_pages[..., None] - 1)
        return pages * self.pool.block_size + torch.arange(self.pool.block_size, device=pages.device)

    def score_layer(
        self,
        layer: int,
        query: torch.Tensor,
        chunk: torch.Tensor,
        scale: float,
        weights: LayerWeights | None = None,
    ) -> None:
        """Score one layer and choose what its heads keep.

        query: [num_queries, num_heads, head_size] the last queries, at least as many as the policy looks at
        chunk: [num_new, num_heads, head_size] all queries since the last eviction, if it looks at all; else unused
        """
        start = perf_counter()
        num_pages = self.num_pages[layer]
        for count in num_pages.unique().tolist():
            heads = (num_pages == count).nonzero()[:, 0]
            inputs = self._inputs(layer, heads, count * self.pool.block_size, scale, weights or LayerWeights())
            self._score(inputs, heads, self._of_heads(query, heads), self._of_heads(chunk, heads))
        self.seconds += perf_counter() - start

    def _of_heads(self, query: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        by_kv_head = query.unflatten(1, (self.pool.num_kv_heads, -1))
        of_heads: torch.Tensor = by_kv_head[:, heads].flatten(1, 2)
        return of_heads

    def _inputs(self, layer: int, heads: torch.Tensor, kv_len: int, scale: float, weights: LayerWeights) -> ScoreInputs:
        """Return what a policy sees of heads that hold equally many tokens: they are a layer of their own to it."""
        slots = self._slots[layer, heads, :kv_len]
        keys, values = _gathered(self.pool.keys, slots), _gathered(self.pool.values, slots)
        projection = weights.output_projection
        if projection is not None and len(heads) < self.pool.num_kv_heads:
            projection = projection.unflatten(1, (self.pool.num_kv_heads, -1))[:, heads].flatten(1)
        return ScoreInputs(
            query=torch.empty(0),
            keys=keys,
            values=values,
            page_table=torch.arange(len(keys), device=slots.device).reshape(len(heads), -1),
            kv_len=kv_len,
            scale=scale,
            weights=replace(weights, output_projection=projection),
            num_kept=kv_len - self.pool.block_size,
            layer=layer,
        )

    def _score(self, inputs: ScoreInputs, heads: torch.Tensor, query: torch.Tensor, chunk: torch.Tensor) -> None:
        policy, kv_len = self.method.policy, inputs.kv_len
        if Need.ALL_QUERIES in policy.needs:
            slots = self._slots[inputs.layer, heads, :kv_len]
            earlier = self.residents.sums[slots[:, : kv_len - len(chunk)]]
            sums = policy.observe(earlier, replace(inputs, query=chunk))
            self.residents.sums[slots] = sums
            inputs = replace(inputs, state=sums)
        scores = policy.score(replace(inputs, query=query[max(len(query) - policy.query_window, 0) :]))
        scores = protect(scores, self.method.num_sink, self.method.num_recent)
        num_kept = torch.full((len(heads),), kv_len - self.pool.block_size)
        self._kept[inputs.layer, heads, :kv_len] = select(scores, num_kept)

    def finish(self) -> None:
        """Move what survives of the last page into the slots of evicted tokens. The pool's pages change."""
        start = perf_counter()
        slots, kept = self._slots, self._kept
        last = self._last_page()
        is_last = (slots >= last[..., :1]) & (slots <= last[..., -1:])
        held = torch.arange(slots.shape[2], device=slots.device) < self.num_pages[..., None] * self.pool.block_size
        # head by head as many of the ones as of the others: each keeps a page less than it holds
        source, destination = slots[kept & is_last], slots[~kept & held & ~is_last]
        move_tokens(self.pool.keys, self.pool.values, source, destination)
        self.residents.move(source, destination)
        self.seconds += perf_counter() - start


def _gathered(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return [num_slots / block_size, block_size, head_size], a copy of these slots in their order."""
    block_size = pages.shape[1]
    elements = pages.view(ELEMENT_VIEWS[pages.element_size()])  # indexing is not defined for every 8-bit float
    gathered = elements[slots // block_size, slots % block_size].view(pages.dtype)
    return gathered.reshape(-1, block_size, pages.shape[2])
