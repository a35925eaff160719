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
from vllm_kvevict.cache.ragged import padded
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.eviction.held_scores import HeldScores
from vllm_kvevict.eviction.layers import scored_at_once
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.results import checked, checked_preselection, checked_tokens
from vllm_kvevict.eviction.traits import allocator_traits_of, traits_of
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.batch import Prompt, ScoreBatch, preselects_batches, scores_batches
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs, projections_of, sinks_of


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
        # a layer that waits already has failed together with others
        self._waiting = [waiting for waiting in self._waiting if waiting[0].layer != layer]
        self._waiting.append(
            [
                replace(inputs, output=output[req], state=state[req], pseudo_query=pseudo_query[req])
                for req, inputs in enumerate(self._inputs(layer, query, scale, weights))
            ]
        )
        most = scratch.most_bytes() // (4 * len(self._plans) * self._pool.num_kv_heads * max(self._kv_lens))
        if len(self._waiting) >= max(min(traits_of(self._method.policy).layers_at_once, most), 1):
            self.score_waiting()

    def _inputs(
        self, layer: int, query: Sequence[torch.Tensor], scale: float, weights: LayerWeights | None
    ) -> list[ScoreInputs]:
        """Return what a policy sees of one layer of each prompt, and what it has asked for is to be put in."""
        page_ids = self.pages.of_layer(layer)
        return [
            ScoreInputs(
                query[req],
                self._pool.keys,
                self._pool.values,
                page_ids[req],
                plan.num_tokens,
                scale,
                weights=weights or LayerWeights(),
                num_kept=plan.num_kept_tokens,
                layer=layer,
            )
            for req, plan in enumerate(self._plans)
        ]

    def preselect_layer(
        self, layer: int, query: Sequence[torch.Tensor], scale: float, weights: LayerWeights | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [num_reqs, num_kv_heads, num_tokens] int64, the slots of the tokens that pseudo tokens see of each
        prompt in a layer, and -1 behind them; and [num_reqs] bool, whether the prompts have all tokens that were named.
        """
        of_layer, policy = self._inputs(layer, query, scale, weights), self._method.policy
        window, name = traits_of(policy).query_window, type(policy).__name__
        if preselects_batches(policy) and _are_alike([of_layer], window):
            found = policy.preselect_batch(self._batch([of_layer], window))
            source, num_tokens = f"{name}.preselect_batch", self.lens(1)[:, 0, 0]
            tokens, are_known = checked_preselection(source, found, self._pool.num_kv_heads, num_tokens)
        else:
            each = [self._preselect_alone(f"{name}.preselect", last_queries(inputs, window)) for inputs in of_layer]
            most = max(of_prompt.shape[1] for of_prompt, _ in each)
            together = padded([of_prompt for of_prompt, _ in each], [most] * len(each), 1, -1)
            tokens = together.unflatten(1, (len(each), most)).transpose(0, 1)
            are_known = torch.stack([is_known for _, is_known in each])
        block_size, place = self._pool.block_size, tokens.clamp(min=0)
        slots = self.pages.of_layer(layer).gather(2, place // block_size) * block_size + place % block_size
        return slots.masked_fill(tokens < 0, -1), are_known

    def _preselect_alone(self, source: str, inputs: ScoreInputs) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._method.policy.preselect(*self._readable([inputs]))
        return checked_tokens(source, found, self._pool.num_kv_heads, inputs.kv_len, inputs.query.device)

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
        """Whether one call scores all prompts."""
        policy = self._method.policy
        return scores_batches(policy) and _are_alike(self._waiting, traits_of(policy).query_window)

    def _stretches(self) -> Iterator[list[list[ScoreInputs]]]:
        """Yield the layers that wait, those together that one call can look at."""
        firsts = [of_layer[0] for of_layer in self._waiting]
        scales, weights = [inputs.scale for inputs in firsts], [inputs.weights for inputs in firsts]
        num_heads = [inputs.query.shape[1] for inputs in firsts]
        for first, end in scored_at_once(scales, weights, len(firsts), num_heads):
            yield self._waiting[first:end]

    def _batch(self, waiting: list[list[ScoreInputs]], window: int) -> ScoreBatch:
        """Return some layers of all prompts, with as many queries as one of their readers asked for."""
        first, layers = waiting[0][0], [of_layer[0].layer for of_layer in waiting]
        inputs = [last_queries(of_layer[req], window) for req in range(len(self._plans)) for of_layer in waiting]
        outputs = [one.output for one in inputs if one.output is not None]
        pseudo = [one.pseudo_query for one in inputs if one.pseudo_query is not None]
        num_pseudo = [len(of_layer) for of_layer in pseudo]

        def stacked(parts: list[torch.Tensor]) -> torch.Tensor:
            together: torch.Tensor = torch.stack(parts).unflatten(0, (len(self._plans), len(layers)))
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
            prompts=[Prompt(plan.num_tokens, plan.num_kept_tokens) for plan in self._plans],
            observed=[one.state for one in inputs],
            rotary=first.weights.rotary,
            pseudo_query=self._stacked_pseudo(pseudo, len(layers)) if pseudo else None,
            num_pseudo=to_device(np.array(num_pseudo[:: len(layers)]), lens.device) if pseudo else None,
            softcap=first.weights.softcap,
            sinks=sinks_of([of_layer[0].weights for of_layer in waiting]),
        )

    def _stacked_pseudo(self, queries: list[torch.Tensor], num_layers: int) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_pseudo_tokens, num_heads, head_size], zeros behind each request's."""
        most = max(map(len, queries))
        together: torch.Tensor = padded(queries, [most] * len(queries), dim=0)
        return together.view(len(self._plans), num_layers, most, *together.shape[1:])

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
        if (
            isinstance(allocator, BatchAllocator)
            and measures_batches(type(allocator))
            and _are_alike(self._waiting, window)
        ):
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


def _are_alike(waiting: list[list[ScoreInputs]], window: int) -> bool:
    """Whether somebody who looks at this many queries sees equally many of each prompt."""
    return len({min(len(inputs.query), window) for of_layer in waiting for inputs in of_layer}) == 1


def last_queries(inputs: ScoreInputs, window: int) -> ScoreInputs:
    """Return ``inputs`` with as many of its queries as one of its readers asked for."""
    first = max(len(inputs.query) - window, 0)
    if first == 0:
        return inputs
    output = None if inputs.output is None else inputs.output[first:]
    return replace(inputs, query=inputs.query[first:], output=output)
