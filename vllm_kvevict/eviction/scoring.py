"""The scores of prompts that end in one step, made layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vllm_kvevict.budgets import BudgetAllocator
from vllm_kvevict.budgets.batch import BatchAllocator, measures_batches
from vllm_kvevict.cache.pages import BlockPages, PagePool
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.eviction.held_scores import HeldScores
from vllm_kvevict.eviction.layers import scored_at_once
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.results import checked
from vllm_kvevict.eviction.traits import allocator_traits_of, traits_of
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import ScoreBatch, scores_batches
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs, projections_of


class PromptScores:
    """What a policy thinks of several prompts, and what an allocator has measured of them.

    pages:  of their blocks
    scored: layers whose scores are known
    """

    def __init__(self, method: Method, pool: PagePool, plans: Sequence[EvictionPlan], pages: BlockPages) -> None:
        self._method, self._pool, self._plans, self.pages = method, pool, plans, pages
        self._kv_lens = [plan.num_tokens for plan in plans]
        self._scores: HeldScores | None = None
        self.scored: set[int] = set()
        no_measure = torch.empty(0, dtype=torch.float64)
        self._measures = [[no_measure] * pool.num_layers for _ in plans]
        self._waiting: list[list[ScoreInputs]] = []
        self._lens: torch.Tensor | None = None

    @property
    def scores(self) -> HeldScores:
        """Anything behind the tokens of a prompt. There is no memory for them before the first layer is scored."""
        if self._scores is None:
            shape = len(self._plans), self._pool.num_layers, self._pool.num_kv_heads, max(self._kv_lens)
            self._scores = HeldScores.empty(shape, self.pages.to_blocks.device)
        return self._scores

    @property
    def are_on_host(self) -> bool:
        """Whether there are scores that wait on the host."""
        return self._scores is not None and self._scores.is_on_host

    @property
    def measures(self) -> torch.Tensor:
        """[num_reqs, num_layers, num_measures] float64"""
        measures = torch.stack([measure for of_request in self._measures for measure in of_request])
        return measures.view(len(self._plans), self._pool.num_layers, measures.shape[1])

    def only(self, req: int) -> PromptScores:
        """Return those of one prompt, which goes on alone."""
        plan = self._plans[req]
        num_blocks = cdiv(plan.num_tokens, self._pool.block_size)
        pages = self.pages.only(req, num_blocks)
        alone = PromptScores(self._method, self._pool, [plan], pages)
        alone._scores = None if self._scores is None else self._scores.only(req, plan.num_tokens)
        alone.scored = set(self.scored)
        alone._measures = [self._measures[req]]
        waiting = [of_layer[req] for of_layer in self._waiting]
        alone._waiting = [[replace(inputs, page_table=inputs.page_table[:, :num_blocks])] for inputs in waiting]
        return alone

    def take(self, req: int, alone: PromptScores) -> None:
        """Take over the scores of one prompt, beginning with the first."""
        alone.score_waiting()
        self.scores.take(req, alone.scores)
        self._measures[req] = alone._measures[0]
        self.scored = self.scored & alone.scored if req else set(alone.scored)

    def lens(self, num_layers: int) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads] int64, the tokens of each head."""
        if self._lens is None:
            self._lens = to_device(np.array(self._kv_lens, dtype=np.int64), self.pages.to_blocks.device)
        shape = len(self._plans), num_layers, self._pool.num_kv_heads
        return self._lens[:, None, None].expand(shape).contiguous()

    def score_layer(
        self,
        layer: int,
        query: Sequence[torch.Tensor],
        scale: float,
        output: Sequence[torch.Tensor | None],
        weights: LayerWeights | None,
        state: Sequence[Any],
        pseudo_query: Sequence[torch.Tensor | None],
    ) -> None:
        """Score a layer of all prompts, now or together with the next ones; the arguments are as in ``Eviction``."""
        page_ids = self.pages.of_layer(layer)
        of_layer = [
            ScoreInputs(
                query[req],
                self._pool.keys,
                self._pool.values,
                page_ids[req],
                plan.num_tokens,
                scale,
                output[req],
                weights or LayerWeights(),
                state[req],
                plan.num_kept_tokens,
                layer,
                pseudo_query[req],
            )
            for req, plan in enumerate(self._plans)
        ]
        self._waiting.append(of_layer)
        most = scratch.most_bytes() // (4 * len(self._plans) * self._pool.num_kv_heads * max(self._kv_lens))
        if len(self._waiting) >= max(min(traits_of(self._method.policy).layers_at_once, most), 1):
            self.score_waiting()

    def score_waiting(self) -> None:
        """Score the layers that wait; they go on waiting if one of them fails."""
        if not self._waiting:
            return
        if self._are_scored_together():
            for waiting in self._stretches():
                self._score_together(waiting)
        else:
            for req in range(len(self._plans)):
                self._score_alone(req, self._readable([of_layer[req] for of_layer in self._waiting]))
        self._measure()
        self.scored.update(of_layer[0].layer for of_layer in self._waiting)
        self._waiting = []

    def _are_scored_together(self) -> bool:
        """Whether one call scores all prompts: nothing that was summed up of each, which is a tensor of its own."""
        traits = traits_of(self._method.policy)
        batches = scores_batches(self._method.policy) and Need.ALL_QUERIES not in traits.needs
        return batches and self._are_alike(traits.query_window)

    def _are_alike(self, window: int) -> bool:
        """Whether somebody who looks at this many queries sees equally many of each prompt."""
        return len({min(len(inputs.query), window) for of_layer in self._waiting for inputs in of_layer}) == 1

    def _stretches(self) -> Iterator[list[list[ScoreInputs]]]:
        """Yield the layers that wait, those together that one call can look at."""
        firsts = [of_layer[0] for of_layer in self._waiting]
        scales, weights = [inputs.scale for inputs in firsts], [inputs.weights for inputs in firsts]
        for first, end in scored_at_once(scales, weights, len(firsts)):
            yield self._waiting[first:end]

    def _batch(self, waiting: list[list[ScoreInputs]], window: int) -> ScoreBatch:
        """Return some layers of all prompts, with as many queries as one of their readers asked for."""
        first, layers = waiting[0][0], [of_layer[0].layer for of_layer in waiting]
        inputs = [last_queries(of_layer[req], window) for req in range(len(self._plans)) for of_layer in waiting]
        outputs = [one.output for one in inputs if one.output is not None]

        def stacked(parts: list[torch.Tensor]) -> torch.Tensor:
            together: torch.Tensor = torch.stack(parts).unflatten(0, (-1, len(layers)))
            return together

        keys, values, page_table = self._pool.readable(stacked([one.page_table for one in inputs]))
        lens = self.lens(len(layers))
        num_kept = to_device(np.array([plan.num_kept_tokens for plan in self._plans]), lens.device)
        return ScoreBatch(
            stacked([one.query for one in inputs]),
            keys,
            lambda: values,
            page_table,
            lens,
            max(self._kv_lens),
            first.scale * first.weights.key_scale,
            first.weights.value_scale,
            alike=True,
            key_scale=first.weights.key_scale,
            layers=layers,
            num_kept=num_kept[:, None, None].expand(lens.shape),
            output=stacked(outputs) if outputs else None,
            projections=projections_of([of_layer[0].weights for of_layer in waiting]),
        )

    def _score_together(self, waiting: list[list[ScoreInputs]]) -> None:
        policy = self._method.policy
        batch = self._batch(waiting, traits_of(policy).query_window)
        name = f"{type(policy).__name__}.score_batch"
        scores = checked(name, policy.score_batch(batch), batch.shape, self.scores.device)
        for place, layer in enumerate(batch.layers):
            self.scores.put(layer, scores[:, place])

    def _score_alone(self, req: int, waiting: list[ScoreInputs]) -> None:
        policy, shape = self._method.policy, (self._pool.num_kv_heads, self._kv_lens[req])
        window, name = traits_of(policy).query_window, f"{type(policy).__name__}.score"
        scores = policy.score_layers([last_queries(inputs, window) for inputs in waiting])
        for inputs, of_layer in zip(waiting, scores, strict=True):
            self.scores.put(inputs.layer, checked(name, of_layer, shape, self.scores.device), req)

    def _measure(self) -> None:
        allocator = self._method.allocator
        if type(allocator).measure is BudgetAllocator.measure:
            return
        window = allocator_traits_of(allocator).query_window
        if isinstance(allocator, BatchAllocator) and measures_batches(type(allocator)) and self._are_alike(window):
            for waiting in self._stretches():
                measures = allocator.measure_batch(self._batch(waiting, window))
                for req, of_request in enumerate(measures):
                    for (inputs, *_), of_layer in zip(waiting, of_request, strict=True):
                        self._measures[req][inputs.layer] = of_layer
            return
        for req in range(len(self._plans)):
            for inputs in self._readable([of_layer[req] for of_layer in self._waiting]):
                self._measures[req][inputs.layer] = allocator.measure(last_queries(inputs, window))

    def _readable(self, layers: list[ScoreInputs]) -> list[ScoreInputs]:
        """Return inputs of one prompt in which a policy can read the pages."""
        num_blocks = cdiv(layers[0].kv_len, self._pool.block_size)
        if not self._pool.is_tiled:
            return [replace(inputs, page_table=inputs.page_table[:, :num_blocks]) for inputs in layers]
        keys, values, page_tables = self._pool.readable(
            torch.stack([inputs.page_table[:, :num_blocks] for inputs in layers])
        )
        return [
            replace(inputs, keys=keys, values=values, page_table=page_table)
            for inputs, page_table in zip(layers, page_tables, strict=True)
        ]


def last_queries(inputs: ScoreInputs, window: int) -> ScoreInputs:
    """Return ``inputs`` with as many of its queries as one of its readers asked for."""
    first = max(len(inputs.query) - window, 0)
    if first == 0:
        return inputs
    output = None if inputs.output is None else inputs.output[first:]
    return replace(inputs, query=inputs.query[first:], output=output)
