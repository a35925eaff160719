"""The last queries of requests that evict while they decode, in memory whose addresses never change."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_kvevict.cache.readers import Readers
from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.cache.staging import to_device


@dataclass(frozen=True)
class RingWrite:
    """Which queries of a batch are to be remembered, and where.

    rows:   [num_queries] int64 of the batch, those of requests that have a slot, each as often as it has queries
    tokens: [num_queries] int64 into the batch, the last queries of each of them
    slots:  [num_queries] int64, the slot of each query's request
    places: [num_queries] int64, its place in the ring of the request
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor


class QueryRing:
    """The last ``depth`` queries of each request in every layer; the query of position p has place p % depth.

    Of a layer whose pages several read, the queries of all readers are remembered, and returned as ``Readers.joined``.
    """

    def __init__(self, queries: torch.Tensor, readers: Readers | None = None) -> None:
        """queries: [num_readers, max_num_reqs, depth, num_heads, head_size], where they are remembered
        readers: None: each layer is the only one that reads its pages"""
        self._queries = queries
        self.readers = Readers.of_own_pages(len(queries)) if readers is None else readers
        self.slots = RequestSlots(queries.shape[1])
        self.depth = queries.shape[2]
        # the last batch, by the slots of its requests and where its queries began; and how far each query that is to be
        # remembered stands from the last one of its request
        self._known: tuple[np.ndarray, np.ndarray, RingWrite, torch.Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that the queries take."""
        return self._queries.nbytes

    def to_write(self, req_ids: list[str], query_start_loc: np.ndarray, seq_lens: torch.Tensor) -> RingWrite | None:
        """Return what a batch has to remember, None if it is nothing.

        req_ids:         [num_reqs]
        query_start_loc: [num_reqs + 1], where the queries of each request begin
        seq_lens:        [num_reqs] on the device, tokens in the cache, the batch's included
        """
        if not len(self.slots):
            return None
        slots = self.slots.of(req_ids)
        if self._known is None or self._known[0] is not slots or not np.array_equal(self._known[1], query_start_loc):
            asked = np.flatnonzero(slots >= 0)
            if not len(asked):
                return None
            counts = np.minimum(np.diff(query_start_loc)[asked], self.depth)
            rows = asked.repeat(counts)
            from_last = counts.cumsum().repeat(counts) - np.arange(len(rows)) - 1
            tokens = query_start_loc[1:][rows] - 1 - from_last
            facts = np.stack([rows, tokens, slots[rows], from_last]).astype(np.int64)
            on_device = to_device(facts, self._queries.device).unbind(0)
            where = RingWrite(on_device[0], on_device[1], on_device[2], places=on_device[0])
            self._known = slots, query_start_loc.copy(), where, on_device[3]
        _, _, where, behind = self._known
        return replace(where, places=(seq_lens.to(torch.int64)[where.rows] - 1 - behind) % self.depth)

    def write(self, reader: int, queries: torch.Tensor, where: RingWrite) -> None:
        """Remember those queries of one reader's [num_tokens, num_heads, head_size] that ``where`` names."""
        self._queries[reader, where.slots, where.places] = queries[where.tokens]

    @property
    def bytes_per_query(self) -> int:
        """Bytes of one query of all heads of a reader."""
        return self._queries.shape[3:].numel() * self._queries.element_size()

    def none_of(self, num_reqs: int, layers: range) -> torch.Tensor:
        """Return [num_reqs, num_layers, 0, num_heads, head_size]."""
        return self._queries.new_empty(num_reqs, len(layers), 0, *self._queries.shape[3:])

    def last_of(self, layers: range, slots: torch.Tensor, num_tokens: torch.Tensor, num_queries: int) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_queries, num_heads, head_size], the last queries of several requests in
        some layers; several of them have equally many readers.

        slots:       [num_reqs] int64
        num_tokens:  [num_reqs] int64, tokens of each request, the last one being that of its newest query
        num_queries: at most the depth; 0 for none, of requests that need not have a slot
        """
        if num_queries == 0:
            return self.none_of(len(slots), layers)
        positions = num_tokens[:, None, None] + torch.arange(-num_queries, 0, device=slots.device)
        first = torch.arange(layers.start, layers.stop, device=slots.device)
        places = positions % self.depth
        own = self._queries[first[:, None], slots[:, None, None], places]
        numbers = [self.readers.numbers[layer] for layer in layers]
        if len(numbers[0]) == 1:
            return own
        shared = [
            torch.stack([self._queries[number, slots[:, None], places[:, 0]] for number in of_layers], dim=1)
            for of_layers in zip(*(others for _, *others in numbers), strict=True)
        ]
        return self.readers.joined([own, *shared])
