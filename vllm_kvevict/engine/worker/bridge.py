"""The worker's side of eviction: which rows of a batch are evicted, which are to be, and where their pages are."""

from __future__ import annotations

import logging
from collections.abc import Set
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import ring_depth
from vllm_kvevict.engine.messages import STEP, EvictionReport, PrefillEnd, StepEvictions
from vllm_kvevict.engine.worker.agreement import Workers
from vllm_kvevict.engine.worker.auto_budgets import AutoBudgets
from vllm_kvevict.engine.worker.commands import Commands, without
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.engine.worker.pseudo_passes import PseudoPasses
from vllm_kvevict.engine.worker.replacing import Replacing
from vllm_kvevict.engine.worker.rows import BatchFolder, StepRows
from vllm_kvevict.engine.worker.watched import ChunkRow, PrefillRow, WatchedRequest
from vllm_kvevict.eviction.per_token import TokenEvictor
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.resident import ResidentEviction

logger = logging.getLogger("vllm.kvevict")


class EvictionBridge:
    """Knows, in every step, the requests behind the rows. One per model; its attention builder asks it.

    row_req_ids: of the last batch that was not all stock attention's
    evictions:   of the requests whose prefill ended in the last step
    failures:    of what a third party may have written

    num_extra_tokens: tokens of a row beyond those that the scheduler counts
    """

    num_extra_tokens: ClassVar[int] = 0

    def __init__(self, runner: Any, pool: PagePool, layer_names: list[str], max_num_reqs: int) -> None:
        self._runner = runner
        self._layer_names = layer_names
        self.forget_weights()
        self.pool = pool
        self.layer_index = {name: index for index, name in enumerate(layer_names)}
        self.page_table = PageTable(pool, max_num_reqs)
        self._folder = BatchFolder(pool.num_kv_heads)
        self._watched: dict[str, WatchedRequest] = {}
        self._step: StepEvictions | None = None
        self.row_req_ids: list[str] = []
        self.evictions: dict[str, Eviction] = {}
        self.failures = Failures()
        self._workers = Workers(runner.vllm_config.parallel_config)
        self._commands = Commands()
        # of requests that evict while they decode: queries since their last full block, and what their slots hold
        self.ring = QueryRing(pool.num_layers, max_num_reqs, ring_depth(runner.vllm_config), pool.pages.device)
        self.residents = Residents(pool)
        tokens = TokenEvictor(pool, self.page_table, self.residents, self.ring, max_num_reqs)
        self._replacing = Replacing(tokens, self.page_table, self.failures)
        self._full_rows: dict[str, torch.Tensor] = {}
        self._again: dict[str, ResidentEviction] = {}
        self._auto_budgets = AutoBudgets(runner, self.failures)
        self._chosen_rows: list[PrefillRow] = []
        self._pseudo_passes = PseudoPasses(runner, pool, layer_names, self.failures)
        self._pseudo_rows: list[PrefillRow] = []

    def forget_weights(self) -> None:
        """The model has new weights: what policies read of the old ones is of no use any more."""
        self._weights = ModelWeights(self._model(), self._layer_names)

    def _model(self) -> Any:
        return self._runner.get_model()

    def begin_step(self, output: SchedulerOutput) -> None:
        """Forget the requests that ended, and take over the scheduler's decisions for this step."""
        for req_id in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.page_table.remove(req_id)
            self.ring.slots.give_back(req_id)
            self._replacing.remove(req_id)
            self._watched.pop(req_id, None)
            self.failures.forget(req_id)
            self._commands.forget(req_id)
        step: StepEvictions = getattr(output, STEP)
        self._commands.take(step, output.num_scheduled_tokens.keys())
        self._watch_new(step)
        self._step = without(self._failed_before(), step)
        self.evictions = {}
        self._full_rows = {}
        self._again = {}
        self._pseudo_rows = []
        self._chosen_rows = []

    def _failed_before(self) -> Set[str]:
        """Return the requests whose failure the scheduler did not know of when it planned this step.

        They go on as whatever they were, for nothing, until it ends them.
        """
        return self.failures.known_to_all

    def _watch_new(self, step: StepEvictions) -> None:
        """Make the policies of requests that begin; workers whose batches differed would wait for each other."""
        configs = step.prefilling | {req_id: end.config for req_id, end in step.ending.items() if not end.is_late}
        new = [req_id for req_id in configs if req_id not in self._watched and req_id not in self.failures]
        for req_id in new:
            self.failures.ask(req_id, "making the policy", self._watch, req_id, configs[req_id])
        self._workers.agree(self.failures, new)

    def forget_step(self) -> None:
        """Batches that come now are none of the scheduler's: stock attention serves all of them."""
        self._step = None

    def end_step(self) -> dict[str, EvictionReport]:
        """After the last layer: allocate, select and compact what the layers have scored.

        What a third party may have written comes first. When all workers know what of it failed, tokens move.
        """
        step = self._step or StepEvictions()
        self._choose(step)
        evicted = self._commands.evicted() if self._workers.are_several else []
        self._workers.agree(self.failures, evicted)
        seconds = self._evict(step)
        self._workers.hand_on(self.failures, evicted)
        plans = self._commands.plans | {req_id: eviction.plan for req_id, eviction in self.evictions.items()}
        failed = self.failures.known_to_all & self._commands.scheduled
        for req_id in failed:
            self._replacing.remove(req_id)
        self._step = None
        # what has no plan, and is replaced token by token or still observed, is reported only if it has failed
        return {
            req_id: EvictionReport(plans.get(req_id), seconds.get(req_id, 0.0), self.failures.get(req_id))
            for req_id in [*plans, *(failed - plans.keys())]
        }

    def _choose(self, step: StepEvictions) -> None:
        """Ask the policies and allocators what the requests of this step keep."""
        if self._pseudo_rows:
            self._pseudo_passes.score(self._pseudo_rows, self._weights)
        for req_id, num_tokens in step.growing.items():
            if req_id in self.ring.slots:
                self._observe_answer(req_id, num_tokens, None)
        for req_id, end in step.ending.items():
            if end.is_late:
                method, block_ids = self._watched[req_id].method, self._full_rows[req_id]
                eviction = self.evictions[req_id] = Eviction(method, end.plan, self.pool, block_ids, self._fresh(end))
                self._observe_answer(req_id, end.plan.num_tokens, eviction)
        self._choose_budgets()
        for req_id, eviction in self.evictions.items():
            self.failures.ask(req_id, "choosing what to keep", self._choose_kept, req_id, eviction)
        for req_id, num_tokens in step.shrinking.items():
            if not self._watched[req_id].method.schedule.per_token:  # whose tokens have left the block one by one
                self._again[req_id] = self._resident_eviction(req_id, num_tokens)
                self.failures.ask(req_id, "scoring an answer", self._score_answer, req_id, num_tokens)

    def _choose_kept(self, req_id: str, eviction: Eviction) -> None:
        eviction.choose()
        request = self._watched[req_id]
        if request.method.schedule.is_bounded:
            request.check_states((self.pool.num_kv_heads, eviction.plan.num_tokens), self.pool.pages.device)

    def _score_answer(self, req_id: str, num_tokens: int) -> None:
        """Let the policy look at all that an evicted request holds, the block that its answer has filled included."""
        request, eviction = self._watched[req_id], self._again[req_id]
        for layer in range(self.pool.num_layers):
            chunk = self._new_queries(layer, req_id, num_tokens)
            last = request.queries.extend(layer, chunk)
            weights = self._weights.of(layer, request.needs)
            eviction.score_layer(layer, last, chunk, self._weights.scale(layer), weights)

    def _evict(self, step: StepEvictions) -> dict[str, float]:
        """Move what was chosen; return the seconds that each request took in all.

        Tokens move only into blocks that no other request reads.
        """
        seconds = {}
        for req_id, eviction in self.evictions.items():
            request = self._watched[req_id]
            if req_id not in self.failures:
                self._compact(req_id, eviction)
            seconds[req_id] = eviction.seconds + request.seconds
            if not step.ending[req_id].goes_on:
                self._stop_watching(req_id)
        for req_id, again in self._again.items():
            chunk = step.chunks.get(req_id)
            if req_id not in self.failures:
                self._compact_again(req_id, again, None if chunk is None else chunk.plan)
            seconds[req_id] = again.seconds
            if chunk is not None and not chunk.goes_on:
                self._stop_watching(req_id)
        return seconds

    def _stop_watching(self, req_id: str) -> None:
        """A request will not be evicted again."""
        del self._watched[req_id]
        self.ring.slots.give_back(req_id)

    def _choose_budgets(self) -> None:
        """Choose how much the requests of this step keep whose budget is "auto"."""
        self._auto_budgets.observe(self._chosen_rows)
        self._auto_budgets.choose(self.evictions, self._watched)

    def _compact(self, req_id: str, eviction: Eviction) -> None:
        """Carry out the first eviction of a request."""
        compaction, request = eviction.compact(), self._watched[req_id]
        self.page_table.add(req_id, compaction, eviction.plan)
        if request.method.schedule.is_bounded:
            known_bytes = self.residents.num_bytes
            self.residents.note(compaction, eviction.plan, eviction.block_ids, request.take_states())
            if self.residents.num_bytes > known_bytes:
                logger.info(
                    "Eviction during decode notes the tokens of answers, in %.1f MiB beside the KV cache",
                    self.residents.num_bytes / 2**20,
                )
            if eviction.next_victims is not None:
                self._go_on_per_token(req_id, eviction.plan, eviction.next_victims)

    def _compact_again(self, req_id: str, eviction: ResidentEviction, plan: EvictionPlan | None) -> None:
        """Empty the block that an answer has filled, or those that a chunk of a prompt has, all but the last one.

        plan: of the chunk
        """
        eviction.compact()
        self._watched[req_id].num_tokens = eviction.num_tokens
        self.page_table.shrink(req_id, eviction.num_tokens, eviction.per_token)
        if plan is not None and plan.per_token:
            self._go_on_per_token(req_id, plan, eviction.next_victims)

    def _go_on_per_token(self, req_id: str, plan: EvictionPlan, victims: torch.Tensor) -> None:
        """From its next token on a request replaces what it holds; the ring has its last queries then."""
        self._replacing.add(req_id, self._watched[req_id].method, victims)
        if req_id in self.ring.slots:
            for layer in range(self.pool.num_layers):
                self.ring.seed(layer, req_id, self._watched[req_id].queries.last(layer), plan.num_tokens)

    def _observe_answer(self, req_id: str, num_tokens: int, eviction: Eviction | None) -> None:
        """Show the policy the queries since the last full block of a request whose prompt was not evicted."""
        if req_id in self.failures:
            return
        request, block_ids = self._watched[req_id], self._full_rows[req_id]
        # before the first is observed: it counts as seen then
        chunks = [self._new_queries(layer, req_id, num_tokens) for layer in range(self.pool.num_layers)]
        for layer, chunk in enumerate(chunks):
            row = PrefillRow(request, 0, len(chunk), block_ids, num_tokens, eviction)
            self.observe(row, layer, chunk, chunk, self._weights.scale(layer))

    def _new_queries(self, layer: int, req_id: str, num_tokens: int) -> torch.Tensor:
        """Return [num_new, num_heads, head_size], the queries since the last full block; none if no policy asks."""
        request = self._watched[req_id]
        if req_id not in self.ring.slots:
            return request.queries.last(layer)[:0]
        return self.ring.last(layer, req_id, num_tokens, num_tokens - request.num_tokens)

    def _resident_eviction(self, req_id: str, num_tokens: int, per_token: bool = False) -> ResidentEviction:
        request, rows = self._watched[req_id], self.page_table.rows(req_id, num_tokens)
        num_new, num_full_pages = num_tokens - request.num_tokens, self.page_table.num_full_pages(req_id)
        return ResidentEviction(
            request.method, num_tokens, num_new, self.pool, self.residents, *rows, num_full_pages, per_token
        )

    def rows(self, common: CommonAttentionMetadata) -> StepRows | None:
        """Return what is special about this batch, None if stock attention serves all of it."""
        step = self._step
        if step is None or not (len(self.page_table) or len(self.ring.slots) or step.prefilling or step.ending):
            return None
        req_ids = self.row_req_ids = self._row_req_ids(common)
        slots = self.page_table.slots.of(req_ids)
        split, queries = self._folder.split(slots, common)
        prefills: list[PrefillRow | ChunkRow] = [*self._prefill_rows(req_ids, common, step)]
        self._note_full_rows(req_ids, common, step)
        remembered = self.ring.to_write(req_ids, common.query_start_loc, common.seq_lens)
        if queries is None and not prefills and remembered is None:
            return None
        if queries is None:
            return StepRows(split, None, None, prefills, remembered, [])
        evicted, block_table = split.evicted, common.block_table_tensor
        folded = self.page_table.fold(
            slots[evicted], common.seq_lens[evicted], queries.query_lens, block_table[evicted].to(torch.int64)
        )
        prefills += self._chunk_rows(req_ids, common, step)
        replacements = self._replacing.rows(req_ids, common)
        return StepRows(split, queries, folded, prefills, remembered, replacements)

    def _chunk_rows(self, req_ids: list[str], common: CommonAttentionMetadata, step: StepEvictions) -> list[ChunkRow]:
        """Prepare the evictions behind chunks of prompts; their pages are in the page table by now."""
        if not step.chunks:
            return []
        rows = []
        bounds = common.query_start_loc_cpu.tolist()
        for row, req_id in enumerate(req_ids):
            if req_id in step.chunks:
                plan = step.chunks[req_id].plan
                _check_length(req_id, plan.num_tokens, int(common.seq_lens[row]))
                eviction = self._again[req_id] = self._resident_eviction(req_id, plan.num_tokens, plan.per_token)
                rows.append(ChunkRow(self._watched[req_id], bounds[row], bounds[row + 1], eviction))
        return rows

    def _row_req_ids(self, common: CommonAttentionMetadata) -> list[str]:
        if common.req_idx is not None:  # model runner V2
            return [self._runner.req_states.index_to_req_id[index] for index in common.req_idx.tolist()]
        return list(self._runner.input_batch.req_ids[: common.num_reqs])

    def _prefill_rows(
        self, req_ids: list[str], common: CommonAttentionMetadata, step: StepEvictions
    ) -> list[PrefillRow]:
        if not (step.prefilling or step.ending):
            return []
        bounds = common.query_start_loc_cpu.tolist()
        rows: list[PrefillRow] = []
        for row, req_id in enumerate(req_ids):
            end = step.ending.get(req_id)
            request = self._watched.get(req_id)
            # a draft has none if its policy could not be made
            if request is None or (req_id not in step.prefilling and (end is None or end.is_late)):
                continue
            kv_len = int(common.seq_lens[row]) - self.num_extra_tokens
            block_ids = common.block_table_tensor[row, : cdiv(kv_len, self.pool.block_size)].to(torch.int64)
            eviction = None
            if end is not None:
                _check_length(req_id, end.plan.num_tokens, kv_len)
                eviction = Eviction(request.method, end.plan, self.pool, block_ids, self._fresh(end))
                self.evictions[req_id] = eviction
            end_token = bounds[row + 1] - self.num_extra_tokens
            rows.append(PrefillRow(request, bounds[row], end_token, block_ids, kv_len, eviction))
            if request.auto_budget is not None:
                self._chosen_rows.append(rows[-1])
            if end is not None and request.num_pseudo_tokens:
                self._pseudo_rows.append(rows[-1])
        return rows

    def _watch(self, req_id: str, config: EvictionConfig) -> None:
        method = config.method()
        request = WatchedRequest(req_id, method, self.pool.num_layers, config.auto_budget())
        if method.watches_answer:
            self.ring.slots.take(req_id)
        self._watched[req_id] = request

    def _note_full_rows(self, req_ids: list[str], common: CommonAttentionMetadata, step: StepEvictions) -> None:
        """Check the lengths of requests whose answer is looked at in this step, and keep the block tables of those
        that are not evicted yet, for its end.
        """
        late = {req_id: end.plan.num_tokens for req_id, end in step.ending.items() if end.is_late}
        full = {**step.growing, **step.shrinking, **late}
        for row, req_id in enumerate(req_ids if full else []):
            if req_id in full:
                _check_length(req_id, full[req_id], int(common.seq_lens[row]))
                if req_id in step.shrinking:  # its pages are in the page table
                    continue
                num_blocks = cdiv(full[req_id], self.pool.block_size)
                self._full_rows[req_id] = common.block_table_tensor[row, :num_blocks].to(torch.int64)

    def _fresh(self, end: PrefillEnd) -> torch.Tensor | None:
        ids = end.fresh_block_ids
        return None if ids is None else torch.tensor(ids, dtype=torch.int64, device=self.pool.pages.device)

    def fill_holes(self, rows: StepRows, layer: int) -> None:
        """Before attention reads a layer: new tokens of some requests go where those were that they replace."""
        self._replacing.fill_holes(rows.replacements, layer)

    def remember(self, rows: StepRows, layer: int, query: torch.Tensor) -> None:
        """After a layer's attention: keep those of its queries [num_tokens, num_heads, head_size] that an eviction will
        ask for, and evict from the requests that replace their tokens one by one.
        """
        if rows.remembered is not None:
            is_first = self.ring.num_bytes == 0
            self.ring.write(layer, query, rows.remembered)
            if is_first:
                logger.info(
                    "Eviction during decode keeps the last queries of answers, in %.1f MiB beside the KV cache",
                    self.ring.num_bytes / 2**20,
                )
        self._replacing.choose_holes(rows.replacements, layer, self._weights)

    def observe(
        self, row: PrefillRow | ChunkRow, layer: int, query: torch.Tensor, output: torch.Tensor, scale: float
    ) -> None:
        """Show a layer's queries and outputs [num_tokens, num_heads, head_size] to one row of the batch."""
        self.failures.ask(row.request.req_id, f"scoring layer {layer}", self._observe, row, layer, query, output, scale)

    def _observe(
        self, row: PrefillRow | ChunkRow, layer: int, query: torch.Tensor, output: torch.Tensor, scale: float
    ) -> None:
        row.observe(self.pool, layer, query, output, scale, self._weights.of(layer, row.request.needs))


def _check_length(req_id: str, expected: int, actual: int) -> None:
    if actual != expected:
        raise RuntimeError(f"request {req_id}: the scheduler evicts it at {expected} tokens, the worker holds {actual}")
