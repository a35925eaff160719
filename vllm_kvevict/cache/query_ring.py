"""The last queries of requests that evict while they decode, in memory whose addresses never change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_kvevict.cache.request_slots import RequestSlots
from vllm_kvevict.cache.staging import to_device


@dataclass(frozen=True)
class RingWrite:
    """Which queries of a batch are to be remembered, and where.

    rows:   [num_queries] int64 of the batch, those of requests that have a slot
    tokens: [num_queries] int64 into the batch, the last query of each of them
    slots:  [num_queries] int64, the slot of each query's request
    places: [num_queries] int64, its place in the ring of the request
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor


class QueryRing:
    """The last ``depth`` queries of each request in every layer; the query of position p has place p % depth."""

    def __init__(self, queries: torch.Tensor) -> None:
        """queries: [num_layers, max_num_reqs, depth, num_heads, head_size], where they are remembered."""
        self._queries = queries
        self.slots = RequestSlots(queries.shape[1])
        self.depth = queries.shape[2]
        # the last batch, by the slots of its requests and where its queries began
        self._known: tuple[np.ndarray, np.ndarray, RingWrite] | None = None

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
            rows = np.flatnonzero(slots >= 0)
            if not len(rows):
                return None
            tokens = query_start_loc[1:][rows].astype(np.int64) - 1
            parts = [to_device(part, self._queries.device) for part in (rows, tokens, slots[rows].astype(np.int64))]
            self._known = slots, query_start_loc.copy(), RingWrite(parts[0], parts[1], parts[2], places=parts[0])
        where = self._known[2]
        return replace(where, places=(seq_lens.to(torch.int64)[where.rows] - 1) % self.depth)

    def write(self, layer: int, queries: torch.Tensor, where: RingWrite) -> None:
        """Remember those queries of one layer's [num_tokens, num_heads, head_size] that ``where`` names."""
        self._queries[layer, where.slots, where.places] = queries[where.tokens]

    def to_seed(self, req_ids: Sequence[str], num_tokens: Sequence[int], num_queries: Sequence[int]) -> RingWrite:
        """Return how the last ``num_queries`` of each request's ``num_tokens`` tokens are remembered, where all of
        them stand in a row: for requests whose queries are asked for from now on.
        """
        positions = [np.arange(end - count, end) for end, count in zip(num_tokens, num_queries, strict=True)]
        slots = np.array([self.slots[req_id] for req_id in req_ids]).repeat(num_queries)
        places = np.concatenate(positions) % self.depth
        tokens, slots_on_device, places_on_device = to_device(
            np.stack([np.arange(len(places)), slots, places]), self._queries.device
        ).unbind(0)
        return RingWrite(tokens, tokens, slots_on_device, places_on_device)

    @property
    def bytes_per_query(self) -> int:
        """Bytes of one query of all heads."""
        return self._queries.shape[3:].numel() * self._queries.element_size()

    def last_of(self, layers: range, slots: torch.Tensor, num_tokens: torch.Tensor, num_queries: int) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_queries, num_heads, head_size], the last queries of several requests in
        some layers.

        slots:       [num_reqs] int64
        num_tokens:  [num_reqs] int64, tokens of each request, the last one being that of its newest query
        num_queries: at most the depth; 0 for none, of requests that need not have a slot
        """
        if num_queries == 0:
            return torch.empty(len(slots), len(layers), 0, 0, 0)
        positions = num_tokens[:, None, None] + torch.arange(-num_queries, 0, device=slots.device)
        layer = torch.arange(layers.start, layers.stop, device=slots.device)
        return self._queries[layer[:, None], slots[:, None, None], positions % self.depth]
