"""Requests that are evicted again while they decode: all that are due in a step together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.engine.worker.step import Step
from vllm_kvevict.engine.worker.watched import WatchedRequest
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

    def new_queries(self, request: WatchedRequest, num_tokens: int) -> list[torch.Tensor]:
        """Return per layer [num_new, num_heads, head_size], the queries since the last full block; none if no policy
        asks.
        """
        layers = range(self._pool.num_layers)
        if request.req_id not in self._ring.slots:
            return [request.queries.last(layer)[:0] for layer in layers]
        num_new = num_tokens - request.num_tokens
        return [self._ring.last(layer, request.req_id, num_tokens, num_new) for layer in layers]

    def score(self, step: Step, watched: Mapping[str, WatchedRequest], weights: ModelWeights) -> None:
        """Score all that the due requests hold, the blocks that their answers have filled included."""
        due = {
            req_id: (watched[req_id].method, num_tokens - watched[req_id].num_tokens)
            for req_id, num_tokens in step.decisions.shrinking.items()
            if not watched[req_id].method.schedule.per_token  # whose tokens have left the block one by one
        }
        for req_ids in scored_again_together(due):
            self._score_group([watched[req_id] for req_id in req_ids], step, weights)

    def _score_group(self, requests: list[WatchedRequest], step: Step, weights: ModelWeights) -> None:
        req_ids, layers = [request.req_id for request in requests], range(self._pool.num_layers)
        num_tokens = [step.decisions.shrinking[req_id] for req_id in req_ids]
        queries = [self._queries(request, count) for request, count in zip(requests, num_tokens, strict=True)]
        last, chunk = (torch.stack(parts) for parts in zip(*queries, strict=True))
        evictions = self._evictions(requests, num_tokens, step)
        scales = [weights.scale(layer) for layer in layers]
        of_layers = [weights.of(layer, requests[0].needs) for layer in layers]
        are_well = len(req_ids) > 1 and not any(req_id in self._failures for req_id in req_ids)
        if are_well and self._failures.together(_DOING, evictions.score_layers, layers, last, chunk, scales, of_layers):
            step.answers.append((req_ids, evictions))
            return
        for place, req_id in enumerate(req_ids):
            alone, only = evictions.alone(place), slice(place, place + 1)
            self._failures.ask(req_id, _DOING, alone.score_layers, layers, last[only], chunk[only], scales, of_layers)
            step.answers.append(([req_id], alone))

    def _queries(self, request: WatchedRequest, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last queries of an answer [num_layers, num_queries, num_heads, head_size], and all new ones, none
        if its policy does not observe them.
        """
        chunks = self.new_queries(request, num_tokens)
        last = torch.stack([request.queries.extend(layer, chunk) for layer, chunk in enumerate(chunks)])
        return last, torch.stack(chunks) if Need.ALL_QUERIES in request.needs else last[:, :0]

    def _evictions(self, requests: list[WatchedRequest], num_tokens: list[int], step: Step) -> ResidentEvictions:
        rows = [
            self._page_table.rows(request.req_id, count, step.block_ids[request.req_id])
            for request, count in zip(requests, num_tokens, strict=True)
        ]
        width = max(pages.shape[2] for pages, _ in rows)
        return ResidentEvictions(
            requests[0].method,
            num_tokens,
            [count - request.num_tokens for request, count in zip(requests, num_tokens, strict=True)],
            self._pool,
            self._residents,
            torch.stack([pad(pages, (0, width - pages.shape[2])) for pages, _ in rows]),
            torch.stack([num_pages for _, num_pages in rows]),
            torch.stack([self._page_table.num_full_pages(request.req_id) for request in requests]),
        )
