"""The worker's side of eviction: which rows of a batch are evicted, which are to be, and where their pages are."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, ClassVar, TypeVar

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.readers import Reader
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.messages import STEP, EvictionReport, PrefillEnd, StepEvictions
from vllm_kvevict.engine.worker.agreement import Workers
from vllm_kvevict.engine.worker.answers import Answers
from vllm_kvevict.engine.worker.auto_budgets import AutoBudgets
from vllm_kvevict.engine.worker.choosing import choose_kept, in_groups
from vllm_kvevict.engine.worker.commands import Commands, without
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.prefills import Prefill, PrefillRow, look
from vllm_kvevict.engine.worker.pseudo_passes import PseudoPasses
from vllm_kvevict.engine.worker.replacing import Replacing
from vllm_kvevict.engine.worker.rows import BatchFolder, StepRows, longest_lens
from vllm_kvevict.engine.worker.side_memory import Held
from vllm_kvevict.engine.worker.step import Step, none, num_tokens_after
from vllm_kvevict.engine.worker.watched import LayerPass, WatchedRequest, keep_last
from vllm_kvevict.eviction.per_token import TokenEvictor
from vllm_kvevict.eviction.prompt import Eviction, Evictions
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.policies import Need

_Evictions = TypeVar("_Evictions", Evictions, ResidentEvictions)


class EvictionBridge:
    """Knows, in every step, the requests behind the rows. One per model; its attention builder asks it.

    step:     the present one, or the last
    failures: of what a third party may have written

    num_extra_tokens: tokens of a row beyond those that the scheduler counts
    """

    num_extra_tokens: ClassVar[int] = 0

    def __init__(self, runner: Any, pool: PagePool, layer_names: list[str], held: Held) -> None:
        """held: the memory beside the pool"""
        self._runner = runner
        self._weights = held.weights
        self.pool = pool
        self.readers, self.layer_index = held.readers, held.readers.layer_index
        config, device = runner.vllm_config, pool.pages.device
        self.held = held
        self.page_table, self.ring, self.residents = held.page_table, held.ring, held.residents
        self._folder = BatchFolder(pool.num_kv_heads, 1 + config.num_speculative_tokens, device)
        self._watched: dict[str, WatchedRequest] = {}
        self.step = none()
        self.failures = Failures()
        num_heads = config.model_config.get_num_attention_heads(config.parallel_config)
        self._num_heads = num_heads * max(self.readers.counts)  # the most that a policy sees of a layer
        self._workers = Workers(config.parallel_config)
        self._commands = Commands()
        tokens = TokenEvictor(pool, self.page_table, self.residents, self.ring, held.holes)
        self._replacing = Replacing(tokens, self.page_table, self.failures)
        self._answers = Answers(pool, self.page_table, self.residents, self.ring, self.failures)
        self._auto_budgets = AutoBudgets(runner, self.failures, self._workers)
        self._pseudo_passes = PseudoPasses(runner, pool, layer_names, self.failures)

    def forget_weights(self) -> None:
        """The model has new weights: what policies read of the old ones is of no use any more."""
        self._weights.forget()

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

        What a third party may have written comes first. When all workers know what of it failed, tokens move; and who
        has run out of memory over that says so.
        """
        step = self.step
        self._choose(step)
        evicted = self._commands.evicted() if self._workers.are_several else []
        self._workers.agree(self.failures, evicted)
        seconds = self._evict(step)
        self._workers.agree(self.failures, evicted)
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
        if step.ahead:
            self._pseudo_passes.score(step.ahead, self._weights)
        self._observe_answers(step)
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
            self._move(self._compact, req_ids, evictions)
        for req_id, eviction in step.evictions.items():
            seconds[req_id] = eviction.seconds + self._watched[req_id].seconds
            if not step.decisions.ending[req_id].goes_on:
                self._stop_watching(req_id)
        for group in step.again:
            for part in group.parts or [group]:
                self._move(self._evict_again, part.req_ids, part.evictions)
                seconds |= dict.fromkeys(part.req_ids, part.evictions.seconds / len(part.req_ids))
            for req_id in group.req_ids:
                if not step.decisions.chunks[req_id].goes_on:
                    self._stop_watching(req_id)
        for req_ids, answers in step.answers:
            self._move(self._evict_again, req_ids, answers)
            seconds |= dict.fromkeys(req_ids, answers.seconds / len(req_ids))
        return seconds

    def _move(self, how: Callable[[list[str], _Evictions], None], req_ids: list[str], evictions: _Evictions) -> None:
        """Carry out what was chosen for some requests. They end if memory runs out: it is in their own blocks only."""
        if not all(req_id in self.failures for req_id in req_ids):
            with self.failures.of_ours(req_ids, "moving what is kept"):
                how(req_ids, evictions)

    def _evict_again(self, req_ids: list[str], evictions: ResidentEvictions) -> None:
        """Carry out evictions after the first ones: of blocks that answers have filled, or behind chunks of prompts."""
        evictions.compact()
        for req_id, num_tokens in zip(req_ids, evictions.num_tokens, strict=True):
            self._watched[req_id].num_tokens = num_tokens
        self.page_table.shrink(req_ids, evictions.num_tokens, evictions.per_token)
        if evictions.per_token:
            spans = [self._watched[req_id].spans for req_id in req_ids]
            self._replacing.add(req_ids, evictions.method, spans, evictions.next_victims)

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
        evictions.compact()
        members, requests = evictions.members, [self._watched[req_id] for req_id in req_ids]
        plans = [eviction.plan for eviction in members]
        self.page_table.add(req_ids, evictions.pages, plans, [eviction.full_block_ids for eviction in members])
        if not requests[0].method.schedule.is_bounded:
            return
        evictions.note(self.residents, [request.take_states() for request in requests])
        victims = [eviction.next_victims for eviction in members if eviction.next_victims is not None]
        if victims:
            spans = [request.spans for request in requests]
            self._replacing.add(req_ids, requests[0].method, spans, torch.stack(victims))

    def _observe_answers(self, step: Step) -> None:
        """Show policies the queries since the last full block of requests whose prompt was not evicted, and score
        those that are to be evicted now.
        """
        decisions = step.decisions
        due = {
            req_id: num_tokens
            for req_id, num_tokens in decisions.growing.items()
            if req_id in self.ring.slots and Need.ALL_QUERIES in self._watched[req_id].needs
        }
        for req_id, end in decisions.ending.items():
            if end.is_late:
                due[req_id] = end.plan.num_tokens
                step.evictions[req_id] = self._first_eviction(req_id, end, step)
        due = {req_id: num_tokens for req_id, num_tokens in due.items() if req_id not in self.failures}
        if not due:
            return
        queries, answers = self._answers.new_queries([self._watched[req_id] for req_id in due], list(due.values()))
        rows = [
            PrefillRow(
                row.request, row.start, row.end, row.kv_len, step.block_ids[row.req_id], step.evictions.get(row.req_id)
            )
            for row in answers
        ]
        prefills = in_groups(rows, step, self.pool, self._num_heads)
        for layer, of_layer in enumerate(queries):
            self.observe(prefills, self.readers.all_of(layer), of_layer, of_layer, self._weights.scale(layer))

    def _first_eviction(self, req_id: str, end: PrefillEnd, step: Step) -> Eviction:
        request, fresh = self._watched[req_id], step.fresh.get(req_id)
        request.spans = end.spans
        return Eviction(request.method, end.plan, self.pool, step.block_ids[req_id], fresh, end.spans)

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
        step.stage_blocks(common.block_table_tensor, self.pool)
        prefills = in_groups(self._prefill_rows(common, step), step, self.pool, self._num_heads)
        query_start_loc = common.query_start_loc_cpu.numpy()[: len(req_ids) + 1]
        remembered = self.ring.to_write(req_ids, query_start_loc, common.seq_lens)
        if not split.evicted and not prefills and remembered is None:
            return None
        if not split.evicted:
            return StepRows(split, prefills, remembered, [])
        prefills += self._answers.chunk_groups(step, self._watched, common.query_start_loc_cpu.tolist())
        step.replacements = self._replacing.rows(req_ids, common)
        return StepRows(split, prefills, remembered, step.replacements)

    def _check_lengths(self, common: CommonAttentionMetadata) -> None:
        if common.seq_lens_cpu_upper_bound is not None:
            self.step.check_lengths(longest_lens(common))

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
            eviction = None
            if end is not None:
                eviction = step.evictions[req_id] = self._first_eviction(req_id, end, step)
            block_ids, kv_len = step.block_ids[req_id], step.num_tokens[req_id]
            end_token = bounds[row + 1] - self.num_extra_tokens
            looks_ahead = end is not None and request.num_pseudo_tokens > 0
            rows.append(PrefillRow(request, bounds[row], end_token, kv_len, block_ids, eviction, looks_ahead))
            if request.auto_budget is not None:
                step.auto_rows.append(rows[-1])
        return rows

    def _watch(self, req_id: str, config: EvictionConfig) -> None:
        method = config.method()
        self._weights.check(config.policy, traits_of(method.policy).needs)
        request = WatchedRequest(req_id, method, self.readers, config.auto_budget())
        if method.watches_answer:
            self.ring.slots.take(req_id)
        self._watched[req_id] = request

    def fill_holes(self, rows: StepRows, layer: int) -> None:
        """Before attention reads a layer: new tokens of some requests go where those were that they replace."""
        self._replacing.fill_holes(rows.replacements, layer)

    def remember(self, rows: StepRows, reader: Reader, query: torch.Tensor) -> None:
        """After a layer's attention: keep those of its queries [num_tokens, num_heads, head_size] that an eviction will
        ask for.
        """
        if rows.remembered is not None:
            self.ring.write(reader.number, query, rows.remembered)

    def observe(
        self,
        prefills: Sequence[Prefill],
        reader: Reader,
        query: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        """Show a layer's queries and outputs [num_tokens, num_heads, head_size] to those rows that are looked at.

        Those of layers that read the same pages are shown together, when the last of them has run.
        """
        if not prefills:
            return
        earlier = self.step.earlier.setdefault(reader.layer, [])
        ran = LayerPass(self.pool, reader, self.readers, query, output, scale, self._weights, earlier)
        rows = {row.req_id: row for prefill in prefills for row in prefill.rows}
        with self.failures.of_ours(rows, "keeping the last queries"):
            keep_last([*rows.values()], ran, self.ring)
        if not reader.is_last:
            return
        del self.step.earlier[reader.layer]
        for prefill in prefills:
            look(prefill, self.failures, f"scoring layer {reader.layer}", lambda part: part.observe(ran))
