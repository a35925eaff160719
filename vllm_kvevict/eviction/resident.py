"""The same verbs for what earlier evictions have left: while an answer grows, and between the chunks of a prompt.

Such a request holds full pages, the same ones from its first eviction on, and behind them pages that new tokens fill.
Each time it is evicted, every head drops as many tokens as it has new ones in full pages; what survives of these moves
into the slots of what does not, so that they are empty. One that is filled in part stays, to be filled up.

All requests of one method that are due in a step are scored, selected and moved together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
import torch

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.results import checked
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies.base import LayerWeights, Need, ScoreInputs
from vllm_kvevict.policies.batch import ScoreBatch, scored_at_once, scores_batches

# Elements of keys, values and scores that are held at once while several layers are scored.
_MAX_SCRATCH = 1 << 25


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
    seconds: float = 0.0
    next_victims: torch.Tensor = field(init=False)
    _slots: torch.Tensor = field(init=False)
    _stays: torch.Tensor = field(init=False)
    _scores: torch.Tensor = field(init=False)
    _sums: torch.Tensor | None = field(init=False, default=None)
    _scored: set[tuple[int, int]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        """Put the slots of every head into the order of their tokens; slots that hold none come last."""
        start = perf_counter()
        device, block_size = self.page_table.device, self.pool.block_size
        tails = [0 if self.per_token else num_tokens % block_size for num_tokens in self.num_tokens]
        facts = to_device(np.array([self.num_tokens, self.num_new, tails], dtype=np.int64), device)
        num_tokens, num_new, self._num_tail = facts[..., None, None].unbind(0)  # [num_reqs, 1, 1] each
        self._kv_lens = self.num_pages * block_size - -num_tokens % block_size
        slots = (self.page_table[..., None] * block_size + torch.arange(block_size, device=device)).flatten(3)
        place = torch.arange(slots.shape[3], device=device)
        kv_lens = self._kv_lens[..., None]
        is_new = (place < kv_lens) & (place >= kv_lens - num_new[..., None])
        positions = self.residents.positions
        # all slots are written, those of no new token with what they have
        new_positions = (num_tokens[..., None] - kv_lens + place).to(torch.int32)
        known = torch.where(is_new, new_positions, positions[slots])
        positions[slots] = known
        order = known.masked_fill_(place >= kv_lens, torch.iinfo(torch.int32).max).argsort(dim=-1)
        page = place // block_size
        is_tail = (page == self.num_pages[..., None] - 1) & (self._num_tail[..., None] > 0)
        stays = (page < self.num_full_pages[..., None]) | is_tail
        self._slots, self._stays = slots.gather(3, order), stays.gather(3, order)
        self._scores = torch.empty(slots.shape, dtype=torch.float32, device=device)
        self.seconds += perf_counter() - start

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
        )
        alone._scores, alone._sums = self._scores[only], None if self._sums is None else self._sums[only]
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
        if scores_batches(type(self.method.policy)):
            for first, end in self._tiles(scales, weights):
                some, weight = slice(first, end), weights[first]
                tile = range(layers.start + first, layers.start + end)
                self._score_together(tile, query[:, some], chunk[:, some], scales[first], weight)
        else:
            for req in range(len(self.num_tokens)):
                for place, layer in enumerate(layers):
                    of_layer = query[req, place], chunk[req, place]
                    self._score_layer_alone(req, layer, *of_layer, scales[place], weights[place])
        self._scored |= {(req, layer) for req in range(len(self.num_tokens)) for layer in layers}
        self.seconds += perf_counter() - start

    def _tiles(self, scales: Sequence[float], weights: Sequence[LayerWeights]) -> Iterator[tuple[int, int]]:
        """Yield bounds of layers that are scored together: they have the same scales, and fit into the scratch."""
        kinds = [(scale, weight.key_scale, weight.value_scale) for scale, weight in zip(scales, weights, strict=True)]
        per_layer = self._slots[:, 0].numel() * (2 * self.pool.head_size + 4)
        return scored_at_once(kinds, max(_MAX_SCRATCH // per_layer, 1))

    def _score_together(
        self, layers: range, query: torch.Tensor, chunk: torch.Tensor, scale: float, weights: LayerWeights
    ) -> None:
        policy, some = self.method.policy, slice(layers.start, layers.stop)
        traits = traits_of(policy)
        slots = self._slots[:, some]
        batch = ScoreBatch(
            query[:, :, max(query.shape[2] - traits.query_window, 0) :],
            *self.pool.in_order(slots),
            self._kv_lens[:, some].contiguous(),
            slots.shape[3],
            scale * weights.key_scale,
            weights.value_scale,
        )
        if Need.ALL_QUERIES in traits.needs:
            num_earlier = self._kv_lens[:, some, :, None] - chunk.shape[2]
            is_earlier = torch.arange(slots.shape[3], device=slots.device) < num_earlier
            earlier = self.residents.sums[slots].masked_fill_(~is_earlier, 0.0)
            observed = policy.observe_batch(replace(batch, query=chunk, state=earlier))
            sums = self._checked("observe_batch", observed, slots)
            self._sums_of_all()[:, some] = sums
            batch = replace(batch, state=sums)
        self._scores[:, some] = self._checked("score_batch", policy.score_batch(batch), slots)

    def _checked(self, function: str, result: object, slots: torch.Tensor) -> torch.Tensor:
        return checked(f"{type(self.method.policy).__name__}.{function}", result, slots.shape, slots.device)

    def _sums_of_all(self) -> torch.Tensor:
        if self._sums is None:
            self._sums = torch.zeros_like(self._scores)
        return self._sums

    def _score_layer_alone(
        self, req: int, layer: int, query: torch.Tensor, chunk: torch.Tensor, scale: float, weights: LayerWeights
    ) -> None:
        """Ask a policy that sees one request at a time. Heads that hold equally many tokens are a layer to it."""
        kv_lens = self._kv_lens[req, layer]
        for kv_len in kv_lens.unique().tolist():
            heads = (kv_lens == kv_len).nonzero()[:, 0]
            inputs = self._inputs(req, layer, heads, kv_len, scale, weights)
            of_heads = (self._of_heads(queries, heads) for queries in (query, chunk))
            self._scores[req, layer, heads, :kv_len] = self._score_heads(req, inputs, heads, *of_heads)

    def _of_heads(self, query: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        by_kv_head = query.unflatten(1, (self.pool.num_kv_heads, -1))
        of_heads: torch.Tensor = by_kv_head[:, heads].flatten(1, 2)
        return of_heads

    def _inputs(
        self, req: int, layer: int, heads: torch.Tensor, kv_len: int, scale: float, weights: LayerWeights
    ) -> ScoreInputs:
        slots = self._slots[req, layer, heads, : cdiv(kv_len, self.pool.block_size) * self.pool.block_size]
        shape = (-1, self.pool.block_size, self.pool.head_size)
        keys, values = (kv.reshape(shape) for kv in self.pool.gather(slots))
        projection = weights.output_projection
        if projection is not None and len(heads) < self.pool.num_kv_heads:
            projection = projection.unflatten(1, (self.pool.num_kv_heads, -1))[:, heads].flatten(1)
        return ScoreInputs(
            query=torch.empty(0),
            keys=keys,
            values=values,
            page_table=torch.arange(len(keys), device=slots.device).reshape(len(heads), -1),
            kv_len=kv_len,
            scale=scale,
            weights=replace(weights, output_projection=projection),
            num_kept=int(self._num_kept[req, layer, heads][0]),
            layer=layer,
        )

    def _score_heads(
        self, req: int, inputs: ScoreInputs, heads: torch.Tensor, query: torch.Tensor, chunk: torch.Tensor
    ) -> torch.Tensor:
        policy, shape, device = self.method.policy, (len(heads), inputs.kv_len), self.pool.pages.device
        name, traits = type(policy).__name__, traits_of(policy)
        if Need.ALL_QUERIES in traits.needs:
            slots = self._slots[req, inputs.layer, heads, : inputs.kv_len - len(chunk)]
            observed = policy.observe(self.residents.sums[slots], replace(inputs, query=chunk))
            sums = checked(f"{name}.observe", observed, shape, device)
            self._sums_of_all()[req, inputs.layer, heads, : inputs.kv_len] = sums
            inputs = replace(inputs, state=sums)
        last = query[max(len(query) - traits.query_window, 0) :]
        return checked(f"{name}.score", policy.score(replace(inputs, query=last)), shape, device)

    def compact(self) -> None:
        """Move what survives of the pages that go into the slots of what does not. The pool's pages change.

        Raises RuntimeError if a layer was not scored.
        """
        start = perf_counter()
        if len(self._scored) < len(self.num_tokens) * self.pool.num_layers:
            raise RuntimeError("some layers of an answer were not scored; nothing was evicted")
        protection = self.method.num_sink, self.method.num_recent
        kept = select(self._scores, self._num_kept, *protection, self._kv_lens)
        if self.per_token:
            protected = protect(self._scores, *protection, self._kv_lens)
            lowest = protected.masked_fill_(~kept, float("inf")).argmin(dim=3, keepdim=True)
            victims = self._slots.gather(3, lowest)[..., 0]
            self.next_victims = self.residents.positions[victims].to(torch.int64)
        is_held = torch.arange(kept.shape[3], device=kept.device) < self._kv_lens[..., None]
        if self._sums is not None:
            sums = self.residents.sums
            sums[self._slots] = torch.where(is_held, self._sums, sums[self._slots])
        # head by head as many of the ones as of the others: what is kept fills the slots that stay
        moves = self._marked(kept & ~self._stays), self._marked(~kept & is_held & self._stays)
        self.pool.move(*moves)
        self.residents.move(*(slots.clamp(min=0) for slots in moves))  # gaps move the null page's first slot to itself
        self.seconds += perf_counter() - start

    def _marked(self, marks: torch.Tensor) -> torch.Tensor:
        """Return the slots that are marked, in order, and -1 behind them: as many as may move."""
        block_size, heads = self.pool.block_size, self.pool.num_layers * self.pool.num_kv_heads
        most = sum(
            (num_tokens - num_new) % block_size + num_new
            for num_tokens, num_new in zip(self.num_tokens, self.num_new, strict=True)
        )
        place = marks.flatten().nonzero_static(size=most * heads)[:, 0]
        return self._slots.flatten()[place].masked_fill_(place < 0, -1)


class ResidentEviction:
    """One request's eviction after its first one: ``ResidentEvictions`` of a single request.

    num_tokens: tokens it has
    num_new:    of these, since the last eviction
    page_table: [num_layers, num_kv_heads, max_pages] int64; the other tables likewise without requests
    """

    def __init__(
        self,
        method: Method,
        num_tokens: int,
        num_new: int,
        pool: PagePool,
        residents: Residents,
        page_table: torch.Tensor,
        num_pages: torch.Tensor,
        num_full_pages: torch.Tensor,
        per_token: bool = False,
    ) -> None:
        self.num_tokens, self.per_token = num_tokens, per_token
        self._batch = ResidentEvictions(
            method,
            [num_tokens],
            [num_new],
            pool,
            residents,
            page_table[None],
            num_pages[None],
            num_full_pages[None],
            per_token,
        )

    @property
    def seconds(self) -> float:
        """What scoring, selection and compaction took so far."""
        return self._batch.seconds

    @property
    def next_victims(self) -> torch.Tensor:
        """As in ``Eviction``, once ``compact`` was called."""
        return self._batch.next_victims[0]

    def score_layer(
        self,
        layer: int,
        query: torch.Tensor,
        chunk: torch.Tensor,
        scale: float,
        weights: LayerWeights | None = None,
    ) -> None:
        """Score one layer.

        query: [num_queries, num_heads, head_size] the last queries, at least as many as the policy looks at
        chunk: [num_new, num_heads, head_size] all queries since the last eviction, if it looks at all; else unused
        """
        of_layer = range(layer, layer + 1)
        self._batch.score_layers(of_layer, query[None, None], chunk[None, None], [scale], [weights or LayerWeights()])

    def compact(self) -> None:
        """Select, and move what survives of the pages that go."""
        self._batch.compact()
