"""The five verbs of an eviction, in order: score -> allocate -> select -> compact -> free.  READ THIS FIRST.

*Score* happens layer by layer while the last chunk of a prompt passes (``Evictions.score_layer``, called from the
attention backend); *allocate* and *select* once after the last layer (``Evictions.choose``), and then *compact*
(``Evictions.compact``), in which nobody else's code has a part; *free* is vLLM's own: its scheduler returns the blocks
to its pool in which nothing of the request lives any more.

Prompts of one method that end in one step go through the verbs together: what is launched for them does not depend on
how many they are. The host waits for the device once, whatever the methods: what it must know to *allocate* is made on
the device (``Evictions.summarise``), and copied for all that are evicted in the step. Policies and allocators that
see one request at a time, as a third party's may, are asked for each of them.

Prompts may be so long that what these verbs work on does not fit into the scratch (``policies/scratch.py``). Then all
of them go through it in tiles of layers or heads: scores wait on the host for the last layer, of what was chosen a bit
is kept for each token, and moves are planned again for each tile when it is its turn. No result depends on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any
from weakref import ProxyType, proxy

import torch

from vllm_kvevict.cache.compaction import Compaction, Compactions, KeptPages, bytes_of_heads
from vllm_kvevict.cache.marks import Marks, PackedMarks
from vllm_kvevict.cache.pages import BlockPages, PagePool
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.eviction.allocation import Allocation
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.observer import Choice, is_observed, show
from vllm_kvevict.eviction.protection import Spans, marks_of, raised
from vllm_kvevict.eviction.scoring import PromptScores
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.inputs import LayerWeights

# What is held at once by each score of which the best are selected, and by each slot that is noted.
_BYTES_PER_SCORE, _BYTES_PER_SLOT = 16, 28
_BYTES_PER_RAISED = 4  # beside that, where some tokens are protected that stand between others


@dataclass
class Eviction:
    """One request's eviction, from its first scored layer to its compacted cache.

    It is evicted by its own methods, or as one of several ``Evictions``.

    block_ids:       [num_blocks] int64, the request's block table
    fresh_block_ids: [num_full_blocks] int64, where the kept tokens go; None for the last blocks of the prompt
    spans:           what is protected beside both ends of the prompt
    seconds:         what observing, scoring, allocation, selection and compaction took so far; of what is done for
                     several requests together, an equal part
    next_victims:    [num_layers, num_kv_heads] int64, positions of the lowest scores that were kept: the next tokens to
                     go, if from now on each new token takes the slot of one that goes
    are_known:       [] bool, whether all tokens that pseudo tokens see are the prompt's, once a layer is preselected
    """

    method: Method
    plan: EvictionPlan
    pool: PagePool
    block_ids: torch.Tensor
    fresh_block_ids: torch.Tensor | None = None
    spans: Spans = ()
    seconds: float = 0.0
    next_victims: torch.Tensor | None = None
    are_known: torch.Tensor | None = field(init=False, default=None)
    _shown: Choice | None = field(init=False, default=None)
    _alone: Evictions | None = field(init=False, default=None)

    @property
    def alone(self) -> Evictions:
        """The ``Evictions`` of this request only."""
        if self._alone is None:
            self._alone = Evictions([proxy(self)])  # in a circle scores would stay until Python looks for circles
        return self._alone

    @property
    def is_scored_on_host(self) -> bool:
        """Whether there are scores of this request only that wait on the host."""
        return self._alone is not None and self._alone.are_on_host

    def go_on(self, alone: Evictions) -> None:
        """Go on with what was seen of this request together with others."""
        self._alone = alone

    def show_chosen(self, choice: Choice) -> None:
        """Let those see it who look on."""
        self._shown = choice
        show(lambda observer: observer.chosen(choice))

    def show_compacted(self, compaction: Compaction) -> None:
        """Let those see it who have seen what was chosen."""
        if (choice := self._shown) is not None:
            show(lambda observer: observer.compacted(choice, compaction, self.seconds))

    @property
    def full_block_ids(self) -> torch.Tensor:
        """[plan.num_full_blocks] int64, the blocks whose pages are kept full."""
        if self.fresh_block_ids is not None:
            return self.fresh_block_ids
        first = self.plan.first_kept_block
        return self.block_ids[first : first + self.plan.num_full_blocks]

    def preselect_layer(
        self, layer: int, query: torch.Tensor, scale: float, weights: LayerWeights | None = None
    ) -> torch.Tensor:
        """Return [num_kv_heads, num_tokens] int64, the slots of the tokens of one layer that pseudo tokens see.

        Where the policy has named tokens that the prompt does not have, others stand in: ``are_known`` says so.

        query, weights: as for ``score_layer``
        """
        return self.alone.preselect_layer(layer, [query], scale, weights)[0]

    def score_layer(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        output: torch.Tensor | None = None,
        weights: LayerWeights | None = None,
        state: Any = None,
        pseudo_query: torch.Tensor | None = None,
    ) -> None:
        """Score one layer whose keys and values are in the cache, now or together with the next ones.

        The arguments are as in ``ScoreInputs`` and must stay as they are; query: the last ones that the policy and the
        allocator need
        """
        self.alone.score_layer(layer, [query], scale, [output], weights, [state], [pseudo_query])

    def score_waiting(self) -> None:
        """Score now what waits for the next layers."""
        self.alone.score_waiting()

    def adopt(self, plan: EvictionPlan) -> None:
        """Go on with a plan that keeps fewer blocks, of the same prompt."""
        self.plan = plan
        if self.fresh_block_ids is not None:
            self.fresh_block_ids = self.fresh_block_ids[len(self.fresh_block_ids) - plan.num_full_blocks :]

    def finish(self) -> Compaction:
        """``choose``, and then ``compact``."""
        self.choose()
        return self.compact()

    def choose(self) -> None:
        """Allocate and select: the last that a policy or an allocator has a part in. Nothing moves.

        Raises RuntimeError if a layer was not scored, and whatever they raise; ValueError or TypeError if they return
        what is none of an answer.
        """
        self.alone.choose()

    def compact(self) -> Compaction:
        """Move what was chosen. The pool's pages change; the caller puts the result in its page table."""
        return self.alone.compact()[0]


class Evictions:
    """The first evictions of several requests by one method, whose prompts end in one step.

    members: in order; all of them in place, or all of them into fresh blocks, and alike in ``per_token``
    """

    def __init__(self, members: Sequence[Eviction], scores: PromptScores | None = None) -> None:
        self.members = list(members)
        self._method, self._pool = members[0].method, members[0].pool
        if scores is None:
            pages = self._pool.pages_of_each([eviction.block_ids for eviction in members])
            scores = PromptScores(self._method, self._pool, [eviction.plan for eviction in members], pages)
        self._scores = scores
        self._allocation: Allocation | None = None
        self._compactions: Compactions

    @property
    def are_on_host(self) -> bool:
        """Whether there are scores that wait on the host."""
        return self._scores.are_on_host

    def break_up(self) -> None:
        """Let each member go on alone, by its own methods, with what has been seen and scored so far."""
        for req, eviction in enumerate(self.members):
            if not isinstance(eviction, ProxyType):  # which is alone already
                eviction.go_on(Evictions([proxy(eviction)], self._scores.only(req)))

    @classmethod
    def joined(cls, evictions: Sequence[Eviction]) -> Evictions:
        """Return evictions together that went on alone, with what each has seen and scored."""
        if len(evictions) == 1:
            return evictions[0].alone
        joined = cls(evictions)
        for req, eviction in enumerate(evictions):
            joined._scores.take(req, eviction.alone._scores)
        return joined

    def _took(self, start: float) -> None:
        for eviction in self.members:
            eviction.seconds += (perf_counter() - start) / len(self.members)

    def preselect_layer(
        self, layer: int, query: Sequence[torch.Tensor], scale: float, weights: LayerWeights | None = None
    ) -> torch.Tensor:
        """``Eviction.preselect_layer`` for all members: [num_reqs, num_kv_heads, num_tokens] int64, -1 behind those of
        a member that has fewer.
        """
        start = perf_counter()
        slots, are_known = self._scores.preselect_layer(layer, query, scale, weights)
        earlier = [eviction.are_known for eviction in self.members if eviction.are_known is not None]
        if earlier:
            are_known = torch.stack(earlier) & are_known
        for eviction, of_member in zip(self.members, are_known, strict=True):
            eviction.are_known = of_member
        self._took(start)
        return slots

    def score_layer(
        self,
        layer: int,
        query: Sequence[torch.Tensor],
        scale: float,
        output: Sequence[torch.Tensor | None] | None = None,
        weights: LayerWeights | None = None,
        state: Sequence[Any] | None = None,
        pseudo_query: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Score one layer of every member, now or together with the next ones: ``Eviction.score_layer`` for all."""
        start = perf_counter()
        nothing = [None] * len(self.members)
        self._scores.score_layer(
            layer, query, scale, output or nothing, weights, state or nothing, pseudo_query or nothing
        )
        self._took(start)

    def score_waiting(self) -> None:
        """``Eviction.score_waiting`` for all members."""
        start = perf_counter()
        self._scores.score_waiting()
        self._took(start)

    def summarise(self) -> Allocation:
        """Score what waits, and make on the device what the host must know to allocate: it does not wait yet.

        Raises as ``Eviction.choose`` does.
        """
        start = perf_counter()
        self._scores.score_waiting()
        missing = [layer for layer in range(self._pool.num_layers) if layer not in self._scores.scored]
        if missing:
            raise RuntimeError(f"layers {missing} were not scored at the end of the prefill; nothing was evicted")
        plans, scores = [eviction.plan for eviction in self.members], self._scores
        self._allocation = Allocation.of(self._method, plans, self._spans, scores.scores, scores.measures, self._lens)
        self._took(start)
        return self._allocation

    @staticmethod
    def fetch(several: Sequence[Evictions]) -> None:
        """Let the host wait for what it must know of all that have been summarised, if anything: once for all."""
        allocations = [evictions._allocation for evictions in several if evictions._allocation is not None]
        if allocations:
            Allocation.fetch(allocations)

    @property
    def _spans(self) -> list[Spans]:
        return [eviction.spans for eviction in self.members]

    @cached_property
    def _lens(self) -> torch.Tensor | None:
        """[num_reqs, num_layers, num_kv_heads] int64, tokens of each head; None if all requests have as many."""
        is_ragged = len({eviction.plan.num_tokens for eviction in self.members}) > 1
        return self._scores.lens(self._pool.num_layers) if is_ragged else None

    def choose(self) -> None:
        """``Eviction.choose`` for all members."""
        allocation = self._allocation or self.summarise()
        start = perf_counter()
        plans, lens = [eviction.plan for eviction in self.members], self._lens
        num_full_pages = allocation.pages()
        kept = self._select(num_full_pages, None if lens is None else lens.flatten(1))
        tiles = scratch.tiles(bytes_of_heads(num_full_pages, plans))
        fresh = self._fresh_pages()
        self._compactions = Compactions(kept, num_full_pages, self._scores.pages, plans, fresh, tiles)
        self._took(start)
        if is_observed():
            self._show(kept)

    @property
    def pages(self) -> KeptPages:
        """What the members keep, once ``choose`` was called."""
        return self._compactions.pages

    def _select(self, num_full_pages: torch.Tensor, lens: torch.Tensor | None) -> Marks:
        """Return which tokens stay, and note the next victims.

        lens: [num_reqs, heads] int64 as for ``allocate``
        """
        plans, scores = [eviction.plan for eviction in self.members], self._scores.scores
        tails = torch.tensor([plan.num_tail_tokens for plan in plans])[:, None]
        num_kept = to_device((num_full_pages.flatten(1) * self._pool.block_size + tails).numpy(), scores.device)
        num_reqs, num_heads, max_tokens = len(plans), num_kept.shape[1], scores.shape[3]
        marks = marks_of(self._spans, [plan.num_tokens for plan in plans], max_tokens, scores.device)
        bytes_per_score = _BYTES_PER_SCORE + (0 if marks is None else _BYTES_PER_RAISED)
        tiles = scratch.tiles([num_reqs * max_tokens * bytes_per_score] * num_heads)
        packed = None if len(tiles) == 1 else PackedMarks((num_reqs, num_heads, max_tokens), scores.device)
        protection, victims = (self._method.num_sink, self._method.num_recent), []
        for first, end in tiles:
            of_heads = raised(scores.of_heads(first, end), None if marks is None else marks[:, None])
            of_lens = None if lens is None else lens[:, first:end]
            kept = select(of_heads, num_kept[:, first:end], *protection, of_lens)
            if packed is not None:
                packed.put(first, kept)
            if plans[0].per_token:
                protected = protect(of_heads, *protection, of_lens)
                victims.append(protected.masked_fill_(~kept, float("inf")).argmin(dim=-1))
        if victims:
            together = torch.cat(victims, dim=1).view(num_full_pages.shape)
            for eviction, of_request in zip(self.members, together, strict=True):
                eviction.next_victims = of_request
        return packed or Marks(kept)

    def _fresh_pages(self) -> BlockPages | None:
        fresh = [eviction.fresh_block_ids for eviction in self.members if eviction.fresh_block_ids is not None]
        return self._pool.pages_of_each(fresh) if fresh else None

    def _show(self, kept: Marks) -> None:
        shape = self._scores.scores.shape
        scores = self._scores.scores.of_layers(0, shape[1])
        marks = kept.rows(0, kept.shape[1]).view(shape)
        for req, eviction in enumerate(self.members):
            of_prompt = slice(eviction.plan.num_tokens)
            choice = Choice(
                self._method, eviction.plan, self._pool, scores[req, ..., of_prompt], marks[req, ..., of_prompt]
            )
            eviction.show_chosen(choice)

    def compact(self) -> list[Compaction]:
        """Move what was chosen of all members. The pool's pages change; the caller fills its page table."""
        start = perf_counter()
        for source, destination in self._compactions.moves():
            self._pool.move(source, destination)
        self._took(start)
        compactions = [self._compactions.of(req) for req in range(len(self.members))]
        for eviction, compaction in zip(self.members, compactions, strict=True):
            eviction.show_compacted(compaction)
        return compactions

    def note(self, residents: Residents, states: Sequence[list[torch.Tensor] | None]) -> None:
        """Note what the compacted caches hold.

        states: of each, per layer [num_kv_heads, num_tokens] float32, what the policy summed up; None if nothing
        """
        pages, block_size, num_kv_heads = self._scores.pages, self._pool.block_size, self._pool.num_kv_heads
        num_slots = pages.to_blocks.shape[1] * block_size
        lane = torch.arange(block_size, device=pages.to_blocks.device)
        position = torch.arange(num_slots, dtype=torch.int32, device=lane.device)
        bytes_of_head = len(self.members) * num_slots * _BYTES_PER_SLOT
        for first, end in scratch.tiles([bytes_of_head] * self._pool.num_layers * num_kv_heads):
            page_ids = pages.of_heads(slice(first, end))
            slots = (page_ids[..., None] * block_size + lane).flatten(2)
            residents.positions[slots] = position
            for of_request, sums in zip(slots, states, strict=True):
                if sums is not None:
                    of_heads = [sums[head // num_kv_heads][head % num_kv_heads] for head in range(first, end)]
                    residents.sums[of_request[:, : len(of_heads[0])]] = torch.stack(of_heads)
        for source, destination in self._compactions.moves():
            # a gap moves the first slot of the null page to itself
            residents.move(source.clamp(min=0), destination.clamp(min=0))
