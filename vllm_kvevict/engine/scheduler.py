"""vLLM's schedulers, which also decide when a prompt is evicted and how many blocks it keeps."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from typing import Any

from vllm.outputs import RequestError
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_kvevict.cache.plan import (
    EvictionPlan,
    budget_blocks,
    cdiv,
    plan_eviction,
    plan_first_eviction,
    plan_per_token,
)
from vllm_kvevict.config import AUTO, EvictionConfig
from vllm_kvevict.engine.draft import split_draft_layers
from vllm_kvevict.engine.install import eviction_config
from vllm_kvevict.engine.metrics import EvictionRecord, Gauges, pack
from vllm_kvevict.engine.requests import chunk_blocks, request_config
from vllm_kvevict.engine.spec import (
    EvictionManager,
    PrivateBlocks,
    RequestEviction,
    bounded_blocks,
    cache_hits_up_to,
)
from vllm_kvevict.engine.step import REPORTS, STEP, EvictionReport, PrefillEnd, StepEvictions

logger = logging.getLogger("vllm.kvevict")


class EvictionMixin(Scheduler):
    """Plans evictions while it schedules, and learns from the workers that they happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = eviction_config(self.vllm_config)
        if config is None:
            raise ValueError("additional_config: 'kv_eviction' is missing though the eviction scheduler was named")
        self._eviction_config = config
        self._evictions: dict[str, RequestEviction] = {}
        self._unplanned: set[str] = set()
        self._bounded: set[str] = set()
        self._records: list[EvictionRecord] = []
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for manager in managers:
            if not isinstance(manager, PrivateBlocks):
                raise RuntimeError(f"expected managers that keep blocks private, got {manager!r}")
            manager.evictions = self._evictions
        # one group of layers is evicted; the workers have checked this
        (self._manager,) = (manager for manager in managers if isinstance(manager, EvictionManager))
        group = self.kv_cache_config.kv_cache_groups[self._manager.kv_cache_group_id]
        layer_names, _ = split_draft_layers(group.layer_names)
        self._manager.chunk_blocks = chunk_blocks(self.vllm_config)
        self._pages_per_block = len(layer_names) * group.kv_cache_spec.num_kv_heads
        self._gauges = Gauges()
        self._log_concurrency()

    def _log_concurrency(self) -> None:
        """Say how many requests of the longest kind can decode at once, next to what vLLM says of whole ones."""
        config, longest = self._eviction_config, self.vllm_config.model_config.max_model_len
        block_size, num_blocks = self._manager.block_size, self.kv_cache_config.num_blocks
        others = self._num_other_blocks(longest)
        method = config.method()
        plan = plan_eviction(longest, config.most_kept, block_size, method.min_tokens, method.during_decode)
        whole = cdiv(longest, block_size)
        kept = whole if plan is None else plan.num_kept_blocks
        logger.info(
            "Maximum concurrency for prompts of %s tokens: %.2fx once they are evicted, %.2fx before",
            f"{longest:,}",
            num_blocks / (kept + others),
            num_blocks / (whole + others),
        )

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Every prefill starts here, resumed ones too: decide whether it will be evicted, and cap its cache hit."""
        self._evictions.pop(request.request_id, None)
        self._bounded.discard(request.request_id)
        eviction = self._will_evict(request)
        if eviction is None:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        self._evictions[request.request_id] = eviction
        self._unplanned.add(request.request_id)
        with cache_hits_up_to(eviction.max_cached_tokens):
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _will_evict(self, request: Request) -> RequestEviction | None:
        if request.resumable:
            logger.warning(
                "request %s is a streaming-input session: kept whole, since more of its prompt is to come",
                request.request_id,
            )
            return None
        block_size = self._manager.block_size
        config = request_config(self._eviction_config, request.sampling_params, block_size)
        if config is None:
            return None
        method = config.method()
        num_deferred = method.policy.num_deferred
        sizes = (request.num_tokens + num_deferred, config.most_kept, block_size, method.min_tokens)
        auto, is_late = config.auto_budget(), num_deferred > 0
        plan = plan_eviction(*sizes, method.during_decode) if auto is None else auto.plan(sizes[0], block_size)
        if method.per_token:
            plan = plan_per_token(*sizes)
            is_late = plan.num_tokens > request.num_tokens
        elif plan is None and method.during_decode:
            plan, is_late = plan_first_eviction(*sizes), True
        # the last token of an answer is never computed
        if is_late and plan is not None and request.num_prompt_tokens + request.max_tokens <= plan.num_tokens:
            return None
        if plan is None:
            return None
        # fresh blocks are for the prefix cache's sake; a prompt that leaves no room for them would wait for ever
        num_tokens, num_chunk_blocks = plan.num_tokens + self.num_lookahead_tokens, None
        num_needed = cdiv(num_tokens, block_size) + plan.num_full_blocks
        if method.during_prefill:
            num_chunk_blocks = budget_blocks(*sizes, during_decode=True) - 1
            num_needed = min(num_needed, bounded_blocks(num_chunk_blocks, self._manager.chunk_blocks))
        num_needed += self._num_other_blocks(num_tokens)
        # one block is vLLM's null block, and one may be needed for the answer before the others are back
        in_place = not self._manager.enable_caching or num_needed > self.kv_cache_config.num_blocks - 2
        return RequestEviction(config, plan, in_place, is_late, num_chunk_blocks)

    def _num_other_blocks(self, num_tokens: int) -> int:
        """Return how many blocks a request of ``num_tokens`` needs at most in layers that are not evicted."""
        return sum(
            manager.kv_cache_spec.max_admission_blocks_per_request(self.vllm_config.max_in_flight_tokens, num_tokens)
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if manager is not self._manager
        )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        setattr(output, STEP, self._step_evictions(output))
        return output

    def _step_evictions(self, output: SchedulerOutput) -> StepEvictions:
        step = StepEvictions()
        self._unplanned &= self._evictions.keys()  # those that ended early are gone
        self._bounded &= self._evictions.keys()
        for req_id in self._bounded & output.num_scheduled_tokens.keys():
            self._plan_next_eviction(self.requests[req_id], self._evictions[req_id], step)
        for req_id in self._unplanned & output.num_scheduled_tokens.keys():
            self._plan_first_eviction(self.requests[req_id], self._evictions[req_id], step)
        return step

    def _plan_next_eviction(self, request: Request, eviction: RequestEviction, step: StepEvictions) -> None:
        req_id, num_tokens = request.request_id, request.num_computed_tokens  # with what this step computes
        if not eviction.has_prefilled:
            eviction.has_prefilled = not request.is_prefill_chunk
            eviction.go_on(num_tokens)
            step.chunks[req_id] = eviction.plan
            if eviction.has_prefilled and not eviction.config.method().during_decode:
                self._bounded.remove(req_id)
        elif num_tokens % self._manager.block_size == 0:
            step.shrinking[req_id] = num_tokens

    def _plan_first_eviction(self, request: Request, eviction: RequestEviction, step: StepEvictions) -> None:
        num_tokens = request.num_computed_tokens
        is_full = num_tokens >= eviction.plan.num_tokens
        chunk_plan = eviction.chunk_plan(num_tokens) if request.is_prefill_chunk and not is_full else None
        if chunk_plan is not None:
            self._evict_first(request, eviction, chunk_plan, step, is_late=False)
        elif request.is_prefill_chunk or (eviction.is_late and not eviction.has_prefilled and not is_full):
            step.prefilling[request.request_id] = eviction.config
            eviction.has_prefilled = not request.is_prefill_chunk
        elif not is_full:
            if num_tokens % eviction.plan.block_size == 0:
                step.growing[request.request_id] = num_tokens
        else:
            is_late, eviction.has_prefilled = eviction.has_prefilled, True
            plan = eviction.final_plan(num_tokens if is_late else request.num_tokens)
            self._evict_first(request, eviction, plan, step, is_late)

    def _evict_first(
        self, request: Request, eviction: RequestEviction, plan: EvictionPlan, step: StepEvictions, is_late: bool
    ) -> None:
        eviction.begin(plan)
        self._unplanned.remove(request.request_id)
        method = eviction.config.method()
        if method.during_decode or (method.during_prefill and not eviction.has_prefilled):
            self._bounded.add(request.request_id)
        fresh = None if eviction.in_place else [block.block_id for block in eviction.fresh_blocks or []]
        step.ending[request.request_id] = PrefillEnd(eviction.config, plan, fresh, is_late)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        step: StepEvictions = getattr(scheduler_output, STEP)
        reports: dict[str, EvictionReport] = getattr(model_runner_output, REPORTS, {})
        for req_id, end in step.ending.items():
            plan = self._chosen_plan(req_id, end, reports)
            if self._is_done(req_id, reports, plan):
                self._count(req_id, end.config, plan, reports[req_id].seconds)
        for req_id, plan in step.chunks.items():
            if self._is_done(req_id, reports, plan) and self._count_in_use(req_id, plan):
                self._records.append(_evicted_again(self._evictions[req_id], plan))
        for req_id in step.shrinking:
            if self._is_done(req_id, reports, None) and req_id in self._evictions:  # it may have been aborted meanwhile
                config = self._evictions[req_id].config
                self._records.append(_shrunk(config, self._manager.block_size))
        for req_id in reports.keys() - step.ending.keys() - step.chunks.keys() - step.shrinking.keys():
            self._end_failed(req_id, reports[req_id])  # what is evicted token by token is reported only if it fails
        return super().update_from_output(scheduler_output, model_runner_output)

    def _chosen_plan(self, req_id: str, end: PrefillEnd, reports: dict[str, EvictionReport]) -> EvictionPlan:
        """Return the plan of an eviction, the one that a worker has chosen where that was its task."""
        plan, chosen = end.plan, reports[req_id].plan if req_id in reports else None
        if end.config.budget != AUTO or chosen is None or chosen.num_kept_blocks > plan.num_kept_blocks:
            return plan
        if replace(chosen, num_kept_blocks=plan.num_kept_blocks) != plan:
            return plan
        eviction = self._evictions.get(req_id)
        if eviction is not None and eviction.plans and eviction.plans[0] is plan:  # not aborted meanwhile
            eviction.settle(chosen)
        return chosen

    def _is_done(self, req_id: str, reports: dict[str, EvictionReport], plan: EvictionPlan | None) -> bool:
        """Return whether a worker has evicted as planned.

        Raises RuntimeError if the worker has done something else.
        """
        if req_id not in reports or reports[req_id].plan != plan:
            raise RuntimeError(f"request {req_id}: the worker did not evict as planned ({plan})")
        return self._end_failed(req_id, reports[req_id])

    def _end_failed(self, req_id: str, report: EvictionReport) -> bool:
        """End a request whose eviction failed; return whether it did not."""
        if report.failure is not None:
            logger.error("request %s ends with an error, its eviction failed: %s", req_id, report.failure)
            # vLLM's own list of requests that end with an error once this step's tokens are counted; 0.33 notes why
            ending: set[str] | dict[str, RequestError] = self.grammar_compile_error_reqs
            if isinstance(ending, dict):
                why = "the KV eviction of this request failed; the server's log says why"
                ending[req_id] = RequestError("kv_eviction_failed", why)
            else:
                ending.add(req_id)
        return report.failure is None

    def _count(self, req_id: str, config: EvictionConfig, plan: EvictionPlan, seconds: float) -> None:
        self._count_in_use(req_id, plan)
        self._records.append(_evicted(config, plan, seconds))
        if self._eviction_config.log_requests:
            logger.info("%s", json.dumps(_log_line(req_id, config, plan, seconds)))

    def _count_in_use(self, req_id: str, plan: EvictionPlan) -> bool:
        """Count what a request holds since ``plan``; False if it was aborted or preempted while the step ran."""
        eviction = self._evictions.get(req_id)
        if eviction is None or not any(each is plan for each in eviction.plans):
            return False
        if eviction.counted is not None:
            self._manager.in_use.add(eviction.counted, sign=-1)
        eviction.counted = plan
        self._manager.in_use.add(plan)
        return True

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        freed, self._manager.newly_freed = self._manager.newly_freed, []
        records = self._records + _freed(freed)
        self._records = []
        in_use = self._manager.in_use
        gauges = Gauges(in_use.tokens, in_use.blocks * self._pages_per_block)
        if stats is not None and (records or gauges != self._gauges):
            self._gauges = gauges
            stats.kv_connector_stats = pack(records, gauges)
        return stats


class EvictionScheduler(EvictionMixin):
    """Eviction on vLLM's synchronous scheduler."""


class AsyncEvictionScheduler(EvictionMixin, AsyncScheduler):
    """Eviction on vLLM's asynchronous scheduler."""


def _evicted(config: EvictionConfig, plan: EvictionPlan, seconds: float) -> EvictionRecord:
    return EvictionRecord(
        config.policy,
        config.allocator_name,
        evicted_tokens=plan.num_evicted_tokens,
        kept_fraction=plan.num_kept_tokens / plan.num_tokens,
        seconds=seconds,
    )


def _evicted_again(eviction: RequestEviction, plan: EvictionPlan) -> EvictionRecord:
    before = eviction.plans[eviction.plans.index(plan) - 1]
    num_tokens = plan.num_evicted_tokens - before.num_evicted_tokens
    return EvictionRecord(eviction.config.policy, eviction.config.allocator_name, evicted_tokens=num_tokens)


def _shrunk(config: EvictionConfig, num_tokens: int) -> EvictionRecord:
    return EvictionRecord(config.policy, config.allocator_name, evicted_tokens=num_tokens, during_decode=True)


def _log_line(req_id: str, config: EvictionConfig, plan: EvictionPlan, seconds: float) -> dict[str, Any]:
    return {
        "kv_eviction": req_id,
        "policy": config.policy,
        "allocator": config.allocator_name,
        "prompt_tokens": plan.num_tokens,
        "kept_tokens": plan.num_kept_tokens,
        "kept_blocks": plan.num_kept_blocks,
        "freed_blocks": plan.first_kept_block,
        "milliseconds": round(1e3 * seconds, 2),
    }


def _freed(freed: list[tuple[EvictionConfig, int]]) -> list[EvictionRecord]:
    blocks: Counter[tuple[str, str]] = Counter()
    for config, num_blocks in freed:
        blocks[config.policy, config.allocator_name] += num_blocks
    return [EvictionRecord(*labels, freed_blocks=count) for labels, count in blocks.items()]
