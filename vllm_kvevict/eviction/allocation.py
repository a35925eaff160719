"""How many pages every head of several requests gets: the only place of an eviction at which the host waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from vllm_kvevict.budgets import round_to_pages
from vllm_kvevict.budgets.batch import BatchAllocator, WishBatch, wishes_for_batches
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.cache.staging import to_host
from vllm_kvevict.eviction.held_scores import HeldScores
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.protection import Spans, marks_of, num_in, num_protected, raised
from vllm_kvevict.eviction.results import checked_wish
from vllm_kvevict.eviction.selection import protect


@dataclass
class Allocation:
    """The budgets of several requests of one method, of which the host must know something of the scores.

    spans:     of the requests, what is protected of each beside both ends
    on_device: [num_reqs, num_numbers] float64, this; what was measured of each request comes first
    """

    method: Method
    plans: Sequence[EvictionPlan]
    spans: Sequence[Spans]
    batch: WishBatch
    on_device: torch.Tensor
    _on_host: torch.Tensor | None = field(init=False, default=None)

    @classmethod
    def of(
        cls,
        method: Method,
        plans: Sequence[EvictionPlan],
        spans: Sequence[Spans],
        scores: HeldScores,
        measures: torch.Tensor,
        lens: torch.Tensor | None = None,
    ) -> Allocation:
        """Make on the device what the host must know.

        Allocators see protected scores, NaN behind the tokens of a request: those of the package tile by tile, others
        all at once.

        plans, spans: of the requests
        scores:   of all layers
        measures: [num_reqs, num_layers, num_measures] float64, what the allocator has measured
        lens:     [num_reqs, num_layers, num_kv_heads] int64, tokens of each head; None if all requests have as many

        Raises whatever an allocator raises.
        """

        allocator, kv_lens = method.allocator, [plan.num_tokens for plan in plans]
        marks = marks_of(spans, kv_lens, scores.shape[3], scores.device)

        def read(first: int, end: int) -> torch.Tensor:
            lens_of_layers = None if lens is None else lens[:, first:end]
            of_layers = raised(scores.of_layers(first, end), None if marks is None else marks[:, None, None])
            return protect(of_layers, method.num_sink, method.num_recent, lens_of_layers)

        protected = [num_protected(method, *of_request) for of_request in zip(spans, kv_lens, strict=True)]
        num_kept = [plan.num_kept_tokens for plan in plans]
        batch = WishBatch(read, scores.shape, scores.device, kv_lens, num_kept, protected, measures)
        parts = [measures.flatten(1)]
        if isinstance(allocator, BatchAllocator) and wishes_for_batches(type(allocator)):
            summary = allocator.summarise(batch)
            parts += [] if summary is None else [summary]
        on_device = torch.cat([part.to(scores.device, torch.float64) for part in parts], dim=1)
        return cls(method, plans, spans, batch, on_device)

    @staticmethod
    def fetch(several: Sequence[Allocation]) -> None:
        """Copy what the host must know of all of these, if anything: here it waits for the device, once for all."""
        for allocation, on_host in zip(several, _copied([each.on_device for each in several]), strict=True):
            allocation._on_host = on_host

    def pages(self) -> torch.Tensor:
        """Return [num_reqs, num_layers, num_kv_heads] int64 on the CPU, the full pages of every head.

        Raises whatever an allocator raises; ValueError or TypeError if it returns what is none of an answer.
        """
        wishes = zip(self.plans, self.spans, self._wishes(), strict=True)
        return torch.stack([_pages(self.method, plan, spans, wish) for plan, spans, wish in wishes])

    def _wishes(self) -> Iterator[torch.Tensor]:
        """Yield [num_layers, num_kv_heads] float64 on the CPU, what the allocator wishes for each request.

        One key that is not finite spoils what is measured of its layer; then nothing is known of how layers differ, and
        all heads get the same.
        """
        (known,) = _copied([self.on_device]) if self._on_host is None else [self._on_host]
        allocator, batch, shape = self.method.allocator, self.batch, self.batch.shape[1:3]
        source = f"{type(allocator).__name__}.wish"
        measures, summaries = known.tensor_split([batch.measures[0].numel()], dim=1)
        are_known = torch.isfinite(measures).all(dim=1).tolist() if measures.numel() else [True] * len(self.plans)
        for req, kv_len in enumerate(batch.kv_lens):
            if not are_known[req]:
                yield torch.ones(shape, dtype=torch.float64)
            elif isinstance(allocator, BatchAllocator) and wishes_for_batches(type(allocator)):
                yield checked_wish(source, allocator.share(summaries[req], batch.facts(req)), shape)
            else:
                scores = batch.scores[req, ..., :kv_len]
                yield checked_wish(source, allocator.wish(scores, batch.num_tokens[req], batch.measures[req]), shape)


def _copied(several: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return these on the host, in one copy of all; if none has a number they stay where they are."""
    if not any(part.numel() for part in several):
        return list(several)
    copied = to_host(torch.cat([part.flatten() for part in several]))
    parts = copied.split([part.numel() for part in several])
    return [on_host.view(part.shape) for on_host, part in zip(parts, several, strict=True)]


def _pages(method: Method, plan: EvictionPlan, spans: Spans, wish: torch.Tensor) -> torch.Tensor:
    tokens = wish * (plan.num_kept_tokens * wish.numel() / wish.sum())
    # once the block of the tail is full it is emptied into the other pages: they must hold what is protected then
    tail = 0 if method.schedule.is_bounded else plan.num_tail_tokens
    most_protected = method.num_protected + num_in(spans) + method.schedule.per_token
    minimum = cdiv(max(most_protected - tail, 0), plan.block_size)
    return round_to_pages(
        (tokens - plan.num_tail_tokens).clamp(min=0),  # every head holds the tail, in a page of its own
        plan.num_full_blocks * wish.numel(),
        min(minimum, plan.num_full_blocks),
        plan.num_tokens // plan.block_size,
    )
