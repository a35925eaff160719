"""vLLM's schedulers, which also decide when a prompt is evicted and how many blocks it keeps."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

from vllm.outputs import RequestError
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.config import AUTO, EvictionConfig
from vllm_kvevict.engine.checks import (
    check_config,
    check_fits,
    check_prompt,
    check_protected,
    empty_cache,
    says_none,
)
from vllm_kvevict.engine.fit import SlidingWindow
from vllm_kvevict.engine.messages import (
    REPORTS,
    STEP,
    EvictionRecord,
    EvictionReport,
    Gauges,
    PrefillEnd,
    StepEvictions,
    pack,
)
from vllm_kvevict.engine.models import split_draft_layers
from vllm_kvevict.engine.multimodal import spans_of
from vllm_kvevict.engine.reserve import reserve_of
from vllm_kvevict.engine.scheduler.life import RequestLife, State
from vllm_kvevict.engine.scheduler.managers import EvictionManager, PrivateBlocks, cache_hits_up_to, window_of
from vllm_kvevict.engine.scheduler.seats import Seats
from vllm_kvevict.engine.settings import eviction_config, request_config
from vllm_kvevict.eviction.protection import num_in
from vllm_kvevict.foreign.code import contained, said

logger = logging.getLogger("vllm.kvevict")

NUM_UNREAD = 1
"""A request whose answer has at most so many tokens is not evicted if it fits: nothing would read what is kept."""


class EvictionSchedulerMixin(Scheduler):
    """Plans evictions while it schedules, and learns from the workers that they happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = eviction_config(self.vllm_config)
        if config is None:
            raise ValueError("additional_config: 'kv_eviction' is missing though the eviction scheduler was named")
        self._eviction_config = config
        self._lives: dict[str, RequestLife] = {}
        self._undecided: set[str] = set()  # most requests of a step decode, and need nothing
        self._records: list[EvictionRecord] = []
        self._capped: set[str] = set()
        self._num_cut_short = 0
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for manager in managers:
            if not isinstance(manager, PrivateBlocks):
                raise RuntimeError(f"expected managers that keep blocks private, got {manager!r}")
            manager.lives = self._lives
        # one group of layers is evicted; the workers have checked this
        (self._manager,) = (manager for manager in managers if isinstance(manager, EvictionManager))
        group = self.kv_cache_config.kv_cache_groups[self._manager.kv_cache_group_id]
        layer_names, _ = split_draft_layers(group.layer_names)
        num_blocks = self.kv_cache_config.num_blocks - 1  # without vLLM's null block
        is_shared = self._manager.enable_caching
        self._cache = empty_cache(self.vllm_config, num_blocks, self._windows(), is_shared)
        self._manager.cache = self._cache
        reserve = reserve_of(self.vllm_config)
        num_seats = 0 if reserve is None else reserve.num_seqs(self.kv_cache_config.num_blocks, group.kv_cache_spec)
        self._seats = Seats(num_seats)
        self._pages_per_block = len(layer_names) * group.kv_cache_spec.num_kv_heads
        self._gauges = Gauges()
        self._log_concurrency()

    def _windows(self) -> tuple[SlidingWindow, ...]:
        groups, num_in_flight = self.kv_cache_config.kv_cache_groups, self.vllm_config.max_in_flight_tokens
        windows = (window_of(group.kv_cache_spec, num_in_flight) for group in groups)
        return tuple(window for window in windows if window is not None)

    def _log_concurrency(self) -> None:
        """Say how many requests of the longest kind can decode at once, next to what vLLM says of whole ones."""
        config, longest = self._eviction_config, self.vllm_config.model_config.max_model_len
        prefill = self._cache.plan_prefill(config, longest, longest)
        num_blocks, whole = self.kv_cache_config.num_blocks, self._cache.num_needed(None, longest)
        kept = whole if prefill is None or prefill.is_late else whole - prefill.eviction.first_kept_block
        logger.info(
            "Maximum concurrency for prompts of %s tokens: %.2fx once they are evicted, %.2fx before",
            f"{longest:,}",
            num_blocks / kept,
            num_blocks / whole,
        )

    def add_request(self, request: Request) -> None:
        """Take a request in. One that asks for what cannot be done ends with an error at once.

        Front ends refuse those with a 400; there are others than ours, which do not.
        """
        super().add_request(request)
        if self.requests.get(request.request_id) is not request:  # more of a streaming-input session
            return
        if request.resumable:
            logger.warning(
                "request %s is a streaming-input session: kept whole, since more of its prompt is to come",
                request.request_id,
            )
        # what is raised is of the options, or of a third party's policy that they name
        with contained(partial(self._refuse, request.request_id)):
            life = self._life(request)
            self._limit_answer(request, life)
            if life is not None:
                self._lives[request.request_id] = life
                self._undecided.add(request.request_id)

    def _life(self, request: Request) -> RequestLife | None:
        """Return how a request that has arrived will be evicted, None if it will not.

        Raises ValueError for a wrong option, and whatever a policy raises.
        """
        if request.sampling_params is None:
            return None
        options = request.sampling_params.extra_args or {}
        config = request_config(self._eviction_config, options, self._manager.block_size)
        num_tokens = request.num_prompt_tokens
        is_unread = request.max_tokens <= NUM_UNREAD and self._cache.fits(None, num_tokens)
        if config is None or request.resumable or is_unread:
            return None
        check_config(config, self.vllm_config)
        check_prompt(config, self.vllm_config, request.prompt_embeds is not None, bool(request.mm_features))
        spans = spans_of(config, request.mm_features)
        check_protected(config, self.vllm_config, num_tokens, num_in(spans))
        prefill = self._cache.plan_prefill(config, num_tokens, num_tokens, num_in(spans))
        # the last token of an answer is never computed
        if prefill is None or (prefill.is_late and num_tokens + request.max_tokens <= prefill.eviction.num_tokens):
            return None
        return RequestLife(config, config.method(), prefill, spans)

    def _limit_answer(self, request: Request, life: RequestLife | None) -> None:
        """Let an answer end where the cache can hold no more of it, as it does at the model's longest length.

        Raises ValueError if it cannot hold the prompt.
        """
        prefill = None if life is None else life.prefill
        check_fits(self._cache, prefill, request.num_prompt_tokens, says_none(request.sampling_params))
        # the last token is never computed
        wanted = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len) - 1
        if self._cache.fits(prefill, wanted):
            self._capped.discard(request.request_id)
        else:
            request.max_tokens = self._cache.longest(prefill) + 1 - request.num_prompt_tokens
            self._capped.add(request.request_id)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        super()._update_request_as_session(session, update)
        try:
            self._limit_answer(session, None)
        except ValueError as error:
            self._end_with_error(session.request_id, "kv_cache_exceeded", str(error))

    def _refuse(self, req_id: str, error: BaseException) -> None:
        self._end_with_error(req_id, "kv_eviction_refused", said(error))

    def _end_with_error(self, req_id: str, kind: str, why: str) -> None:
        logger.error("request %s ends with an error: %s", req_id, why)
        # vLLM's own list of requests that end with an error once a step's tokens are counted; 0.33 notes why
        ending: set[str] | dict[str, RequestError] = self.grammar_compile_error_reqs
        if isinstance(ending, dict):
            ending[req_id] = RequestError(kind, why)
        else:
            ending.add(req_id)

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Every prefill starts here, resumed ones too: decide how it will be evicted, and cap its cache hit."""
        life = self._lives.get(request.request_id)
        if life is None:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        sizes = request.num_prompt_tokens, request.num_tokens, num_in(life.spans)
        prefill = self._cache.plan_prefill(life.config, *sizes)
        if prefill is not None:  # a longer prefill of the same prompt is evicted as well
            life.start(prefill)
        with cache_hits_up_to(life.max_cached_tokens):
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM asks here how long a chunk of a prompt may be, and skips a request whose chunk has no token."""
        num_new = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if num_new and request.request_id in self._undecided:
            return self._lives[request.request_id].limit_chunk(num_computed_tokens, num_new)
        return int(num_new)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """vLLM asks here whether a waiting request can run. Those behind one that cannot may all the same."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        life = self._lives.get(request.request_id)
        return life is None or not life.method.watches_answer or self._seats.offer(request.request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._seats.forget_offers()
        output, step = super().schedule(*args, **kwargs), StepEvictions()
        setattr(output, STEP, step)
        self._seats.take(output.num_scheduled_tokens)
        for req_id in self._undecided & output.num_scheduled_tokens.keys():
            life = self._lives[req_id]
            # num_computed_tokens: with what this step computes
            life.scheduled(req_id, self.requests[req_id].num_computed_tokens, step)
            if life.is_decided:
                self._undecided.remove(req_id)
                self._seats.give_back(req_id)
        return output

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._seats.give_back(request.request_id)
        if (life := self._lives.get(request.request_id)) is not None:
            life.preempted()
            self._undecided.add(request.request_id)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)
        self._undecided.discard(request.request_id)
        self._seats.give_back(request.request_id)
        if (life := self._lives.pop(request.request_id, None)) is not None:
            life.finished()
        if request.request_id in self._capped:
            self._capped.remove(request.request_id)
            if request.num_output_tokens >= request.max_tokens:
                self._num_cut_short += 1
                logger.warning(
                    "request %s: its answer ends after %d tokens, the KV cache can hold no more of it; within its "
                    "budget an answer goes on with --kv-evict-during-decode",
                    request.request_id,
                    request.num_output_tokens,
                )
        return freed

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        step: StepEvictions = getattr(scheduler_output, STEP)
        reports: dict[str, EvictionReport] = getattr(model_runner_output, REPORTS, {})
        for req_id, end in step.ending.items():
            plan = self._chosen_plan(req_id, end, reports)
            if self._is_done(req_id, reports, plan):
                self._count(req_id, end.config, plan, reports[req_id].seconds)
        for req_id, chunk in step.chunks.items():
            life = self._life_in_step(req_id)
            if self._is_done(req_id, reports, chunk.plan) and life is not None:
                self._records.append(_evicted_again(life, chunk.plan))
                self._count_in_use(life, chunk.plan)
        for req_id in step.shrinking:
            life = self._life_in_step(req_id)
            if self._is_done(req_id, reports, None) and life is not None:
                self._records.append(_shrunk(life.config, self._manager.block_size))
        for req_id in reports.keys() - step.ending.keys() - step.chunks.keys() - step.shrinking.keys():
            self._learn(req_id, reports[req_id])  # what is evicted token by token is reported only if it fails
        return super().update_from_output(scheduler_output, model_runner_output)

    def _life_in_step(self, req_id: str) -> RequestLife | None:
        """Return the life of a request that a step has computed, None if it has ended or started again meanwhile."""
        request = self.requests.get(req_id)
        return None if request is None or request.num_stale_output_tokens else self._lives.get(req_id)

    def _chosen_plan(self, req_id: str, end: PrefillEnd, reports: dict[str, EvictionReport]) -> EvictionPlan:
        """Return the plan of an eviction, the one that a worker has chosen where that was its task."""
        plan, chosen = end.plan, reports[req_id].plan if req_id in reports else None
        if end.config.budget != AUTO or chosen is None or chosen.num_kept_blocks > plan.num_kept_blocks:
            return plan
        if replace(chosen, num_kept_blocks=plan.num_kept_blocks) != plan:
            return plan
        life = self._life_in_step(req_id)
        if life is not None:
            life.adopt(chosen)
        return chosen

    def _is_done(self, req_id: str, reports: dict[str, EvictionReport], plan: EvictionPlan | None) -> bool:
        """Return whether a worker has evicted as planned.

        Raises RuntimeError if the worker has done something else.
        """
        if req_id not in reports or reports[req_id].plan != plan:
            raise RuntimeError(f"request {req_id}: the worker did not evict as planned ({plan})")
        life = self._life_in_step(req_id)
        if life is not None and reports[req_id].failure is None:
            life.evicted()
        return self._learn(req_id, reports[req_id])

    def _learn(self, req_id: str, report: EvictionReport) -> bool:
        """Return whether an eviction has not failed; the request of one that has ends."""
        life = self._lives.get(req_id)
        if report.failure is not None and life is not None and life.state is not State.FAILED:
            life.failed()
            logger.error("request %s: its eviction failed: %s", req_id, report.failure)
            self._end_with_error(
                req_id, "kv_eviction_failed", "the KV eviction of this request failed; the server's log says why"
            )
        return report.failure is None

    def _count(self, req_id: str, config: EvictionConfig, plan: EvictionPlan, seconds: float) -> None:
        life = self._life_in_step(req_id)
        if life is not None:
            self._count_in_use(life, plan)
        self._records.append(_evicted(config, plan, seconds))
        if self._eviction_config.log_requests:
            logger.info("%s", json.dumps(_log_line(req_id, config, plan, seconds)))

    def _count_in_use(self, life: RequestLife, plan: EvictionPlan) -> None:
        """Count what a request holds since ``plan``."""
        if life.counted is not None:
            self._manager.in_use.add(life.counted, sign=-1)
        life.counted = plan
        self._manager.in_use.add(plan)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        freed, self._manager.newly_freed = self._manager.newly_freed, []
        records = self._records + _freed(freed)
        self._records = []
        in_use = self._manager.in_use
        gauges = Gauges(in_use.tokens, in_use.blocks * self._pages_per_block)
        if stats is not None and (records or gauges != self._gauges or self._num_cut_short):
            self._gauges = gauges
            stats.kv_connector_stats = pack(records, gauges, self._num_cut_short)
            self._num_cut_short = 0
        return stats


class EvictionScheduler(EvictionSchedulerMixin):
    """Eviction on vLLM's synchronous scheduler."""


class AsyncEvictionScheduler(EvictionSchedulerMixin, AsyncScheduler):
    """Eviction on vLLM's asynchronous scheduler."""


def _evicted(config: EvictionConfig, plan: EvictionPlan, seconds: float) -> EvictionRecord:
    return EvictionRecord(
        config.policy,
        config.allocator_name,
        evicted_tokens=plan.num_evicted_tokens,
        kept_fraction=plan.num_kept_tokens / plan.num_tokens,
        seconds=seconds,
    )


def _evicted_again(life: RequestLife, plan: EvictionPlan) -> EvictionRecord:
    before = life.evictions[life.evictions.index(plan) - 1]
    num_tokens = plan.num_evicted_tokens - before.num_evicted_tokens
    return EvictionRecord(life.config.policy, life.config.allocator_name, evicted_tokens=num_tokens)


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
