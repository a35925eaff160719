"""The worker's side of eviction: which rows of a batch are evicted, which are to be, and where their pages are."""

from __future__ import annotations

import logging
from collections.abc import Set
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.cache.query_ring import QueryRing
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.cache.staging import to_device
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import ring_depth
from vllm_kvevict.engine.messages import STEP, EvictionReport, PrefillEnd, StepEvictions
from vllm_kvevict.engine.worker.agreement import Workers
from vllm_kvevict.engine.worker.answers import Answers
from vllm_kvevict.engine.worker.auto_budgets import AutoBudgets
from vllm_kvevict.engine.worker.choosing import choose_kept, in_groups
from vllm_kvevict.engine.worker.commands import Commands, without
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.engine.worker.pseudo_passes import PseudoPasses
from vllm_kvevict.engine.worker.replacing import Replacing
from vllm_kvevict.engine.worker.rows import BatchFolder, StepRows, longest_lens
from vllm_kvevict.engine.worker.step import Step, none, num_tokens_after
from vllm_kvevict.engine.worker.watched import ChunkRow, LayerPass, PrefillGroup, PrefillRow, WatchedRequest
from vllm_kvevict.eviction.per_token import TokenEvictor
from vllm_kvevict.eviction.prompt import Eviction, Evictions
from vllm_kvevict.eviction.resident import ResidentEviction

logger = logging.getLogger("vllm.kvevict")


class EvictionBridge:
    """Knows, in every step, the requests behind the rows. One per model; its attention builder asks it.

    step:     the present one, or the last
    failures: of what a third party may have written

    num_extra_tokens: tokens of a row beyond those that the scheduler counts
    """

    num_extra_tokens: ClassVar[int] = 0

    def __init__(self, runner: Any, pool: PagePool, layer_names: list[str], max_num_reqs: int) -> None:
        self._runner = runner
        self._layer_names = layer_names
        self.forget_weights()
        self.pool = pool
        self.layer_index = {name: index for index, name in enumerate(layer_names)}
        config, device = runner.vllm_config, pool.pages.device
        self.page_table = PageTable(pool, max_num_reqs, config.model_config.max_model_len)
        self._folder = BatchFolder(pool.num_kv_heads, 1 + config.num_speculative_tokens, device)
        self._watched: dict[str, WatchedRequest] = {}
        self.step = none()
        self.failures = Failures()
        self._workers = Workers(config.parallel_config)
        self._commands = Commands()
        # of requests that evict while they decode: queries since their last full block, and what their slots hold
        self.ring = QueryRing(pool.num_layers, max_num_reqs, ring_depth(config), device)
        self.residents = Residents(pool)
        tokens = TokenEvictor(pool, self.page_table, self.residents, self.ring, max_num_reqs)
        self._replacing = Replacing(tokens, self.page_table, self.failures)
        self._answers = Answers(pool, self.page_table, self.residents, self.ring, self.failures)
        self._auto_budgets = AutoBudgets(runner, self.failures)
        self._pseudo_passes = PseudoPasses(runner, pool, layer_names, self.failures)

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
        decisions: StepEvictions = getattr(output, STEP)
        self._commands.take(decisions, output.num_scheduled_tokens.keys())
        self._watch_new(decisions)
        self.step = Step(without(self._failed_before(), decisions), num_tokens_after(output))

    def _failed_before(self) -> Set[str]:
        """Return the requests whose failure the scheduler did not know of when it planned this step.

        They go on as whatever they were, for nothing, until it ends them.
        """
        return self.failures.known_to_all

    def _watch_new(self, decisions: StepEvictions) -> None:
        """Make the policies of requests that begin; workers whose batches differed would wait for each other."""
        ending = decisions.ending.items()
        configs = decisions.prefilling | {req_id: end.config for req_id, end in ending if not end.is_late}
        new = [req_id for req_id in configs if req_id not in self._watched and req_id not in self.failures]
        for req_id in new:
            self.failures.ask(req_id, "making the policy", self._watch, req_id, configs[req_id])
        self._workers.agree(self.failures, new)

    def forget_step(self) -> None:
        """Batches that come now are none of the scheduler's: stock attention serves all of them."""
        self.step = none()

    def end_step(self) -> dict[str, EvictionReport]:
        """After the last layer: allocate, select and compact what the layers have scored.

        What a third party may have written comes first. When all workers know what of it failed, tokens move.
        """
        step = self.step
        self._choose(step)
        evicted = self._commands.evicted() if self._workers.are_several else []
        self._workers.agree(self.failures, evicted)
        seconds = self._evict(step)
        self._workers.hand_on(self.failures, evicted)
        plans = self._commands.plans | {req_id: eviction.plan for req_id, eviction in step.evictions.items()}
        failed = self.failures.known_to_all & self._commands.scheduled
        for req_id in failed:
            self._replacing.remove(req_id)
        step.is_over = True
        # what has no plan, and is replaced token by token or still observed, is reported only if it has failed
        return {
            req_id: EvictionReport(plans.get(req_id), seconds.get(req_id, 0.0), self.failures.get(req_id))
            for req_id in [*plans, *(failed - plans.keys())]
        }

    def _choose(self, step: Step) -> None:
        """Ask the policies and allocators what the requests of this step keep."""
        decisions = step.decisions
        if step.pseudo_rows:
            self._pseudo_passes.score(step.pseudo_rows, self._weights)
        for req_id, num_tokens in decisions.growing.items():
            if req_id in self.ring.slots:
                self._observe_answer(req_id, num_tokens, None)
        for req_id, end in decisions.ending.items():
            if end.is_late:
                method, block_ids = self._watched[req_id].method, step.block_ids[req_id]
                eviction = step.evictions[req_id] = Eviction(method, end.plan, self.pool, block_ids, self._fresh(end))
                self._observe_answer(req_id, end.plan.num_tokens, eviction)
        self._choose_budgets(step)
        choose_kept(step, self._watched, self.pool, self.failures)
        self._answers.score(step, self._watched, self._weights)
        self._replacing.choose_holes(step.replacements, self._weights)

    def _evict(self, step: Step) -> dict[str, float]:
        """Move what was chosen; return the seconds that each request took in all.

        Tokens move only into blocks that no other request reads.
        """
        seconds = {}
        for req_ids, evictions in step.chosen:
            if not all(req_id in self.failures for req_id in req_ids):
                self._compact(req_ids, evictions)
        for req_id, eviction in step.evictions.items():
            seconds[req_id] = eviction.seconds + self._watched[req_id].seconds
            if not step.decisions.ending[req_id].goes_on:
                self._stop_watching(req_id)
        for req_id, again in step.again.items():
            chunk = step.decisions.chunks[req_id]
            if req_id not in self.failures:
                again.compact()
                self._shrink(req_id, again.num_tokens, again.per_token)
                if chunk.plan.per_token:
                    self._go_on_per_token(req_id, chunk.plan, again.next_victims)
            seconds[req_id] = again.seconds
            if not chunk.goes_on:
                self._stop_watching(req_id)
        for req_ids, answers in step.answers:
            if not all(req_id in self.failures for req_id in req_ids):
                answers.compact()
                for req_id, num_tokens in zip(req_ids, answers.num_tokens, strict=True):
                    self._shrink(req_id, num_tokens, per_token=False)
            seconds |= dict.fromkeys(req_ids, answers.seconds / len(req_ids))
        return seconds

    def _shrink(self, req_id: str, num_tokens: int, per_token: bool) -> None:
        """The block that an answer has filled is empty, or those that a chunk of a prompt has, all but the last one."""
        self._watched[req_id].num_tokens = num_tokens
        self.page_table.shrink(req_id, num_tokens, per_token)

    def _stop_watching(self, req_id: str) -> None:
        """A request will not be evicted again."""
        del self._watched[req_id]
        self.ring.slots.give_back(req_id)

    def _choose_budgets(self, step: Step) -> None:
        """Choose how much the requests of this step keep whose budget is "auto"."""
        self._auto_budgets.observe(step.auto_rows)
        self._auto_budgets.choose(step.evictions, self._watched)

    def _compact(self, req_ids: list[str], evictions: Evictions) -> None:
        """Carry out the first evictions of some requests."""
        compactions, requests = evictions.compact(), [self._watched[req_id] for req_id in req_ids]
        for req_id, compaction, eviction in zip(req_ids, compactions, evictions.members, strict=True):
            self.page_table.add(req_id, compaction, eviction.plan, eviction.full_block_ids)
        if not requests[0].method.schedule.is_bounded:
            return
        known_bytes = self.residents.num_bytes
        evictions.note(self.residents, [request.take_states() for request in requests])
        if self.residents.num_bytes > known_bytes:
            logger.info(
                "Eviction during decode notes the tokens of answers, in %.1f MiB beside the KV cache",
                self.residents.num_bytes / 2**20,
            )
        for req_id, eviction in zip(req_ids, evictions.members, strict=True):
            if eviction.next_victims is not None:
                self._go_on_per_token(req_id, eviction.plan, eviction.next_victims)

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
        request, block_ids = self._watched[req_id], self.step.block_ids[req_id]
        # before the first is observed: it counts as seen then
        chunks = self._answers.new_queries(request, num_tokens)
        for layer, chunk in enumerate(chunks):
            row = PrefillRow(request, 0, len(chunk), block_ids, num_tokens, eviction)
            self.observe(row, layer, chunk, chunk, self._weights.scale(layer))

    def _resident_eviction(
        self, req_id: str, num_tokens: int, block_ids: torch.Tensor, per_token: bool = False
    ) -> ResidentEviction:
        request, rows = self._watched[req_id], self.page_table.rows(req_id, num_tokens, block_ids)
        num_new, num_full_pages = num_tokens - request.num_tokens, self.page_table.num_full_pages(req_id)
        return ResidentEviction(
            request.method, num_tokens, num_new, self.pool, self.residents, *rows, num_full_pages, per_token
        )

    def rows(self, common: CommonAttentionMetadata) -> StepRows | None:
        """Return what is special about this batch, None if stock attention serves all of it."""
        step = self.step
        decisions = step.decisions
        if step.is_over or not (
            len(self.page_table) or len(self.ring.slots) or decisions.prefilling or decisions.ending
        ):
            return None
        req_ids = step.req_ids = self._row_req_ids(common)
        split = self._folder.split(self.page_table.slots.of(req_ids), common)
        self._check_lengths(common)
        prefills: list[PrefillGroup | PrefillRow | ChunkRow] = [*in_groups(self._prefill_rows(common, step), step)]
        answers = decisions.answers
        for row, req_id in enumerate(req_ids if answers else []):
            if req_id in answers:
                step.block_ids[req_id] = self._block_ids(common, row, answers[req_id])
        query_start_loc = common.query_start_loc_cpu.numpy()[: len(req_ids) + 1]
        remembered = self.ring.to_write(req_ids, query_start_loc, common.seq_lens)
        if not split.evicted and not prefills and remembered is None:
            return None
        if not split.evicted:
            return StepRows(split, prefills, remembered, [])
        prefills += self._chunk_rows(common, step)
        step.replacements = self._replacing.rows(req_ids, common)
        return StepRows(split, prefills, remembered, step.replacements)

    def _check_lengths(self, common: CommonAttentionMetadata) -> None:
        if common.seq_lens_cpu_upper_bound is not None:
            self.step.check_lengths(longest_lens(common))

    def _chunk_rows(self, common: CommonAttentionMetadata, step: Step) -> list[ChunkRow]:
        """Prepare the evictions behind chunks of prompts."""
        chunks = step.decisions.chunks
        if not chunks:
            return []
        rows = []
        bounds = common.query_start_loc_cpu.tolist()
        for row, req_id in enumerate(step.req_ids):
            if req_id in chunks:
                plan = chunks[req_id].plan
                block_ids = self._block_ids(common, row, plan.num_tokens)
                eviction = self._resident_eviction(req_id, plan.num_tokens, block_ids, plan.per_token)
                step.again[req_id] = eviction
                rows.append(ChunkRow(self._watched[req_id], bounds[row], bounds[row + 1], eviction))
        return rows

    def _row_req_ids(self, common: CommonAttentionMetadata) -> list[str]:
        if common.req_idx is not None:  # model runner V2
            return [self._runner.req_states.index_to_req_id[index] for index in common.req_idx.tolist()]
        return list(self._runner.input_batch.req_ids[: common.num_reqs])

    def _prefill_rows(self, common: CommonAttentionMetadata, step: Step) -> list[PrefillRow]:
        decisions = step.decisions
        if not (decisions.prefilling or decisions.ending):
            return []
        bounds = common.query_start_loc_cpu.tolist()
        rows: list[PrefillRow] = []
        for row, req_id in enumerate(step.req_ids):
            end = decisions.ending.get(req_id)
            request = self._watched.get(req_id)
            # a draft has none if its policy could not be made
            if request is None or (req_id not in decisions.prefilling and (end is None or end.is_late)):
                continue
            kv_len = step.num_tokens[req_id]
            block_ids = self._block_ids(common, row, kv_len)
            eviction = None
            if end is not None:
                eviction = Eviction(request.method, end.plan, self.pool, block_ids, self._fresh(end))
                step.evictions[req_id] = eviction
            end_token = bounds[row + 1] - self.num_extra_tokens
            rows.append(PrefillRow(request, bounds[row], end_token, block_ids, kv_len, eviction))
            if request.auto_budget is not None:
                step.auto_rows.append(rows[-1])
            if end is not None and request.num_pseudo_tokens:
                step.pseudo_rows.append(rows[-1])
        return rows

    def _watch(self, req_id: str, config: EvictionConfig) -> None:
        method = config.method()
        request = WatchedRequest(req_id, method, self.pool.num_layers, config.auto_budget())
        if method.watches_answer:
            self.ring.slots.take(req_id)
        self._watched[req_id] = request

    def _block_ids(self, common: CommonAttentionMetadata, row: int, num_tokens: int) -> torch.Tensor:
        """Return [num_blocks] int64, a copy of the block table of a row up to ``num_tokens`` tokens."""
        num_blocks = cdiv(num_tokens, self.pool.block_size)
        return common.block_table_tensor[row, :num_blocks].to(torch.int64)

    def _fresh(self, end: PrefillEnd) -> torch.Tensor | None:
        ids = end.fresh_block_ids
        return None if ids is None else to_device(np.array(ids, dtype=np.int64), self.pool.pages.device)

    def fill_holes(self, rows: StepRows, layer: int) -> None:
        """Before attention reads a layer: new tokens of some requests go where those were that they replace."""
        self._replacing.fill_holes(rows.replacements, layer)

    def remember(self, rows: StepRows, layer: int, query: torch.Tensor) -> None:
        """After a layer's attention: keep those of its queries [num_tokens, num_heads, head_size] that an eviction will
        ask for.
        """
        if rows.remembered is not None:
            is_first = self.ring.num_bytes == 0
            self.ring.write(layer, query, rows.remembered)
            if is_first:
                logger.info(
                    "Eviction during decode keeps the last queries of answers, in %.1f MiB beside the KV cache",
                    self.ring.num_bytes / 2**20,
                )

    def observe(
        self,
        row: PrefillGroup | PrefillRow | ChunkRow,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        """Show a layer's queries and outputs [num_tokens, num_heads, head_size] to one row of the batch, or to some."""
        doing = f"scoring layer {layer}"
        if not isinstance(row, PrefillGroup):
            self.failures.ask(row.request.req_id, doing, self._observe, row, layer, query, output, scale)
            return
        if any(req_id in self.failures for req_id in row.req_ids):
            row.break_up()
        if not row.is_whole:
            for one in row.rows:
                self.observe(one, layer, query, output, scale)
            return
        weights = self._weights.of(layer, row.rows[0].request.needs)
        if not self.failures.together(doing, row.observe, LayerPass(self.pool, layer, query, output, scale, weights)):
            row.break_up()
            for one in row.rows:
                self.failures.ask(one.request.req_id, doing, self.step.evictions[one.request.req_id].score_waiting)

    def _observe(
        self, row: PrefillRow | ChunkRow, layer: int, query: torch.Tensor, output: torch.Tensor, scale: float
    ) -> None:
        row.observe(LayerPass(self.pool, layer, query, output, scale, self._weights.of(layer, row.request.needs)))
