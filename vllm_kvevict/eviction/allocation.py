"""How many pages every head of several requests gets: the only place of an eviction at which the host waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from vllm_kvevict.budgets import round_to_pages
from vllm_kvevict.budgets.batch import BatchAllocator, WishBatch, wishes_for_batches
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.cache.staging import to_host
from vllm_kvevict.eviction.held_scores import HeldScores
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.results import checked_wish
from vllm_kvevict.eviction.selection import protect


def allocate(
    method: Method,
    plans: Sequence[EvictionPlan],
    scores: HeldScores,
    measures: torch.Tensor,
    lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [num_reqs, num_layers, num_kv_heads] int64 on the CPU, the full pages of every head.

    Allocators see protected scores, NaN behind the tokens of a request: those of the package tile by tile, others all
    at once.

    plans:    of the requests
    scores:   of all layers
    measures: [num_reqs, num_layers, num_measures] float64, what the allocator has measured
    lens:     [num_reqs, num_layers, num_kv_heads] int64, tokens of each head; None if all requests have as many

    Raises whatever an allocator raises; ValueError or TypeError if it returns what is none of an answer.
    """

    def read(first: int, end: int) -> torch.Tensor:
        lens_of_layers = None if lens is None else lens[:, first:end]
        return protect(scores.of_layers(first, end), method.num_sink, method.num_recent, lens_of_layers)

    wishes = _wishes(method, plans, scores, read, measures)
    return torch.stack([_pages(method, plan, wish) for plan, wish in zip(plans, wishes, strict=True)])


def _pages(method: Method, plan: EvictionPlan, wish: torch.Tensor) -> torch.Tensor:
    tokens = wish * (plan.num_kept_tokens * wish.numel() / wish.sum())
    # once the block of the tail is full it is emptied into the other pages: they must hold what is protected then
    tail = 0 if method.schedule.is_bounded else plan.num_tail_tokens
    minimum = cdiv(max(method.num_protected + method.schedule.per_token - tail, 0), plan.block_size)
    return round_to_pages(
        (tokens - plan.num_tail_tokens).clamp(min=0),  # every head holds the tail, in a page of its own
        plan.num_full_blocks * wish.numel(),
        min(minimum, plan.num_full_blocks),
        plan.num_tokens // plan.block_size,
    )


def _wishes(
    method: Method,
    plans: Sequence[EvictionPlan],
    scores: HeldScores,
    read: Callable[[int, int], torch.Tensor],
    measures: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Yield [num_layers, num_kv_heads] float64 on the CPU, what the allocator wishes for each request.

    One key that is not finite spoils what is measured of its layer; then nothing is known of how layers differ, and all
    heads get the same.
    """
    allocator, shape = method.allocator, scores.shape[1:3]
    source = f"{type(allocator).__name__}.wish"
    kv_lens, num_kept = [plan.num_tokens for plan in plans], [plan.num_kept_tokens for plan in plans]
    protected = [min(method.num_protected, kv_len) for kv_len in kv_lens]
    batch = WishBatch(read, scores.shape, scores.device, kv_lens, num_kept, protected, measures)
    are_known, summaries = _host_copies(method, batch)
    for req, kv_len in enumerate(kv_lens):
        if not are_known[req]:
            yield torch.ones(shape, dtype=torch.float64)
        elif isinstance(allocator, BatchAllocator) and summaries is not None:
            yield checked_wish(source, allocator.share(summaries[req], batch.facts(req)), shape)
        else:
            yield checked_wish(
                source, allocator.wish(batch.scores[req, ..., :kv_len], num_kept[req], measures[req]), shape
            )


def _host_copies(method: Method, batch: WishBatch) -> tuple[list[bool], torch.Tensor | None]:
    """Return whether what was measured of each request is finite, and what a ``BatchAllocator`` must know of each.

    Both come in one copy, if there is anything to copy: for this the host waits.
    """
    allocator, num_reqs = method.allocator, len(batch.kv_lens)
    measures, summaries = batch.measures.flatten(1), None
    if isinstance(allocator, BatchAllocator) and wishes_for_batches(type(allocator)):
        summary = allocator.summarise(batch)
        summaries = measures.new_empty(num_reqs, 0) if summary is None else summary
    parts = [part.to(batch.device) for part in (measures, summaries) if part is not None and part.numel()]
    if not parts:
        return [True] * num_reqs, summaries
    copied, num_measures = to_host(torch.cat(parts, dim=1)), measures.shape[1]
    are_known = torch.isfinite(copied[:, :num_measures]).all(dim=1).tolist()
    return are_known, None if summaries is None else copied[:, num_measures:]
