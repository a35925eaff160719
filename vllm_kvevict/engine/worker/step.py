"""All that a worker knows of one step, made anew for each: nothing of an earlier one is left in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.engine.messages import StepEvictions
from vllm_kvevict.engine.worker.prefills import ChunkGroup, PrefillGroup, PrefillRow
from vllm_kvevict.eviction.per_token import Replacement
from vllm_kvevict.eviction.prompt import Eviction, Evictions
from vllm_kvevict.eviction.resident import ResidentEvictions


@dataclass
class Step:
    """The scheduler's decisions for one step, and what becomes of them.

    decisions:   without those about requests that have failed before
    num_tokens:  tokens of each request of the step, its own included; drafts count as if they were accepted
    req_ids:     rows of the last batch that was not all stock attention's
    block_ids:   [num_blocks] int64 of the requests that are looked at, their block tables as of that batch
    fresh:       [num_full_blocks] int64 of the requests that are evicted into fresh blocks, these
    evictions:   of requests that are evicted for the first time
    groups:      of those in ``evictions``, the ones whose layers are scored together
    chosen:      of those in ``evictions``, the ones that keep what was chosen, as they move
    again:       of requests that are evicted again behind a chunk of their prompt, as their layers are scored
    answers:     of requests that are evicted again while they decode, as they were scored
    replacements: of requests whose new tokens replace others one by one
    auto_rows:   chunks of prompts whose budget is "auto"
    ahead:       last chunks of prompts that pseudo tokens follow, as their layers are scored
    earlier:     queries of layers whose pages are still to be read by others, as in ``LayerPass``
    is_over:     whether batches that come now are none of the scheduler's
    """

    decisions: StepEvictions
    num_tokens: dict[str, int]
    req_ids: list[str] = field(default_factory=list)
    block_ids: dict[str, torch.Tensor] = field(default_factory=dict)
    fresh: dict[str, torch.Tensor] = field(default_factory=dict)
    evictions: dict[str, Eviction] = field(default_factory=dict)
    groups: list[PrefillGroup] = field(default_factory=list)
    chosen: list[tuple[list[str], Evictions]] = field(default_factory=list)
    again: list[ChunkGroup] = field(default_factory=list)
    answers: list[tuple[list[str], ResidentEvictions]] = field(default_factory=list)
    replacements: list[Replacement] = field(default_factory=list)
    auto_rows: list[PrefillRow] = field(default_factory=list)
    ahead: list[PrefillGroup | PrefillRow] = field(default_factory=list)
    earlier: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    is_over: bool = False

    @property
    def lengths_of_watched(self) -> dict[str, int]:
        """Tokens behind this step of each request that is looked at in it."""
        return {req_id: self.num_tokens[req_id] for req_id in self.decisions.prefilling} | self.decisions.planned

    def stage_blocks(self, block_table: torch.Tensor, pool: PagePool) -> None:
        """Note the block tables of all requests that are looked at, and the blocks that some are evicted into.

        block_table: [num_reqs, max_blocks] of the batch
        """
        num_tokens = self.lengths_of_watched
        rows = [row for row, req_id in enumerate(self.req_ids) if req_id in num_tokens]
        if not rows or self.block_ids:  # of a drafter, whose passes follow each other
            return
        req_ids = [self.req_ids[row] for row in rows]
        counts = [cdiv(num_tokens[req_id], pool.block_size) for req_id in req_ids]
        device = pool.pages.device
        tables = block_table[to_device(np.array(rows), device), : max(counts)].to(torch.int64)
        self.block_ids = {req_id: ids[:count] for req_id, ids, count in zip(req_ids, tables, counts, strict=True)}
        ends = self.decisions.ending.items()
        fresh = {req_id: end.fresh_block_ids for req_id, end in ends if end.fresh_block_ids is not None}
        if fresh:
            ids = to_device(np.array([*chain(*fresh.values())], dtype=np.int64), device)
            self.fresh = dict(zip(fresh, ids.split([*map(len, fresh.values())]), strict=True))

    def check_lengths(self, held: np.ndarray) -> None:
        """Raise RuntimeError if a request that is to be evicted has another length here than in the scheduler.

        Such a request has no drafts in flight: the host knows its length.

        held: [num_reqs] tokens of each row
        """
        planned = self.decisions.planned
        for row, req_id in enumerate(self.req_ids if planned else []):
            if req_id in planned and held[row] != planned[req_id]:
                raise RuntimeError(
                    f"request {req_id}: the scheduler evicts it at {planned[req_id]} tokens, the worker holds "
                    f"{held[row]}"
                )


def none() -> Step:
    """Return a step that nobody has planned: stock attention serves all of it."""
    return Step(StepEvictions(), {}, is_over=True)


def num_tokens_after(output: SchedulerOutput) -> dict[str, int]:
    """Return how many tokens each request of a step has in the cache behind it."""
    new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
    computed = {request.req_id: request.num_computed_tokens for request in new}
    computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return {req_id: computed[req_id] + count for req_id, count in output.num_scheduled_tokens.items()}
