"""Requests that will be evicted: what a worker gathers of them while they are computed, and from which rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vllm_kvevict.budgets.auto import AutoBudget
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.ragged import in_own_memory
from vllm_kvevict.cache.readers import Reader, Readers
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.protection import Spans
from vllm_kvevict.eviction.results import checked
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.inputs import LayerWeights


class LastRows:
    """The last rows of one request in every layer, gathered over chunks of any size."""

    def __init__(self, readers: Readers, window: int) -> None:
        self._window = window
        self._readers = readers
        self._rows: list[torch.Tensor | None] = [None] * readers.num

    @staticmethod
    def extend(several: Sequence[LastRows], reader: int, chunks: Sequence[torch.Tensor]) -> None:
        """Append to each of ``several`` requests its chunk [num_tokens, num_heads, head_size] of a reader, in one
        launch for all.

        chunks: alike but for their length
        """
        parts, lens = [], []
        for rows, chunk in zip(several, chunks, strict=True):
            earlier, num_new = rows._rows[reader], min(len(chunk), rows._window)
            num_earlier = 0 if earlier is None else min(len(earlier), rows._window - num_new)
            if earlier is not None:
                parts.append(earlier[len(earlier) - num_earlier :])
            parts.append(chunk[len(chunk) - num_new :])
            lens.append(num_earlier + num_new)
        # a copy: the engine reuses its buffers in the next step
        split = torch.cat(parts).split(lens)
        last = in_own_memory(split) if len(several) > 1 else split
        for rows, of_request in zip(several, last, strict=True):
            rows._rows[reader] = of_request

    def last(self, layer: int) -> torch.Tensor:
        """Return the last ``window`` rows so far of a layer that has seen a chunk, as have all others that read its
        pages: with the heads of all of them.
        """
        rows = [self._rows[number] for number in self._readers.numbers[layer]]
        seen = [of_reader for of_reader in rows if of_reader is not None]
        if len(seen) < len(rows):
            raise RuntimeError(f"layer {layer}, or one that shares its keys and values, has seen no chunk")
        return self._readers.joined(seen)


class WatchedRequest:
    """What was seen of one request, from its first chunk to its last eviction.

    queries: its last queries; none if the ring remembers them
    num_tokens: tokens whose queries were seen
    spans: what is protected beside both ends of the prompt, known from the first eviction on
    auto_budget: how its budget is chosen; None if it is fixed
    likelihood: [*] float32 of each chunk, if its budget is chosen: negative log-likelihoods of those of its tokens that
        were looked at, nats; NaN where a token is none of the vocabulary
    waiting: hidden state [hidden_size] of the last token so far, if it is to be looked at
    seconds: what observing took so far
    """

    def __init__(self, req_id: str, method: Method, readers: Readers, auto_budget: AutoBudget | None = None) -> None:
        self.req_id = req_id
        self.method = method
        self.auto_budget = auto_budget
        self.likelihood: list[torch.Tensor] = []
        self.waiting: torch.Tensor | None = None
        traits = traits_of(method.policy)
        self.needs = traits.needs
        self.num_pseudo_tokens = traits.num_pseudo_tokens
        self.queries = LastRows(readers, 0 if method.watches_answer else method.query_window)
        self.outputs = LastRows(readers, method.query_window)
        self.states: list[Any] = [None] * len(readers.numbers)
        self.num_tokens = 0
        self.spans: Spans = ()
        self.seconds = 0.0

    def check_states(self, shape: tuple[int, int], device: torch.device) -> None:
        """Raise ValueError or TypeError unless the policy has summed up [num_kv_heads, num_tokens] of every layer."""
        if Need.ALL_QUERIES in self.needs:
            for state in self.states:
                checked(f"{type(self.method.policy).__name__}.observe", state, shape, device)

    def forget_state(self, layer: int) -> None:
        """What was summed up of a layer that is scored has served, unless evictions go on after the prompt's."""
        if not self.method.schedule.is_bounded:
            self.states[layer] = None

    def take_states(self) -> list[torch.Tensor] | None:
        """Return what the policy has summed up per token in every layer, None if nothing; it is forgotten here."""
        states, self.states = self.states, [None] * len(self.states)
        return states if Need.ALL_QUERIES in self.needs else None


@dataclass(frozen=True)
class LayerPass:
    """A layer whose attention has run over a batch: it reads its own pages, or another's.

    query:   [num_tokens, num_heads, head_size] of the whole batch
    output:  likewise, what attention returned
    scale:   softmax scale
    model:   of which the layer is
    earlier: copies of the queries of the readers of these pages that have run before, once a policy looks at all
    last:    [num_queries, num_heads, head_size], the last queries of those requests that are looked at, by their names:
             those of all readers, once the last of them has run
    """

    pool: PagePool
    reader: Reader
    readers: Readers
    query: torch.Tensor
    output: torch.Tensor
    scale: float
    model: ModelWeights
    earlier: list[torch.Tensor] = field(default_factory=list)
    last: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def layer(self) -> int:
        """Whose pages are read."""
        return self.reader.layer

    @cached_property
    def queries(self) -> torch.Tensor:
        """[num_tokens, num_heads, head_size] of the whole batch, of all readers of these pages; none is missing."""
        return self.readers.joined([*self.earlier, self.query])

    def weights_for(self, request: WatchedRequest) -> LayerWeights:
        """Return what the policy of a request must know of the layer."""
        return self.model.of(self.layer, request.needs)


@dataclass
class BatchRow:
    """One row of a batch: tokens of a request whose queries are looked at.

    start, end: its tokens in the batch
    kv_len:     tokens in the cache behind them
    """

    request: WatchedRequest
    start: int
    end: int
    kv_len: int

    @property
    def req_id(self) -> str:
        return self.request.req_id

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the row's part of [num_tokens, *] of the batch."""
        return tokens[self.start : self.end]


def keep_last(rows: Sequence[BatchRow], ran: LayerPass, ring: QueryRing) -> None:
    """Note the last queries that a layer has seen of each of these rows, and what attention returned for them where a
    policy asks for it. Where other readers of its pages follow, the queries of all tokens are copied if one looks at
    these: the engine uses their memory again.

    ring: which remembers the queries of requests that are watched while they decode, this layer's among them
    """
    remembered = [row for row in rows if row.req_id in ring.slots]
    others = [row for row in rows if row.req_id not in ring.slots]
    number = ran.reader.number
    if others:
        LastRows.extend([row.request.queries for row in others], number, [row.of(ran.query) for row in others])
    asked = [row for row in rows if Need.OUTPUTS in row.request.needs]
    if asked:
        LastRows.extend([row.request.outputs for row in asked], number, [row.of(ran.output) for row in asked])
    if not ran.reader.is_last:
        if any(Need.ALL_QUERIES in row.request.needs for row in rows):
            ran.earlier.append(ran.query.clone())
        return
    ran.last.update((row.req_id, row.request.queries.last(ran.layer)) for row in others)
    if remembered:
        counts = [min(row.request.method.query_window, row.kv_len) for row in remembered]
        facts = np.array([[ring.slots[row.req_id], row.kv_len] for row in remembered], dtype=np.int64).T
        where = to_device(facts, ran.query.device)
        last = ring.last_of(range(ran.layer, ran.layer + 1), where[0], where[1], max(counts))[:, 0]
        ran.last.update(
            (row.req_id, of_row[len(of_row) - count :])
            for row, count, of_row in zip(remembered, counts, last, strict=True)
        )
