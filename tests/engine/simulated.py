"""Engines without a model: vLLM's core and our schedulers, over a worker that keeps the books of all blocks.

A step takes about a millisecond. What a slot of the KV cache would hold is one number: a hash of the text up to its
token, salted where a request is private, so that memory of somebody else, or of another time, is noticed when it is
read. ``SimulatedWorker`` and ``SimulatedEngine.check`` say what holds in every step.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine import core as engine_core
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_kvevict import kv_eviction_args, register
from vllm_kvevict.cache.plan import EvictionPlan, cdiv
from vllm_kvevict.config import AUTO, EvictionConfig
from vllm_kvevict.engine.checks import check_config
from vllm_kvevict.engine.frontend.requests import with_checked_options
from vllm_kvevict.engine.messages import REPORTS, STEP, EvictionReport, PrefillEnd, StepEvictions
from vllm_kvevict.engine.refusals import of_config, refuse
from vllm_kvevict.engine.scheduler.managers import EvictionSpec, with_eviction_managers
from vllm_kvevict.engine.settings import FIELD

BLOCK = 32
WINDOW = 48
VOCAB_SIZE = 512


class _RunnerV1(VllmConfig):
    use_v2_model_runner = False


class _RunnerV2(VllmConfig):
    use_v2_model_runner = True


@dataclass(frozen=True)
class Setting:
    """What one engine is started with. Names are vLLM's.

    eviction:    the server's, as ``kv_eviction_args`` takes it
    num_blocks:  of the cache, vLLM's null block included
    num_stages:  of the pipeline
    has_windows: whether four of six layers see a window of 48 tokens, as in ``tests.tiny_gemma``; without, there are
                 two layers and both see everything
    """

    num_blocks: int
    eviction: dict[str, Any] = field(default_factory=lambda: {"policy": "snapkv", "budget": 96})
    max_model_len: int = 2048
    max_num_batched_tokens: int = 256
    max_num_seqs: int = 16
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    enable_prefix_caching: bool = True
    async_scheduling: bool = False
    num_stages: int = 1
    has_windows: bool = False
    uses_v2_runner: bool = False


@lru_cache(maxsize=1)
def _base_config(model: Path) -> VllmConfig:
    register()
    args = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        block_size=BLOCK,
        **kv_eviction_args("snapkv", 96),
    )
    return args.create_engine_config()


def make_config(model: Path, setting: Setting) -> VllmConfig:
    """Return the configuration of an engine.

    Raises ValueError where the plugin refuses to start.
    """
    config = copy.deepcopy(_base_config(model))
    config.__class__ = _RunnerV2 if setting.uses_v2_runner else _RunnerV1
    scheduler, cache = config.scheduler_config, config.cache_config
    for name in (
        "max_num_batched_tokens",
        "max_num_seqs",
        "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive",
        "async_scheduling",
    ):
        setattr(scheduler, name, getattr(setting, name))
    scheduler.scheduler_cls = None
    cache.enable_prefix_caching = setting.enable_prefix_caching
    cache.num_gpu_blocks_override = setting.num_blocks
    config.model_config.max_model_len = setting.max_model_len
    if setting.has_windows:  # as ``layer_specs`` has it
        text_config = config.model_config.hf_text_config
        text_config.layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        text_config.sliding_window = WINDOW
    config.parallel_config.pipeline_parallel_size = setting.num_stages
    config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    eviction = EvictionConfig.parse(setting.eviction)
    config.additional_config = {FIELD: eviction.model_dump(exclude_unset=True)}
    refuse(of_config(config))
    eviction.check_block_size(BLOCK)
    check_config(eviction, config)
    kind = "AsyncEvictionScheduler" if setting.async_scheduling else "EvictionScheduler"
    scheduler.scheduler_cls = f"vllm_kvevict.engine.scheduler.scheduler.{kind}"
    return config


def layer_specs(has_windows: bool) -> dict[str, KVCacheSpec]:
    """Return the cache of every layer, as our attention backends ask for it."""
    shape: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    whole = with_eviction_managers(FullAttentionSpec(**shape))
    kinds: list[KVCacheSpec] = [whole, whole]
    if has_windows:
        window = with_eviction_managers(SlidingWindowSpec(**shape, sliding_window=WINDOW))
        kinds = [window, window, whole] * 2
    return {f"model.layers.{index}.self_attn.attn": spec for index, spec in enumerate(kinds)}


@dataclass
class Row:
    """What a worker knows of one request.

    number:        tells this one from every other, and from itself before a preemption
    tokens:        the text, sampled tokens included
    tables:        block ids per cache group, as the scheduler has sent them
    num_computed:  tokens in the cache
    prompt_hashes: of a prompt that is no text, one for each of its embeddings
    observed:      end of the tokens whose queries a policy was shown, or that came from the prefix cache
    is_watched:    whether an eviction of it was announced
    whole_until:   tokens behind these were computed by looking at what an eviction has left; None: no eviction yet
    kept:          full blocks that the last eviction has filled
    fresh:         blocks that the first eviction was given
    first_own:     place in the table where the blocks begin that are used as the table says
    per_token:     whether each new token takes the slot of another one
    version:       evictions so far
    """

    number: int
    tokens: list[int]
    tables: list[list[int]]
    num_computed: int
    prompt_hashes: list[int]
    observed: int
    is_watched: bool = False
    whole_until: int | None = None
    kept: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    first_own: int = 0
    per_token: bool = False
    version: int = 0
    hashes: list[int] = field(default_factory=list)

    @property
    def is_evicted(self) -> bool:
        return self.whole_until is not None

    def content(self, start: int, stop: int) -> np.ndarray:
        """Return what the slots of tokens hold, [stop - start] int64."""
        for token in self.tokens[len(self.hashes) : stop]:
            self.hashes.append(hash((self.hashes[-1] if self.hashes else 0, token)))
        content = np.array(self.hashes[start:stop], dtype=np.int64)
        if self.whole_until is not None and self.whole_until < stop:
            content[max(self.whole_until - start, 0) :] ^= hash(("private", self.number))
        return content

    @property
    def kept_content(self) -> int:
        """What every slot of the kept blocks holds since the last eviction."""
        return hash(("kept", self.number, self.version))


def chunk_plan(chunk: Any) -> EvictionPlan:
    """Return the plan of an entry of ``StepEvictions.chunks``."""
    plan: EvictionPlan = getattr(chunk, "plan", chunk)
    return plan


@dataclass
class Flight:
    """A step whose output the scheduler has not processed yet: request -> number of its row and blocks in use."""

    blocks: dict[str, tuple[int, set[int]]]
    output: ModelRunnerOutput


class SimulatedWorker:
    """An executor with one worker, which obeys like a real one, moves no bytes and trusts nobody.

    Steps run in the order in which they are scheduled. Checked in each:

    - new tokens are those behind what the row holds; its table reaches them, and has what the scheduler's has;
    - what a row reads (all of its tokens, the kept blocks of an evicted one, the window of a layer that has one) is in
      blocks that the pool counts as taken and that hold what this very request, or the text it shares, has written;
    - what an eviction writes to (fresh blocks, or those kept in place) is not shared, has no hash, is not the null
      block, and is read by no other row;
    - decisions are about rows of this step, at the length that they have; the first eviction of a prompt has been
      announced since its first chunk, and those behind it are of evicted requests;
    - reports are those of ``EvictionBridge.end_step``.
    """

    supported_tasks = ("generate",)

    def __init__(self, vllm_config: VllmConfig, has_windows: bool) -> None:
        self.vllm_config = vllm_config
        self.specs = layer_specs(has_windows)
        self.rows: dict[str, Row] = {}
        self.flights: deque[Flight] = deque()
        self.random = random.Random(0)
        self.check: Callable[[], None] = lambda: None
        self.num_evictions = 0
        self._num_rows = 0

    # what EngineCore asks of an executor
    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        return [dict(self.specs)]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBHNC", "BLHNC"]]

    def set_kv_cache_layout(self, *args: Any) -> None: ...

    def determine_available_memory(self) -> list[int]:
        return [1 << 30]  # the number of blocks is given

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        (config,) = kv_cache_configs
        specs = [group.kv_cache_spec for group in config.kv_cache_groups]
        self.windows = [getattr(spec, "sliding_window", None) for spec in specs]
        (self.evicted_group,) = (index for index, spec in enumerate(specs) if isinstance(spec, EvictionSpec))
        self.memory = np.zeros((config.num_blocks, BLOCK), dtype=np.int64)

    def compile_or_warm_up_model(self) -> None: ...

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        return []

    def connect(self, scheduler: Any, check: Callable[[], None]) -> None:
        """Let the worker see the scheduler's pool, only to check; ``check`` is called behind every ``schedule``."""
        self.scheduler, self.check = scheduler, check
        self.pool = scheduler.kv_cache_manager.block_pool
        self.null = self.pool.null_block.block_id

    def execute_model(self, output: SchedulerOutput, non_block: bool = False) -> Pending:
        self._begin(output)
        if output.total_num_scheduled_tokens == 0:
            self.check()
            return Pending(lambda: EMPTY_MODEL_RUNNER_OUTPUT)
        self.flights.append(self._run(output))
        self.check()
        return Pending(lambda: None)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        flight = self.flights[-1]

        def land() -> ModelRunnerOutput:
            assert self.flights.popleft() is flight
            return flight.output

        return Pending(land) if non_block else land()

    # a step
    def _begin(self, output: SchedulerOutput) -> None:
        """Forget who ended, and take over what is new."""
        for req_id in output.finished_req_ids:
            self.rows.pop(req_id, None)
        for req_id in output.preempted_req_ids or ():
            if req_id in self.rows:
                self.rows[req_id].whole_until = None
        for data in output.scheduled_new_reqs:
            self._add(data)
        cached = output.scheduled_cached_reqs
        for index, req_id in enumerate(cached.req_ids):
            row, new_ids = self.rows[req_id], cached.new_block_ids[index]
            if req_id in cached.resumed_req_ids:
                assert new_ids is not None
                tokens = cached.all_token_ids.get(req_id, row.tokens)
                self._add_row(req_id, tokens, new_ids, cached.num_computed_tokens[index], row.prompt_hashes)
                continue
            assert row.num_computed == cached.num_computed_tokens[index], f"{req_id}: tokens are skipped or repeated"
            for table, ids in zip(row.tables, new_ids or (), strict=False):
                table.extend(ids)

    def _add(self, data: NewRequestData) -> None:
        """A request that is new or, on model runner V2, resumed; or a session that goes on with more of its prompt."""
        tokens = data.prompt_token_ids if data.prefill_token_ids is None else data.prefill_token_ids
        embeds = data.prompt_embeds if data.prompt_token_ids is None else None
        hashes = [] if embeds is None else [hash(embed.numpy().tobytes()) for embed in embeds]
        before = self.rows.get(data.req_id)
        assert before is None or not before.is_evicted, f"{data.req_id}: a session goes on behind an eviction"
        self._add_row(data.req_id, tokens or hashes, data.block_ids, data.num_computed_tokens, hashes)

    def _add_row(
        self,
        req_id: str,
        tokens: Sequence[int],
        block_ids: Iterable[list[int]],
        num_computed: int,
        prompt_hashes: list[int],
    ) -> None:
        self._num_rows += 1
        tokens = [*prompt_hashes, *tokens[len(prompt_hashes) :]]  # vLLM's have zeros there
        tables = [list(ids) for ids in block_ids]
        self.rows[req_id] = Row(self._num_rows, tokens, tables, num_computed, prompt_hashes, observed=num_computed)

    def _run(self, output: SchedulerOutput) -> Flight:
        step: StepEvictions = getattr(output, STEP)
        rows = {req_id: self.rows[req_id] for req_id in output.num_scheduled_tokens}
        for req_id, num_new in output.num_scheduled_tokens.items():
            self._check_tables(req_id, rows[req_id], rows[req_id].num_computed + num_new)
            self._write(req_id, rows[req_id], num_new)
        used = {}
        for req_id, row in rows.items():
            used[req_id] = row.number, self._read(req_id, row, output.num_scheduled_tokens[req_id])
        self._check_rows_of(step, rows)
        sampled = []
        for row in rows.values():
            assert row.num_computed <= len(row.tokens)
            sampled.append([self.random.randrange(3, VOCAB_SIZE)] if row.num_computed == len(row.tokens) else [])
            row.tokens += sampled[-1]
        reports = self._evict(step, rows, output.num_scheduled_tokens, used)
        result = ModelRunnerOutput([*rows], {req_id: index for index, req_id in enumerate(rows)}, sampled)
        if reports:
            setattr(result, REPORTS, reports)
        return Flight(used, result)

    def _check_tables(self, req_id: str, row: Row, num_tokens: int) -> None:
        groups = self.scheduler.kv_cache_manager.get_block_ids(req_id)
        for group, (table, theirs) in enumerate(zip(row.tables, groups, strict=True)):
            assert len(table) == len(theirs) >= cdiv(num_tokens, BLOCK), f"{req_id}: a table does not reach its tokens"
            for index, (mine, other) in enumerate(zip(table, theirs, strict=True)):
                is_kept = group == self.evicted_group and index < row.first_own and other in row.kept
                assert mine == other or other == self.null or is_kept, f"{req_id}: the scheduler has other blocks"

    def _write(self, req_id: str, row: Row, num_new: int) -> None:
        """New tokens go where the tables say, in every kind of layer."""
        start, stop = row.num_computed, row.num_computed + num_new
        content = row.content(start, stop)
        places = np.arange(start, stop)
        for group, table in enumerate(row.tables):
            blocks = np.array(table)[places // BLOCK]
            assert self.null not in blocks, f"{req_id}: new tokens go to the null block"
            self.memory[blocks, places % BLOCK] = content ^ group
        row.num_computed = stop

    def _read(self, req_id: str, row: Row, num_new: int) -> set[int]:
        """Check all that attention reads, and return its blocks; the last of these are written to before."""
        used = set()
        for group, table in enumerate(row.tables):
            window, first = self.windows[group], row.first_own * BLOCK
            if window is not None:
                first = max(0, row.num_computed - num_new - window + 1)
            elif row.is_evicted:
                used |= self._read_kept(req_id, row)
            if window is None and row.per_token:
                first = row.num_computed - num_new
            places = np.arange(first, row.num_computed)
            blocks = np.array(table)[places // BLOCK]
            expected = row.content(first, row.num_computed) ^ group
            assert np.array_equal(self.memory[blocks, places % BLOCK], expected), (
                f"{req_id}: group {group} holds what others, or other times, have written"
            )
            used |= set(blocks.tolist())
        self.check_taken(req_id, used)
        return used

    def _read_kept(self, req_id: str, row: Row) -> set[int]:
        assert (self.memory[row.kept] == row.kept_content).all(), f"{req_id}: kept blocks were written by others"
        return set(row.kept)

    def check_taken(self, req_id: str, blocks: set[int]) -> None:
        free = [block for block in blocks if block == self.null or self.pool.blocks[block].ref_cnt < 1]
        assert not free, f"{req_id}: reads {free}, which nobody holds"

    def _check_rows_of(self, step: StepEvictions, rows: dict[str, Row]) -> None:
        """Decisions are about rows of this step, at the length that they have now."""
        lengths = [
            *((req_id, end.plan.num_tokens) for req_id, end in step.ending.items()),
            *((req_id, chunk_plan(chunk).num_tokens) for req_id, chunk in step.chunks.items()),
            *step.growing.items(),
            *step.shrinking.items(),
            *((req_id, rows[req_id].num_computed) for req_id in step.prefilling),
        ]
        counts = Counter(req_id for req_id, _ in lengths)
        assert all(count == 1 for count in counts.values()), f"more than one decision: {counts}"
        for req_id, num_tokens in lengths:
            held = rows[req_id].num_computed
            assert held == num_tokens, f"{req_id}: the scheduler evicts it at {num_tokens} tokens, it has {held}"
        for req_id in [*step.chunks, *step.shrinking]:
            assert rows[req_id].is_evicted, f"{req_id}: a later eviction before the first"
        for req_id in [*step.prefilling, *step.ending, *step.growing]:
            assert not rows[req_id].is_evicted, f"{req_id}: a first eviction after another"
        for req_id in [*(req_id for req_id, end in step.ending.items() if end.is_late), *step.growing]:
            assert rows[req_id].is_watched, f"{req_id}: it has waited for nothing that was announced"

    def _evict(
        self,
        step: StepEvictions,
        rows: dict[str, Row],
        num_new: dict[str, int],
        used: dict[str, tuple[int, set[int]]],
    ) -> dict[str, EvictionReport]:
        reports = {}
        for req_id in step.prefilling:
            self._observe(req_id, rows[req_id], num_new[req_id])
        for req_id, end in step.ending.items():
            if not end.is_late:
                self._observe(req_id, rows[req_id], num_new[req_id])
            plan = self._chosen(end)
            targets = self._targets(rows[req_id], end, plan)
            self._check_targets(req_id, {*targets, *(end.fresh_block_ids or ())}, used)
            rows[req_id].fresh = end.fresh_block_ids or []
            rows[req_id].whole_until = plan.num_tokens
            self._fill(rows[req_id], targets, plan)
            reports[req_id] = EvictionReport(plan, 0.0)
        for req_id, chunk in step.chunks.items():
            plan, row = chunk_plan(chunk), rows[req_id]
            assert plan.num_full_blocks == len(row.kept), f"{req_id}: the kept blocks do not hold what is kept"
            self._check_targets(req_id, set(row.kept), used)
            self._fill(row, row.kept, plan)
            reports[req_id] = EvictionReport(plan, 0.0)
        for req_id, num_tokens in step.shrinking.items():
            row = rows[req_id]
            self._check_targets(req_id, set(row.kept), used)
            assert num_tokens % BLOCK == 0
            self._fill(row, row.kept, None)
            reports[req_id] = EvictionReport(None, 0.0)
        for req_id, row in rows.items():
            if row.per_token and req_id not in reports:
                self._check_targets(req_id, set(row.kept), used)
                self._fill(row, row.kept, None)
        self.num_evictions += sum(report.plan is not None for report in reports.values())
        return reports

    def _observe(self, req_id: str, row: Row, num_new: int) -> None:
        """A policy sees the queries of a chunk."""
        assert row.observed == row.num_computed - num_new, f"{req_id}: a chunk of its prompt was not announced"
        row.observed = row.num_computed
        row.is_watched = True

    def _chosen(self, end: PrefillEnd) -> EvictionPlan:
        """Return the plan of a worker, which keeps less than the scheduler's where that was left to it."""
        if end.config.budget != AUTO:
            return end.plan
        fewest = min(end.config.method().min_tokens // BLOCK + 2, end.plan.num_kept_blocks)
        return replace(end.plan, num_kept_blocks=self.random.randint(fewest, end.plan.num_kept_blocks))

    def _targets(self, row: Row, end: PrefillEnd, plan: EvictionPlan) -> list[int]:
        """Return the full blocks that the first eviction fills."""
        if end.fresh_block_ids is None:
            first = plan.first_kept_block
            return row.tables[self.evicted_group][first : first + plan.num_full_blocks]
        assert len(end.fresh_block_ids) == end.plan.num_full_blocks
        return end.fresh_block_ids[end.plan.num_full_blocks - plan.num_full_blocks :]

    def _check_targets(self, req_id: str, targets: set[int], used: dict[str, tuple[int, set[int]]]) -> None:
        for target in targets:
            block = self.pool.blocks[target]
            assert target != self.null, f"{req_id}: evicts into the null block"
            assert block.ref_cnt == 1, f"{req_id}: evicts into block {target}, which {block.ref_cnt} hold"
            assert block.block_hash is None, f"{req_id}: evicts into block {target} of the prefix cache"
        readers = [other for other, (_, blocks) in used.items() if other != req_id and targets & blocks]
        assert not readers, f"{req_id}: evicts into blocks of {readers}"

    def _fill(self, row: Row, targets: list[int], plan: EvictionPlan | None) -> None:
        """What is kept fills ``targets``; blocks before the one that new tokens go to are of no use any more.

        plan: None where a block of the answer is emptied, or a token replaced
        """
        row.kept = targets
        row.version += 1
        row.first_own = row.num_computed // BLOCK
        if plan is not None:
            row.per_token = plan.per_token
        self.memory[targets] = row.kept_content


@dataclass(frozen=True)
class Pending:
    """The future of a step: run when it is asked for."""

    result: Callable[[], Any]


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class SimulatedEngine(engine_core.EngineCore):
    """vLLM's core, with its own start-up checks, ``step`` and ``step_with_batch_queue``.

    Raises ValueError where it refuses to start.
    """

    model_executor: SimulatedWorker

    def __init__(self, model: Path, setting: Setting) -> None:
        self.setting = setting
        config = make_config(model, setting)
        with (  # they are for a process that an engine has for itself
            mock.patch.object(engine_core, "freeze_gc_heap"),
            mock.patch.object(engine_core, "enable_envs_cache"),
            mock.patch.object(engine_core, "maybe_attach_gc_debug_callback"),
        ):
            worker: Any = partial(SimulatedWorker, has_windows=setting.has_windows)
            super().__init__(config, worker, log_stats=True)
        self.worker: SimulatedWorker = self.model_executor
        self.block_pool = self.scheduler.kv_cache_manager.block_pool
        self.worker.connect(self.scheduler, self.check)
        self.answers: dict[str, Answer] = {}
        self.num_steps = 0
        self.max_held = 0
        self.num_preemptions = 0
        self._free_at_start = self.num_free_blocks
        self._make_request = with_checked_options(_make_request)

    @property
    def num_free_blocks(self) -> int:
        return self.block_pool.get_num_free_blocks()

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of an empty cache."""
        return self._free_at_start

    def add(
        self,
        prompt: list[int] | torch.Tensor,
        request_id: str | None = None,
        resumable: bool = False,
        checked: bool = True,
        **params: Any,
    ) -> str:
        """Queue a request as a front end does; sampling parameters as in ``tests.engine.harness.Engine.add``.

        prompt:    token ids, or embeddings [num_tokens, hidden_size]
        resumable: whether more of its prompt comes later, under the same id
        checked:   whether the front end looks at it

        Raises VLLMValidationError if the front end refuses it.
        """
        request_id = request_id or f"request-{len(self.answers)}"
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **params})
        make = self._make_request if checked else _make_request
        request, wave = self.preprocess_add_request(make(self, request_id, prompt, sampling, resumable=resumable))
        self.add_request(request, wave)
        self.answers.setdefault(request_id, Answer())
        return request_id

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_requests() or bool(self.batch_queue)

    def advance(self) -> None:
        """One turn of the loop of vLLM's engine, and what it has brought."""
        self.num_steps += 1
        outputs, executed = self.step_fn()
        self.post_step(executed)
        for each in (outputs or {}).values():
            for output in each.outputs:
                self._take(output)
        self.check()

    def _take(self, output: EngineCoreOutput) -> None:
        answer = self.answers[output.request_id]
        assert answer.finish_reason is None, f"{output.request_id}: an output behind the end"
        answer.tokens += output.new_token_ids
        answer.finish_reason = None if output.finish_reason is None else str(output.finish_reason)

    def run(self, max_steps: int) -> bool:
        """Step until nothing is left to do; return whether that is so after ``max_steps``."""
        for _ in range(max_steps):
            if not self.has_work:
                return True
            self.advance()
        return not self.has_work

    def abort(self, request_id: str) -> None:
        self.abort_requests([request_id])
        self.check()

    @property
    def requests(self) -> dict[str, Request]:
        return self.scheduler.requests

    def check(self) -> None:
        """What holds of the scheduler's pool at every time.

        - free blocks and held ones are all that there are, the null block is neither;
        - a block is counted once for each table that it is in, and once while it is fresh, in none yet;
        - a block in two tables is one of the prefix cache;
        - what evicted requests have written to since is not shared and has no hash;
        - what a step in flight reads is held, unless its request has ended or was preempted meanwhile.
        """
        pool, null = self.block_pool, self.block_pool.null_block
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        assert null.is_null and null.block_id not in free, "the null block is free"
        held = {block.block_id: block.ref_cnt for block in pool.blocks if block.ref_cnt > 0 and not block.is_null}
        assert len(free) == len(set(free)) == self.num_free_blocks
        assert not held.keys() & set(free)
        assert len(free) + len(held) == len(pool.blocks) - 1, "a block is lost"
        live = {}
        counts: Counter[int] = Counter()
        for req_id, request in self.requests.items():
            groups = self.scheduler.kv_cache_manager.get_block_ids(req_id)
            mine = [block for ids in groups for block in ids if block != null.block_id]
            counts.update(mine)
            row = self.worker.rows.get(req_id)
            if row is None or request.status != RequestStatus.RUNNING:
                continue
            live[req_id] = row.number
            if row.is_evicted:
                self._check_private(req_id, row)
                if not set(row.kept) <= set(mine):
                    counts.update(row.fresh)
        assert counts == held, f"counted {counts}, the pool says {held}"
        shared = [block for block, count in counts.items() if count > 1 and pool.blocks[block].block_hash is None]
        assert not shared, f"blocks {shared} are in two tables, and not in the prefix cache"
        for flight in self.worker.flights:
            for req_id, (number, blocks) in flight.blocks.items():
                if live.get(req_id) == number:
                    self.worker.check_taken(req_id, blocks)
        self.max_held = max(self.max_held, len(held))
        self.num_preemptions = max([self.num_preemptions, *(each.num_preemptions for each in self.requests.values())])

    def _check_private(self, req_id: str, row: Row) -> None:
        table = row.tables[self.worker.evicted_group]
        for block_id in {*row.kept, *table[row.first_own :]}:
            block = self.block_pool.blocks[block_id]
            assert block.ref_cnt == 1 and block.block_hash is None, f"{req_id}: block {block_id} is not private"

    def check_all_free(self) -> None:
        """Every block is back once all requests have ended."""
        assert not self.requests and not self.scheduler.running
        assert self.num_free_blocks == self._free_at_start


def _make_request(
    engine: SimulatedEngine,
    request_id: str,
    prompt: list[int] | torch.Tensor,
    params: SamplingParams,
    resumable: bool = False,
) -> EngineCoreRequest:
    """What is left of ``InputProcessor.process_inputs`` where there is no tokenizer."""
    is_text = isinstance(prompt, list)
    assert len(prompt) <= engine.vllm_config.model_config.max_model_len
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt if is_text else None,
        prompt_embeds=None if is_text else prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        resumable=resumable,
    )
