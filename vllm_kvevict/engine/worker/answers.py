"""Requests that are evicted again, while they decode and between chunks: all that are due in a step together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.engine.worker.prefills import ChunkGroup
from vllm_kvevict.engine.worker.step import Step
from vllm_kvevict.engine.worker.watched import BatchRow, WatchedRequest
from vllm_kvevict.eviction.grouping import scored_again_together
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.policies.base import Need

_DOING = "scoring an answer"


class Answers:
    """Lets policies look at what such requests hold, by groups that share a method."""

    def __init__(
        self, pool: PagePool, page_table: PageTable, residents: Residents, ring: QueryRing, failures: Failures
    ) -> None:
        self._pool, self._page_table, self._residents, self._ring = pool, page_table, residents, ring
        self._failures = failures

    def new_queries(
        self, requests: Sequence[WatchedRequest], num_tokens: Sequence[int]
    ) -> tuple[list[torch.Tensor], list[BatchRow]]:
        """Return per layer [*, num_heads, head_size], queries since the last full blocks, and which are whose; none of
        those whose policy does not observe all of them.
        """
        num_new = np.array([
            count - request.num_tokens if Need.ALL_QUERIES in request.needs else 0
            for request, count in zip(requests, num_tokens, strict=True)
        ])  # fmt: skip
        most, ends = int(num_new.max()), num_new.max() * np.arange(1, len(requests) + 1)
        last = self._last(requests, num_tokens, most) if most else [self._none(1)]
        queries = [of_layer for part in last for of_layer in part.transpose(0, 1).flatten(1, 2)]
        bounds = zip(requests, (ends - num_new).tolist(), ends.tolist(), num_tokens, strict=True)
        return queries, [BatchRow(*of_row) for of_row in bounds]

    def _none(self, num_reqs: int) -> torch.Tensor:
        return self._ring.none_of(num_reqs, range(self._pool.num_layers))

    def _last(self, requests: Sequence[WatchedRequest], num_tokens: Sequence[int], count: int) -> list[torch.Tensor]:
        """Return [num_reqs, num_layers, count, num_heads, head_size] of each stretch of layers that equally many read,
        the last queries of requests that have so many tokens; -1 stands for the slot of those of which none is
        remembered.
        """
        slots = [self._ring.slots.get(request.req_id) for request in requests]
        facts = to_device(np.array([slots, num_tokens], dtype=np.int64), self._pool.pages.device)
        return [self._ring.last_of(layers, facts[0], facts[1], count) for layers in self._ring.readers.stretches()]

    def chunk_groups(self, step: Step, watched: Mapping[str, WatchedRequest], bounds: list[int]) -> list[ChunkGroup]:
        """Prepare the evictions behind chunks of prompts.

        bounds: [num_reqs + 1], where the tokens of each row of the batch begin
        """
        chunks = step.decisions.chunks
        rows = {
            req_id: BatchRow(watched[req_id], bounds[row], bounds[row + 1], chunks[req_id].plan.num_tokens)
            for row, req_id in enumerate(step.req_ids if chunks else [])
            if req_id in chunks
        }
        for per_token in (False, True):
            due = {
                req_id: (row.request.method, chunks[req_id].plan.num_tokens - row.request.num_tokens)
                for req_id, row in rows.items()
                if chunks[req_id].plan.per_token == per_token
            }
            for req_ids in scored_again_together(due):
                members = [rows[req_id] for req_id in req_ids]
                num_tokens = [chunks[req_id].plan.num_tokens for req_id in req_ids]
                evictions = self._evictions([row.request for row in members], num_tokens, step, per_token)
                step.again.append(ChunkGroup(members, evictions))
        return step.again

    def score(self, step: Step, watched: Mapping[str, WatchedRequest], weights: ModelWeights) -> None:
        """Score all that the due requests hold, the blocks that their answers have filled included."""
        due = {
            req_id: (watched[req_id].method, num_tokens - watched[req_id].num_tokens)
            for req_id, num_tokens in step.decisions.shrinking.items()
            if not watched[req_id].method.schedule.per_token  # whose tokens have left the block one by one
        }
        for req_ids in scored_again_together(due):
            with self._failures.of(req_ids, _DOING):  # beside what is asked, there may be no memory for it
                self._score_group([watched[req_id] for req_id in req_ids], step, weights)

    def _score_group(self, requests: list[WatchedRequest], step: Step, weights: ModelWeights) -> None:
        req_ids = [request.req_id for request in requests]
        num_tokens = [step.decisions.shrinking[req_id] for req_id in req_ids]
        queries = self._queries(requests, num_tokens)
        evictions = self._evictions(requests, num_tokens, step)

        def score(evictions: ResidentEvictions, reqs: slice) -> None:
            needs = requests[0].needs
            for stretch, last, chunk in queries:
                at_once = 1 if weights.makes_copies(needs) else len(stretch)
                for first in range(0, len(stretch), at_once):
                    layers, some = stretch[first : first + at_once], slice(first, first + at_once)
                    scales, of_layers = zip(
                        *((weights.scale(layer), weights.of(layer, needs)) for layer in layers), strict=True
                    )
                    evictions.score_layers(layers, last[reqs, some], chunk[reqs, some], scales, of_layers)

        are_well = len(req_ids) > 1 and not any(req_id in self._failures for req_id in req_ids)
        if are_well and self._failures.together(_DOING, score, evictions, slice(None)):
            step.answers.append((req_ids, evictions))
            return
        for place, req_id in enumerate(req_ids):
            alone = evictions.alone(place)
            self._failures.ask(req_id, _DOING, score, alone, slice(place, place + 1))
            step.answers.append(([req_id], alone))

    def _queries(
        self, requests: list[WatchedRequest], num_tokens: list[int]
    ) -> list[tuple[range, torch.Tensor, torch.Tensor]]:
        """Return stretches of layers, and of each the last queries of answers [num_reqs, num_layers, num_queries,
        num_heads, head_size], and all new ones, none if their policy does not observe them.
        """
        last = self._last(requests, num_tokens, requests[0].method.query_window)
        new = [part[:, :, :0] for part in last]
        if Need.ALL_QUERIES in requests[0].needs:
            # all have as many new ones
            new = self._last(requests, num_tokens, num_tokens[0] - requests[0].num_tokens)
        return list(zip(self._ring.readers.stretches(), last, new, strict=True))

    def _evictions(
        self, requests: list[WatchedRequest], num_tokens: list[int], step: Step, per_token: bool = False
    ) -> ResidentEvictions:
        """Return the evictions of requests of ``num_tokens`` tokens, behind this step; per_token: as there."""
        req_ids = [request.req_id for request in requests]
        return ResidentEvictions(
            requests[0].method,
            num_tokens,
            [count - request.num_tokens for request, count in zip(requests, num_tokens, strict=True)],
            self._pool,
            self._residents,
            *self._page_table.rows(req_ids, num_tokens, [step.block_ids[req_id] for req_id in req_ids]),
            self._page_table.num_full_pages(req_ids),
            per_token,
            [request.spans for request in requests],
        )
