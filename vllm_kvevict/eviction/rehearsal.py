"""A made-up request, evicted for the sake of its launches: every kernel is then compiled before a real one needs it.

Kernels are compiled for a model and a method, not for lengths or numbers of requests, so that one request is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, min_kept_blocks
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.kernels.expand_page_table import BatchRows
from vllm_kvevict.kernels.window_scores import MAX_ROWS
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import observes_chunks
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs, StepInputs, sinks_of

_NUM_EVICTED_BLOCKS = 2


class Rehearsal:
    """Does all that a method does to a request, in a few pages of its own.

    pool:       whose pages these are like; it stays as it is
    num_heads:  query heads
    dtype:      of queries
    weights_of: weights of a layer that some needs name; W_O is not among what is asked for, and is made up
    """

    def __init__(
        self,
        method: Method,
        pool: PagePool,
        num_heads: int,
        dtype: torch.dtype,
        scale: float,
        weights_of: Callable[[int, frozenset[Need]], LayerWeights],
    ) -> None:
        self._method, self._traits, self._scale, self._weights_of = method, traits_of(method.policy), scale, weights_of
        schedule, block_size = method.schedule, pool.block_size
        num_kept = min_kept_blocks(method.min_tokens, block_size, schedule.is_bounded)
        num_tokens = (num_kept + _NUM_EVICTED_BLOCKS) * block_size - block_size // 2
        self._plan = EvictionPlan(num_tokens, num_kept, block_size, schedule.per_token)
        generator = torch.Generator(pool.pages.device).manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=pool.pages.device)

        num_pages = pool.num_layers * pool.num_kv_heads * self._plan.num_blocks
        self._pool = _pool_of(draw(num_pages, pool.pages.shape[1]).to(pool.pages.dtype), pool)
        self._query = draw(num_tokens, num_heads, pool.head_size).to(dtype)
        self._projection = draw(1, num_heads * pool.head_size).to(dtype)
        self._block_ids = torch.arange(self._plan.num_blocks, device=pool.pages.device)

    def run(self) -> None:
        """Raises whatever the policy or the allocator raises."""
        self._evict_prompt()
        if self._method.schedule.is_bounded:
            for num_new in self._chunks():
                self._evict_again(num_new)
        if self._method.schedule.per_token:
            self._score_step()

    def _weights(self, layer: int) -> LayerWeights:
        found = self._weights_of(layer, self._traits.needs - {Need.OUTPUT_PROJECTION})
        return replace(found, output_projection=self._projection)

    def _last_queries(self, count: int) -> torch.Tensor:
        return self._query[len(self._query) - count :]

    def _evict_prompt(self) -> None:
        eviction = Eviction(self._method, self._plan, self._pool, self._block_ids)
        last, num_pseudo_tokens = self._last_queries(self._method.query_window), self._traits.num_pseudo_tokens
        for layer in range(self._pool.num_layers):
            weights, state, pseudo_query = self._weights(layer), self._observe(layer), None
            if num_pseudo_tokens:
                eviction.preselect_layer(layer, last, self._scale, weights)
                pseudo_query = self._query[:num_pseudo_tokens]
            eviction.score_layer(layer, last, self._scale, last, weights, state, pseudo_query)
        self._read(eviction)

    def _read(self, eviction: Eviction) -> None:
        """As attention does in a step that follows."""
        table = PageTable.of(self._pool, 1, self._plan.num_tokens)
        table.add([""], eviction.finish().pages, [self._plan], [eviction.full_block_ids])
        row = torch.zeros(1, dtype=torch.int32, device=self._block_ids.device)
        rows = BatchRows(row, row, row + self._plan.num_tokens, self._block_ids[None].to(torch.int32))
        table.expand([(rows, self._plan.num_tokens)])

    def _observe(self, layer: int) -> Any:
        if Need.ALL_QUERIES not in self._traits.needs:
            return None
        pages = self._pool.readable(self._pool.layer_page_ids(layer, self._block_ids))
        weights = self._weights(layer)
        inputs = ScoreInputs(self._query, *pages, self._plan.num_tokens, self._scale, weights=weights, layer=layer)
        policy = self._method.policy
        return (
            policy.observe_chunks([None], inputs.chunk)[0] if observes_chunks(policy) else policy.observe(None, inputs)
        )

    def _chunks(self) -> list[int]:
        """Return how many queries at once a policy observes of an answer, or behind an eviction, as far as it matters.

        Kernels have a power of two of rows, up to as many as fit.
        """
        if Need.ALL_QUERIES not in self._traits.needs:
            return [self._plan.num_evicted_tokens]
        return [2**power for power in range(MAX_ROWS.bit_length()) if 2**power < self._plan.num_tokens]

    def _evict_again(self, num_new: int) -> None:
        """As if some of the tokens were new."""
        plan, pages = self._plan, self._pool.page_ids(self._block_ids)
        num_pages = torch.full(pages.shape[:2], plan.num_blocks, device=pages.device)
        num_full = torch.full_like(num_pages, plan.num_full_blocks)
        tables = pages[None], num_pages[None], num_full[None]
        eviction = ResidentEvictions(
            self._method, [plan.num_tokens], [num_new], self._pool, Residents(self._pool), *tables, plan.per_token
        )
        last, chunk = self._last_queries(self._method.query_window)[None, None], self._last_queries(num_new)[None, None]
        for layer in range(self._pool.num_layers):
            eviction.score_layers(range(layer, layer + 1), last, chunk, [self._scale], [self._weights(layer)])
        eviction.compact()

    def _score_step(self) -> None:
        block_ids = self._block_ids[: self._plan.num_tokens // self._plan.block_size]
        observes = Need.ALL_QUERIES in self._traits.needs
        query = self._last_queries(max(self._traits.query_window, int(observes)))[None]
        num_slots = len(block_ids) * self._plan.block_size
        positions = torch.arange(num_slots, device=query.device).repeat(1, self._pool.num_kv_heads, 1)
        state = torch.zeros(positions.shape, device=query.device) if observes else None
        for layer in range(self._pool.num_layers):
            keys, _, page_table = self._pool.readable(self._pool.layer_page_ids(layer, block_ids)[None])
            lengths, weights = positions.new_full((1,), num_slots), self._weights(layer)
            self._method.policy.score_step(
                StepInputs(
                    *(query, keys, page_table, positions, lengths, num_slots, self._scale, weights, state),
                    sinks_of([weights]),
                )
            )


def _pool_of(pages: torch.Tensor, pool: PagePool) -> PagePool:
    """Return a pool of other pages, in which everything is where it is in those of ``pool``."""

    def as_in_pool(part: torch.Tensor) -> torch.Tensor:
        return pages.as_strided((len(pages), *part.shape[1:]), part.stride(), part.storage_offset())

    first_pages = torch.arange(pool.num_layers, device=pages.device) * (len(pages) // pool.num_layers)
    keys, values = as_in_pool(pool.keys), as_in_pool(pool.values)
    return PagePool(pages, keys, values, first_pages, pool.num_kv_heads, pool.num_kv_heads, pool.is_tiled)
