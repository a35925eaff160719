"""The same verbs token by token: while an answer grows, each new token takes the slot of the one that goes.

A request that is evicted like this holds full pages whose number never changes. vLLM writes a new token to the block
behind them; layer by layer it moves from there, in every head into the hole that the step before has chosen, before
attention reads it. When all layers have attended, the scores of what their heads hold name the next holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.eviction.layers import scored_at_once
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.protection import Spans, marks_of
from vllm_kvevict.eviction.results import checked
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.inputs import LayerWeights, StepInputs, sinks_of

# what choosing holds of each slot, beside its policy's scores: its position, and what those are compared with
_BYTES_PER_SLOT = 32


@dataclass(frozen=True)
class Peers:
    """Requests that one method evicts from together.

    slots:      [num_reqs] int64, their rows of the page table
    ring_slots: [num_reqs] int64, where their last queries are; -1 if the policy looks at none
    max_pages:  most pages that a head of a layer holds
    marks:      [num_reqs, num_positions] bool, which tokens are protected beside both ends of a prompt, and none of the
                last position, which stands for all that follow; None: of no request any
    """

    method: Method
    req_ids: list[str]
    slots: torch.Tensor
    ring_slots: torch.Tensor
    max_pages: int
    marks: torch.Tensor | None = None


@dataclass(frozen=True)
class Replacement:
    """One step of some peers, each of which has one new token.

    num_tokens: [num_reqs] int64, the new token included
    max_tokens: the most of these, or more
    written:    [num_layers, num_kv_heads, num_reqs] int64 slots of the pool that vLLM writes the new tokens to
    holes:      likewise, where they go from there
    """

    peers: Peers
    num_tokens: torch.Tensor
    max_tokens: int
    written: torch.Tensor
    holes: torch.Tensor


class TokenEvictor:
    """Knows the next hole of every head of every request that is evicted token by token.

    Memory: while it chooses, the scratch of scoring.
    """

    def __init__(
        self, pool: PagePool, page_table: PageTable, residents: Residents, ring: QueryRing, holes: torch.Tensor
    ) -> None:
        """holes: [max_num_reqs, num_layers, num_kv_heads] int64, memory for them, by the slots of the page table"""
        self._pool, self._page_table, self._residents, self._ring = pool, page_table, residents, ring
        self._holes = holes

    @property
    def block_size(self) -> int:
        return self._pool.block_size

    def open_holes(self, req_ids: list[str], victims: torch.Tensor) -> None:
        """The first evictions of some requests are done, and their residents are noted.

        victims: [num_reqs, num_layers, num_kv_heads] int64, positions of the tokens that go first
        """
        slots = self._staged([self._page_table.slots[req_id] for req_id in req_ids])
        pages, positions = self._held(range(self._pool.num_layers), slots, self._page_table.most_pages(req_ids))
        is_victim = positions == victims[..., None]
        self._holes[slots] = self._slots_of(pages, is_victim.int().argmax(dim=-1, keepdim=True))

    def peers(self, method: Method, req_ids: list[str], spans: Sequence[Spans] = ()) -> Peers:
        """Return what does not change from step to step of these requests.

        spans: of each, what is protected beside both ends of its prompt; empty: nothing of any
        """
        slots = [self._page_table.slots[req_id] for req_id in req_ids]
        ring_slots = [self._ring.slots.get(req_id) for req_id in req_ids]
        most_pages = self._page_table.most_pages(req_ids)
        most = max((end for of_request in spans for _, end in of_request), default=0)
        marks = marks_of(spans, [most] * len(spans), most + 1, self._holes.device)
        return Peers(method, req_ids, self._staged(slots), self._staged(ring_slots), most_pages, marks)

    def _staged(self, slots: list[int]) -> torch.Tensor:
        return to_device(np.array(slots, dtype=np.int64), self._holes.device)

    def prepare(self, peers: Peers, num_tokens: torch.Tensor, max_tokens: int, blocks: torch.Tensor) -> Replacement:
        """Return a step, and note which tokens the holes will hold.

        num_tokens, max_tokens: as in ``Replacement``
        blocks:                 [num_reqs] int64, the last block of each request
        """
        block_size = self.block_size
        written = self._pool.page_ids(blocks) * block_size + (num_tokens - 1) % block_size
        holes = self._holes[peers.slots].permute(1, 2, 0).contiguous()
        self._residents.positions[holes] = (num_tokens - 1).to(torch.int32)
        if Need.ALL_QUERIES in traits_of(peers.method.policy).needs:
            self._residents.sums[holes] = 0.0
        return Replacement(peers, num_tokens, max_tokens, written, holes)

    def fill_holes(self, layer: int, step: Replacement) -> None:
        """Move the new tokens of one layer, which vLLM has written, into the holes. The pool's pages change."""
        self._pool.move(step.written[layer].flatten(), step.holes[layer].flatten())

    def choose_holes(self, step: Replacement, scales: Sequence[float], weights: Sequence[LayerWeights]) -> None:
        """Score what the heads hold, and choose the next holes. The newest queries are in the ring.

        scales:  softmax scale of each layer
        weights: of each layer
        """
        needs = traits_of(step.peers.method.policy).needs
        most = self._layers_at_once(step) if needs <= {Need.ALL_QUERIES} else 1  # else each has weights of its own
        for first, end in scored_at_once(scales, weights, most, self._ring.readers.counts):
            self._choose(range(first, end), step, scales[first], weights[first:end])

    def _layers_at_once(self, step: Replacement) -> int:
        """Return how many layers fit into the scratch, at least 1."""
        of_slots = _BYTES_PER_SLOT * self._pool.num_kv_heads * step.peers.max_pages * self.block_size
        of_query = self._ring.bytes_per_query * max(self._ring.readers.counts)
        of_queries = of_query * self._num_queries(step.peers)
        of_tokens = 4 * step.max_tokens  # sums over heads
        return max(scratch.most_bytes() // (len(step.peers.slots) * (of_slots + of_queries + of_tokens)), 1)

    def _num_queries(self, peers: Peers) -> int:
        traits = traits_of(peers.method.policy)
        return max(traits.query_window, int(Need.ALL_QUERIES in traits.needs))

    def _choose(self, layers: range, step: Replacement, scale: float, weights: Sequence[LayerWeights]) -> None:
        peers, method, policy = step.peers, step.peers.method, step.peers.method.policy
        pages, positions = self._held(layers, peers.slots, peers.max_pages)
        queries = self._ring.last_of(layers, peers.ring_slots, step.num_tokens, self._num_queries(peers))
        num_tokens = step.num_tokens[:, None].expand(-1, len(layers)).flatten()
        observes = Need.ALL_QUERIES in traits_of(policy).needs
        sums = self._residents.sums.view(-1, self.block_size) if observes else None
        keys, _, page_table = self._pool.readable(pages.flatten(0, 1))
        sinks = sinks_of(weights)
        inputs = StepInputs(
            queries.flatten(0, 1),
            keys,
            page_table,
            positions.flatten(0, 1),
            num_tokens,
            step.max_tokens,
            scale,
            weights[0],
            None if sums is None else sums[pages].flatten(0, 1).flatten(2),
            None if sinks is None else sinks.repeat(len(peers.slots), 1),
        )
        source = f"{type(policy).__name__}.score_step"
        scores = checked(source, policy.score_step(inputs), inputs.positions.shape, positions.device)
        if sums is not None:
            # page 0, which stands behind those of shorter heads, keeps its own
            sums[pages] = torch.where(inputs.is_held, scores, inputs.state).view(*pages.shape, -1)
        recent = (num_tokens - method.num_recent)[:, None, None]
        # what is not held has position -1, and is no candidate either
        is_candidate = (inputs.positions >= method.num_sink) & (inputs.positions < recent)
        if peers.marks is not None:
            where = inputs.positions.clamp(0, peers.marks.shape[1] - 1)
            is_candidate &= ~peers.marks.repeat_interleave(len(layers), 0).gather(1, where.flatten(1)).view_as(where)
        candidates = torch.where(is_candidate, torch.nan_to_num(scores, nan=-torch.inf), torch.inf)
        places = candidates.argmin(dim=2, keepdim=True).view(*pages.shape[:3], 1)
        self._holes[peers.slots, layers.start : layers.stop] = self._slots_of(pages, places)

    def _held(self, layers: range, rows: torch.Tensor, max_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pages [num_reqs, num_layers, num_kv_heads, max_pages] int64 of some layers, and which token is in
        each of their slots [num_reqs, num_layers, num_kv_heads, max_pages * block_size] int64: its position, -1 behind
        the last page of a head.

        rows: [num_reqs] int64 of the page table
        """
        pages, num_pages = self._page_table.layer_rows(layers, rows, max_pages)
        is_held = torch.arange(max_pages, device=pages.device) < num_pages[..., None]
        positions = self._residents.positions.view(-1, self.block_size)[pages].to(torch.int64)
        return pages, positions.masked_fill_(~is_held[..., None], -1).flatten(3)

    def _slots_of(self, pages: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads] int64, the slots of the pool that stand at ``places`` of pages.

        pages:  [num_reqs, num_layers, num_kv_heads, max_pages] int64
        places: [num_reqs, num_layers, num_kv_heads, 1] int64, page by page
        """
        page = pages.gather(3, torch.div(places, self.block_size, rounding_mode="floor"))
        return (page * self.block_size + places.remainder(self.block_size))[..., 0]
