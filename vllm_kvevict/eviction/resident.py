"""The same verbs for what earlier evictions have left: while an answer grows, and between the chunks of a prompt.

Such a request holds full pages, the same ones from its first eviction on, and behind them pages that new tokens fill.
Each time it is evicted, every head drops as many tokens as it has new ones in full pages; what survives of these moves
into the slots of what does not, so that they are empty. One that is filled in part stays, to be filled up.

All requests of one method that are due in a step are scored, selected and moved together. What does not fit into the
scratch (``policies/scratch.py``) goes through it in tiles of heads, as prompts do: the order of the tokens of a tile is
found again each time that it is its turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter

import numpy as np
import torch

from vllm_kvevict.cache.marks import Marks, PackedMarks
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.eviction.held_scores import HeldScores
from vllm_kvevict.eviction.layers import scored_at_once
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.protection import Spans, marks_of, raised
from vllm_kvevict.eviction.results import checked
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.eviction.token_order import TokenOrder
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import ScoreBatch, scores_batches
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs, projections_of, sinks_of

Moves = tuple[torch.Tensor, torch.Tensor]


@dataclass
class ResidentEvictions:
    """The evictions of several requests after their first ones, by one method.

    num_tokens:     [num_reqs] tokens that each has
    num_new:        [num_reqs] of these, since its last eviction: they fill the end of its pages; as many in all
                    requests if the policy observes all queries
    page_table:     [num_reqs, num_layers, num_kv_heads, max_pages] int64, full pages, then those of the new tokens,
                    then null pages
    num_pages:      [num_reqs, num_layers, num_kv_heads] int64, pages in use
    num_full_pages: [num_reqs, num_layers, num_kv_heads] int64, of these, the ones that stay; and one more that is
                    filled in part
    per_token:      as in ``EvictionPlan``
    spans:          [num_reqs] what is protected of each beside both ends of its prompt; empty: nothing of any
    seconds:        what scoring, selection and compaction took so far, of all requests together
    next_victims:   [num_reqs, num_layers, num_kv_heads] as in ``Eviction``, once ``compact`` was called, if per_token
    """

    method: Method
    num_tokens: Sequence[int]
    num_new: Sequence[int]
    pool: PagePool
    residents: Residents
    page_table: torch.Tensor
    num_pages: torch.Tensor
    num_full_pages: torch.Tensor
    per_token: bool = False
    spans: Sequence[Spans] = ()
    seconds: float = 0.0
    next_victims: torch.Tensor = field(init=False)
    _sums: HeldScores | None = field(init=False, default=None)
    _scored: set[tuple[int, int]] = field(init=False, default_factory=set)
    _kept: Marks = field(init=False)
    _first_moves: Moves = field(init=False)

    def __post_init__(self) -> None:
        device, block_size = self.page_table.device, self.pool.block_size
        tails = [0 if self.per_token else num_tokens % block_size for num_tokens in self.num_tokens]
        facts = to_device(np.array([self.num_tokens, self.num_new, tails], dtype=np.int64), device)
        num_tokens, num_new, self._num_tail = facts[..., None, None].unbind(0)  # [num_reqs, 1, 1] each
        self._kv_lens = self.num_pages * block_size - -num_tokens % block_size
        pages = self.page_table, self.num_pages, self.num_full_pages
        self._order = TokenOrder(self.pool, self.residents, *pages, num_tokens, num_new, self._num_tail, self._kv_lens)

    @cached_property
    def _scores(self) -> HeldScores:
        return HeldScores.empty(self._order.shape, self.page_table.device)

    def alone(self, req: int) -> ResidentEvictions:
        """Return the eviction of one of the requests, which goes on alone with what has been scored of it so far."""
        only = slice(req, req + 1)
        alone = ResidentEvictions(
            self.method,
            self.num_tokens[only],
            self.num_new[only],
            self.pool,
            self.residents,
            self.page_table[only],
            self.num_pages[only],
            self.num_full_pages[only],
            self.per_token,
            self.spans[only],
        )
        width = self._order.shape[3]
        alone._scores = self._scores.only(req, width)
        alone._sums = None if self._sums is None else self._sums.only(req, width)
        alone._scored = {(0, layer) for scored, layer in self._scored if scored == req}
        return alone

    @property
    def _num_kept(self) -> torch.Tensor:
        return self.num_full_pages * self.pool.block_size + self._num_tail

    def score_layers(
        self,
        layers: range,
        query: torch.Tensor,
        chunk: torch.Tensor,
        scales: Sequence[float],
        weights: Sequence[LayerWeights],
    ) -> None:
        """Score some layers of all requests.

        query:   [num_reqs, num_layers, num_queries, num_heads, head_size] the last queries, at least as many as the
                 policy looks at
        chunk:   [num_reqs, num_layers, num_new, num_heads, head_size] all queries since the last eviction, if it looks
                 at all; else unused
        scales:  softmax scale of each layer
        weights: of each layer
        """
        start = perf_counter()
        if scores_batches(self.method.policy):
            for first, end in self._layers_at_once(scales, weights):
                some, tile = slice(first, end), range(layers.start + first, layers.start + end)
                self._score_together(tile, query[:, some], chunk[:, some], scales[first], weights[some])
        else:
            for place, layer in enumerate(layers):
                slots = self._order.of_layers(range(layer, layer + 1))[:, 0]
                for req in range(len(self.num_tokens)):
                    of_layer = query[req, place], chunk[req, place]
                    self._score_layer_alone(req, layer, slots[req], *of_layer, scales[place], weights[place])
        self._scored |= {(req, layer) for req in range(len(self.num_tokens)) for layer in layers}
        if self._are_all_scored:
            self._choose()
        self.seconds += perf_counter() - start

    @property
    def _are_all_scored(self) -> bool:
        return len(self._scored) == len(self.num_tokens) * self.pool.num_layers

    def _layers_at_once(self, scales: Sequence[float], weights: Sequence[LayerWeights]) -> Iterator[tuple[int, int]]:
        """Yield bounds of layers that are scored together: they have the same scales, and fit into the scratch."""
        per_slot = 2 * self.pool.head_size * self.pool.keys.element_size() + 12
        per_layer = len(self.num_tokens) * self.pool.num_kv_heads * self._order.shape[3] * per_slot
        return scored_at_once(scales, weights, max(scratch.most_bytes() // per_layer, 1))

    def _score_together(
        self, layers: range, query: torch.Tensor, chunk: torch.Tensor, scale: float, weights: Sequence[LayerWeights]
    ) -> None:
        policy, some = self.method.policy, slice(layers.start, layers.stop)
        traits = traits_of(policy)
        slots = self._order.of_layers(layers)
        batch = ScoreBatch(
            query[:, :, max(query.shape[2] - traits.query_window, 0) :],
            *self.pool.in_order(slots),
            self._kv_lens[:, some].contiguous(),
            slots.shape[3],
            scale * weights[0].key_scale,
            weights[0].value_scale,
            key_scale=weights[0].key_scale,
            layers=layers,
            num_kept=self._num_kept[:, some],
            projections=projections_of(weights),
            softcap=weights[0].softcap,
            sinks=sinks_of(weights),
        )
        if Need.ALL_QUERIES in traits.needs:
            num_earlier = self._kv_lens[:, some, :, None] - chunk.shape[2]
            is_earlier = torch.arange(slots.shape[3], device=slots.device) < num_earlier
            earlier = self.residents.sums[slots].masked_fill_(~is_earlier, 0.0)
            observed = policy.observe_batch(replace(batch, query=chunk, state=earlier))
            sums = self._checked("observe_batch", observed, slots)
            self._sums_of_all().put_layers(layers.start, sums)
            batch = replace(batch, state=sums)
        self._scores.put_layers(layers.start, self._checked("score_batch", policy.score_batch(batch), slots))

    def _checked(self, function: str, result: object, slots: torch.Tensor) -> torch.Tensor:
        return checked(f"{type(self.method.policy).__name__}.{function}", result, slots.shape, slots.device)

    def _sums_of_all(self) -> HeldScores:
        if self._sums is None:
            self._sums = HeldScores.empty(self._order.shape, self.page_table.device)
        return self._sums

    def _score_layer_alone(
        self,
        req: int,
        layer: int,
        slots: torch.Tensor,
        query: torch.Tensor,
        chunk: torch.Tensor,
        scale: float,
        weights: LayerWeights,
    ) -> None:
        """Ask a policy that sees one request at a time. Heads that hold equally many tokens are a layer to it.

        slots: [num_kv_heads, num_slots]
        """
        kv_lens = self._kv_lens[req, layer]
        for kv_len in kv_lens.unique().tolist():
            heads = (kv_lens == kv_len).nonzero()[:, 0]
            of_heads = slots[heads, : cdiv(kv_len, self.pool.block_size) * self.pool.block_size]
            inputs = self._inputs(req, layer, of_heads, heads, kv_len, scale, weights)
            queries = (self._of_heads(part, heads) for part in (query, chunk))
            scores = self._score_heads(req, inputs, of_heads, heads, *queries)
            self._scores.put(layer, scores, req, heads)

    def _of_heads(self, query: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        by_kv_head = query.unflatten(1, (self.pool.num_kv_heads, -1))
        of_heads: torch.Tensor = by_kv_head[:, heads].flatten(1, 2)
        return of_heads

    def _inputs(
        self,
        req: int,
        layer: int,
        slots: torch.Tensor,
        heads: torch.Tensor,
        kv_len: int,
        scale: float,
        weights: LayerWeights,
    ) -> ScoreInputs:
        keys, values, page_table = self.pool.in_order(slots)
        if len(heads) < self.pool.num_kv_heads:
            weights = weights.of_heads(heads, self.pool.num_kv_heads)
        return ScoreInputs(
            query=torch.empty(0),
            keys=keys,
            values=values(),
            page_table=page_table,
            kv_len=kv_len,
            scale=scale,
            weights=weights,
            num_kept=int(self._num_kept[req, layer, heads][0]),
            layer=layer,
        )

    def _score_heads(
        self,
        req: int,
        inputs: ScoreInputs,
        slots: torch.Tensor,
        heads: torch.Tensor,
        query: torch.Tensor,
        chunk: torch.Tensor,
    ) -> torch.Tensor:
        policy, shape, device = self.method.policy, (len(heads), inputs.kv_len), self.pool.pages.device
        name, traits = type(policy).__name__, traits_of(policy)
        if Need.ALL_QUERIES in traits.needs:
            earlier = self.residents.sums[slots[:, : inputs.kv_len - len(chunk)]]
            observed = policy.observe(earlier, replace(inputs, query=chunk))
            sums = checked(f"{name}.observe", observed, shape, device)
            self._sums_of_all().put(inputs.layer, sums, req, heads)
            inputs = replace(inputs, state=sums)
        last = query[max(len(query) - traits.query_window, 0) :]
        return checked(f"{name}.score", policy.score(replace(inputs, query=last)), shape, device)

    def _choose(self) -> None:
        """Select what stays, and plan the moves of the first heads: there is memory for those of the others, then."""
        num_kept, kv_lens = self._num_kept.flatten(1), self._kv_lens.flatten(1)
        protection, victims = (self.method.num_sink, self.method.num_recent), []
        shape = *num_kept.shape, self._order.shape[3]
        packed = None if len(self._order.tiles) == 1 else PackedMarks(shape, num_kept.device)
        marks = marks_of(self.spans, self.num_tokens, max(self.num_tokens), num_kept.device)
        for first, end in self._order.tiles:
            scores, lens = self._scores.of_heads(first, end), kv_lens[:, first:end]
            if marks is not None:
                scores = raised(scores, self._marked_in(first, end, marks))
            kept = select(scores, num_kept[:, first:end], *protection, lens)
            if packed is not None:
                packed.put(first, kept)
            if self.per_token:
                protected = protect(scores, *protection, lens)
                lowest = protected.masked_fill_(~kept, float("inf")).argmin(dim=2, keepdim=True)
                slots = self._order.of_heads(first, end)[0].gather(2, lowest)[..., 0]
                victims.append(self.residents.positions[slots].to(torch.int64))
        if victims:
            self.next_victims = torch.cat(victims, dim=1).view_as(self.num_pages)
        self._kept = packed or Marks(kept)
        self._first_moves = self._moves(*self._order.tiles[0])

    def _marked_in(self, first: int, end: int, marks: torch.Tensor) -> torch.Tensor:
        """Return [num_reqs, end - first, num_slots] bool, ``marks`` [num_reqs, num_tokens] in the order of some heads.

        There is no telling behind the tokens of a head.
        """
        positions = self.residents.positions[self._order.of_heads(first, end)[0]].to(torch.int64)
        return marks.gather(1, positions.clamp_(0, marks.shape[1] - 1).flatten(1)).view_as(positions)

    def _moves(self, first: int, end: int) -> Moves:
        """Return where the tokens of some heads move from and to: what is kept fills the slots that stay."""
        (slots, stays), kept = self._order.of_heads(first, end), self._kept.rows(first, end)
        # head by head as many of the ones as of the others
        holes = ~kept & self._order.is_held(first, end) & stays
        return self._marked(slots, kept & ~stays), self._marked(slots, holes)

    def _marked(self, slots: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """Return the slots of some heads that are marked, in order, and -1 behind them: as many as may move."""
        block_size = self.pool.block_size
        most = sum(
            (num_tokens - num_new) % block_size + num_new
            for num_tokens, num_new in zip(self.num_tokens, self.num_new, strict=True)
        )
        place = marks.flatten().nonzero_static(size=most * marks.shape[1])[:, 0]
        return slots.flatten()[place].masked_fill_(place < 0, -1)

    def compact(self) -> None:
        """Move what survives of the pages that go into the slots of what does not. The pool's pages change.

        Raises RuntimeError if a layer was not scored.
        """
        start = perf_counter()
        if not self._are_all_scored:
            raise RuntimeError("some layers of an answer were not scored; nothing was evicted")
        for first, end in self._order.tiles:
            if self._sums is not None:
                slots, sums = self._order.of_heads(first, end)[0], self.residents.sums
                of_heads = self._sums.of_heads(first, end)
                sums[slots] = torch.where(self._order.is_held(first, end), of_heads, sums[slots])
            moves = self._first_moves if first == 0 else self._moves(first, end)
            self.pool.move(*moves)
            self.residents.move(*(slots.clamp(min=0) for slots in moves))  # gaps move the null page's slot to itself
        self.seconds += perf_counter() - start
