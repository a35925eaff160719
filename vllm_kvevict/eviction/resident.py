"""The same verbs for what earlier evictions have left: while an answer grows, and between the chunks of a prompt.

Such a request holds full pages, the same ones from its first eviction on, and behind them pages that new tokens fill.
Each time it is evicted, every head drops as many tokens as it has new ones in full pages; what survives of these moves
into the slots of what does not, so that they are empty. One that is filled in part stays, to be filled up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import perf_counter

import torch

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.results import checked
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies.base import LayerWeights, Need, ScoreInputs


@dataclass
class ResidentEviction:
    """One request's eviction after its first one.

    num_tokens:     tokens it has
    num_new:        of these, since the last eviction: they fill the end of its pages
    page_table:     [num_layers, num_kv_heads, max_pages] int64, full pages, and then those of the new tokens
    num_pages:      [num_layers, num_kv_heads] int64, pages in use
    num_full_pages: [num_layers, num_kv_heads] int64, of these, the ones that stay; and one more that is filled in part
    per_token:      as in ``EvictionPlan``
    seconds:        what scoring, selection and compaction took so far
    next_victims:   as in ``Eviction``, once all layers are scored
    """

    method: Method
    num_tokens: int
    num_new: int
    pool: PagePool
    residents: Residents
    page_table: torch.Tensor
    num_pages: torch.Tensor
    num_full_pages: torch.Tensor
    per_token: bool = False
    seconds: float = 0.0
    next_victims: torch.Tensor = field(init=False)
    _slots: torch.Tensor = field(init=False)
    _stays: torch.Tensor = field(init=False)
    _kept: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Put the slots of every head into the order of their tokens; slots that hold none come last."""
        start = perf_counter()
        block_size = self.pool.block_size
        lane = torch.arange(block_size, device=self.page_table.device)
        slots = (self.page_table[..., None] * block_size + lane).flatten(2)
        place = torch.arange(slots.shape[2], device=slots.device)
        kv_lens = self._kv_lens[..., None]
        is_held = place < kv_lens
        is_new = is_held & (place >= kv_lens - self.num_new)
        positions = self.residents.positions
        new_positions = self.num_tokens - kv_lens + place
        positions[slots[is_new]] = new_positions[is_new].to(torch.int32)
        order = positions[slots].masked_fill(~is_held, torch.iinfo(torch.int32).max).argsort(dim=-1)
        page = place // block_size
        is_tail = (page == self.num_pages[..., None] - 1) & (self._num_tail_tokens > 0)
        self.next_victims = torch.zeros_like(self.num_pages)
        stays = (page < self.num_full_pages[..., None]) | is_tail
        self._slots, self._stays = slots.gather(2, order), stays.gather(2, order)
        self._kept = torch.zeros_like(is_held)
        self.seconds += perf_counter() - start

    @property
    def _num_tail_tokens(self) -> int:
        return 0 if self.per_token else self.num_tokens % self.pool.block_size

    @property
    def _kv_lens(self) -> torch.Tensor:
        return self.num_pages * self.pool.block_size - -self.num_tokens % self.pool.block_size

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
        kv_lens = self._kv_lens[layer]
        for kv_len in kv_lens.unique().tolist():
            heads = (kv_lens == kv_len).nonzero()[:, 0]
            inputs = self._inputs(layer, heads, kv_len, scale, weights or LayerWeights())
            self._score(inputs, heads, self._of_heads(query, heads), self._of_heads(chunk, heads))
        self.seconds += perf_counter() - start

    def _of_heads(self, query: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        by_kv_head = query.unflatten(1, (self.pool.num_kv_heads, -1))
        of_heads: torch.Tensor = by_kv_head[:, heads].flatten(1, 2)
        return of_heads

    def _inputs(self, layer: int, heads: torch.Tensor, kv_len: int, scale: float, weights: LayerWeights) -> ScoreInputs:
        """Return what a policy sees of heads that hold equally many tokens: they are a layer of their own to it."""
        slots = self._slots[layer, heads, : cdiv(kv_len, self.pool.block_size) * self.pool.block_size]
        shape = (-1, self.pool.block_size, self.pool.head_size)
        keys, values = (kv.reshape(shape) for kv in self.pool.gather(slots))
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
            num_kept=int(self._num_kept(layer, heads)[0]),
            layer=layer,
        )

    def _score(self, inputs: ScoreInputs, heads: torch.Tensor, query: torch.Tensor, chunk: torch.Tensor) -> None:
        policy, kv_len = self.method.policy, inputs.kv_len
        traits = traits_of(policy)
        if Need.ALL_QUERIES in traits.needs:
            slots = self._slots[inputs.layer, heads, :kv_len]
            earlier = self.residents.sums[slots[:, : kv_len - len(chunk)]]
            sums = self._checked("observe", policy.observe(earlier, replace(inputs, query=chunk)), heads, kv_len)
            self.residents.sums[slots] = sums
            inputs = replace(inputs, state=sums)
        last = query[max(len(query) - traits.query_window, 0) :]
        scores = self._checked("score", policy.score(replace(inputs, query=last)), heads, kv_len)
        protection = self.method.num_sink, self.method.num_recent
        kept = select(scores, self._num_kept(inputs.layer, heads), *protection)
        self._kept[inputs.layer, heads, :kv_len] = kept
        if self.per_token:
            protected = protect(scores, *protection)
            lowest = protected.masked_fill(~kept, float("inf")).argmin(dim=1, keepdim=True)
            slots = self._slots[inputs.layer, heads].gather(1, lowest)[:, 0]
            self.next_victims[inputs.layer, heads] = self.residents.positions[slots].to(torch.int64)

    def _checked(self, function: str, result: object, heads: torch.Tensor, kv_len: int) -> torch.Tensor:
        """Return what a function of the policy returned for some heads, if it is [num_heads, kv_len] float32."""
        source = f"{type(self.method.policy).__name__}.{function}"
        return checked(source, result, (len(heads), kv_len), self.pool.pages.device)

    def _num_kept(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        return self.num_full_pages[layer, heads] * self.pool.block_size + self._num_tail_tokens

    def compact(self) -> None:
        """Move what survives of the pages that go into the slots of what does not. The pool's pages change."""
        start = perf_counter()
        is_held = torch.arange(self._slots.shape[2], device=self._slots.device) < self._kv_lens[..., None]
        # head by head as many of the ones as of the others: what is kept fills the slots that stay
        source = self._slots[self._kept & ~self._stays]
        destination = self._slots[~self._kept & is_held & self._stays]
        self.pool.move(source, destination)
        self.residents.move(source, destination)
        self.seconds += perf_counter() - start
