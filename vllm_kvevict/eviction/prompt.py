"""The five verbs of an eviction, in order: score -> allocate -> select -> compact -> free.  READ THIS FIRST.

*Score* happens layer by layer while the last chunk of a prompt passes (``Eviction.score_layer``, called from the
attention backend); *allocate* and *select* once after the last layer (``Eviction.choose``), and then *compact*
(``Eviction.compact``), in which nobody else's code has a part; *free* is vLLM's own: its scheduler returns the blocks
to its pool in which nothing of the request lives any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch

from vllm_kvevict.budgets import BudgetAllocator, round_to_pages
from vllm_kvevict.cache.compaction import Compaction, plan_compaction
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.observer import Choice, is_observed, show
from vllm_kvevict.eviction.results import checked, checked_tokens, checked_wish
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.eviction.traits import allocator_traits_of, traits_of
from vllm_kvevict.policies.base import EvictionPolicy, LayerWeights, ScoreInputs


@dataclass
class Eviction:
    """One request's eviction, from its first scored layer to its compacted cache.

    block_ids:       [num_blocks] int64, the request's block table
    fresh_block_ids: [num_full_blocks] int64, where the kept tokens go; None for the last blocks of the prompt
    seconds:         what observing, scoring, allocation, selection and compaction took so far
    next_victims:    [num_layers, num_kv_heads] int64, positions of the lowest scores that were kept: the next tokens to
                     go, if from now on each new token takes the slot of one that goes
    """

    method: Method
    plan: EvictionPlan
    pool: PagePool
    block_ids: torch.Tensor
    fresh_block_ids: torch.Tensor | None = None
    seconds: float = 0.0
    next_victims: torch.Tensor | None = None
    _scores: list[torch.Tensor | None] = field(init=False)
    _measures: list[torch.Tensor] = field(init=False)
    _waiting: list[ScoreInputs] = field(init=False, default_factory=list)
    _compaction: Compaction = field(init=False)
    _shown: Choice | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._page_ids = self.pool.page_ids(self.block_ids)  # [num_layers, num_kv_heads, num_blocks]
        self._scores = [None] * self.pool.num_layers
        self._measures = [torch.empty(0, dtype=torch.float64)] * self.pool.num_layers

    @property
    def full_block_ids(self) -> torch.Tensor:
        """[plan.num_full_blocks] int64, the blocks whose pages are kept full."""
        if self.fresh_block_ids is not None:
            return self.fresh_block_ids
        first = self.plan.first_kept_block
        return self.block_ids[first : first + self.plan.num_full_blocks]

    def preselect_layer(
        self, layer: int, query: torch.Tensor, scale: float, weights: LayerWeights | None = None
    ) -> torch.Tensor:
        """Return [num_kv_heads, num_tokens] int64, the slots of the tokens of one layer that pseudo tokens see.

        query, weights: as for ``score_layer``
        """
        start = perf_counter()
        policy, inputs = self.method.policy, self._readable([self._inputs(layer, query, scale, weights)])[0]
        found = policy.preselect(_last_queries(inputs, traits_of(policy).query_window))
        tokens = checked_tokens(f"{_name(policy)}.preselect", found, self.pool.num_kv_heads, inputs.kv_len)
        block_size = self.pool.block_size
        slots = self._page_ids[layer].gather(1, tokens // block_size) * block_size + tokens % block_size
        self.seconds += perf_counter() - start
        return slots

    def score_layer(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        output: torch.Tensor | None = None,
        weights: LayerWeights | None = None,
        state: Any = None,
        pseudo_query: torch.Tensor | None = None,
    ) -> None:
        """Score one layer whose keys and values are in the cache, now or together with the next ones.

        The arguments are as in ``ScoreInputs`` and must stay as they are; query: the last ones that the policy and the
        allocator need
        """
        start = perf_counter()
        self._waiting.append(self._inputs(layer, query, scale, weights, output, state, pseudo_query))
        if len(self._waiting) >= traits_of(self.method.policy).layers_at_once:
            self._score_waiting()
        self.seconds += perf_counter() - start

    def _score_waiting(self) -> None:
        waiting, self._waiting = self._readable(self._waiting), []
        policy, allocator = self.method.policy, self.method.allocator
        window = traits_of(policy).query_window
        scores = policy.score_layers([_last_queries(inputs, window) for inputs in waiting])
        shape = self.pool.num_kv_heads, self.plan.num_tokens
        for inputs, of_layer in zip(waiting, scores, strict=True):
            self._scores[inputs.layer] = checked(f"{_name(policy)}.score", of_layer, shape, self.pool.pages.device)
        if type(allocator).measure is not BudgetAllocator.measure:
            window = allocator_traits_of(allocator).query_window
            for inputs in waiting:
                self._measures[inputs.layer] = allocator.measure(_last_queries(inputs, window))

    def _readable(self, layers: list[ScoreInputs]) -> list[ScoreInputs]:
        """Return inputs in which a policy can read the pages."""
        if not self.pool.is_tiled:
            return layers
        keys, values, page_tables = self.pool.readable(torch.stack([inputs.page_table for inputs in layers]))
        return [
            replace(inputs, keys=keys, values=values, page_table=page_table)
            for inputs, page_table in zip(layers, page_tables, strict=True)
        ]

    def _inputs(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        weights: LayerWeights | None,
        output: torch.Tensor | None = None,
        state: Any = None,
        pseudo_query: torch.Tensor | None = None,
    ) -> ScoreInputs:
        return ScoreInputs(
            query,
            self.pool.keys,
            self.pool.values,
            self._page_ids[layer],
            self.plan.num_tokens,
            scale,
            output,
            weights or LayerWeights(),
            state,
            self.plan.num_kept_tokens,
            layer,
            pseudo_query,
        )

    def adopt(self, plan: EvictionPlan) -> None:
        """Go on with a plan that keeps fewer blocks, of the same prompt."""
        self.plan = plan
        if self.fresh_block_ids is not None:
            self.fresh_block_ids = self.fresh_block_ids[len(self.fresh_block_ids) - plan.num_full_blocks :]

    def finish(self) -> Compaction:
        """``choose``, and then ``compact``."""
        self.choose()
        return self.compact()

    def choose(self) -> None:
        """Allocate and select: the last that a policy or an allocator has a part in. Nothing moves.

        Raises RuntimeError if a layer was not scored, and whatever they raise; ValueError or TypeError if they return
        what is none of an answer.
        """
        start = perf_counter()
        scores, protection = self._all_scores(), (self.method.num_sink, self.method.num_recent)
        protected = protect(scores, *protection)
        num_full_pages = self._allocate(protected)
        kept = select(scores, num_full_pages * self.plan.block_size + self.plan.num_tail_tokens, *protection)
        if self.plan.per_token:
            self.next_victims = protected.masked_fill(~kept, float("inf")).argmin(dim=-1)
        self._compaction = plan_compaction(
            kept, num_full_pages, self.block_ids, self.plan, self.pool, self.fresh_block_ids
        )
        self.seconds += perf_counter() - start
        if is_observed():
            choice = self._shown = Choice(self.method, self.plan, self.pool, scores, kept)
            show(lambda observer: observer.chosen(choice))

    def compact(self) -> Compaction:
        """Move what was chosen. The pool's pages change; the caller puts the result in its page table."""
        start = perf_counter()
        for source, destination in self._compaction.phases:
            self.pool.move(source, destination)
        self.seconds += perf_counter() - start
        if (choice := self._shown) is not None:
            show(lambda observer: observer.compacted(choice, self._compaction, self.seconds))
        return self._compaction

    def _all_scores(self) -> torch.Tensor:
        if self._waiting:
            self._score_waiting()
        missing = [layer for layer, scores in enumerate(self._scores) if scores is None]
        if missing:
            raise RuntimeError(f"layers {missing} were not scored at the end of the prefill; nothing was evicted")
        return torch.stack([scores for scores in self._scores if scores is not None])

    def _allocate(self, scores: torch.Tensor) -> torch.Tensor:
        plan = self.plan
        num_heads = scores.shape[0] * scores.shape[1]
        wish = self._wish(scores)
        tokens = wish * (plan.num_kept_tokens * num_heads / wish.sum())
        # once the block of the tail is full it is emptied into the other pages: they must hold what is protected then
        tail = 0 if self.method.schedule.is_bounded else plan.num_tail_tokens
        minimum = cdiv(max(self.method.num_protected + self.method.schedule.per_token - tail, 0), plan.block_size)
        return round_to_pages(
            (tokens - plan.num_tail_tokens).clamp(min=0),  # every head holds the tail, in a page of its own
            plan.num_full_blocks * num_heads,
            min(minimum, plan.num_full_blocks),
            plan.num_tokens // plan.block_size,
        )

    def _wish(self, scores: torch.Tensor) -> torch.Tensor:
        """Return [num_layers, num_kv_heads] float64 on the CPU, what the allocator wishes.

        One key that is not finite spoils what is measured of its layer; then nothing is known of how layers differ,
        and all heads get the same.
        """
        allocator, measures = self.method.allocator, torch.stack(self._measures)
        if not torch.isfinite(measures).all():
            return torch.ones(scores.shape[:2], dtype=torch.float64)
        wish = allocator.wish(scores, self.plan.num_kept_tokens, measures)
        return checked_wish(f"{_name(allocator)}.wish", wish, scores.shape[:2])


def _name(of: EvictionPolicy | BudgetAllocator) -> str:
    return type(of).__name__


def _last_queries(inputs: ScoreInputs, window: int) -> ScoreInputs:
    """Return ``inputs`` with as many of its queries as one of its readers asked for."""
    first = max(len(inputs.query) - window, 0)
    if first == 0:
        return inputs
    output = None if inputs.output is None else inputs.output[first:]
    return replace(inputs, query=inputs.query[first:], output=output)
