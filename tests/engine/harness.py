"""A real engine in the test's process, stepped one step at a time with its invariants checked after each."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import parallel_state
from vllm.outputs import RequestOutput
from vllm.platforms.cpu import CpuPlatform

from tests.paged import pages_of
from vllm_kvevict import kv_eviction_args
from vllm_kvevict.engine.scheduler.managers import CacheInUse

Prompt = list[int] | dict[str, Any]  # of tokens, or as vLLM takes it, with images


class Engine:
    """A vLLM engine with its scheduler and worker in reach."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.block_pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = self.core.model_executor.driver_worker.worker
        self._poisoned: set[int] | None = None
        self.max_running = 0
        self.num_evictions = 0
        if self.bridge is not None:
            self._count_evictions()
        self._free_at_start = self.num_free_blocks
        self._next_id = 0

    @property
    def num_free_blocks(self) -> int:
        return self.block_pool.get_num_free_blocks()

    @property
    def bridge(self) -> Any:
        return getattr(self.worker, "eviction", None)

    @property
    def bridges(self) -> list[Any]:
        """Of the model, and of its draft model if it has one."""
        draft = getattr(self.worker, "draft_eviction", None)
        return [bridge for bridge in (self.bridge, draft) if bridge is not None]

    def _count_evictions(self) -> None:
        end_step = self.bridge.end_step

        def count() -> Any:
            reports = end_step()
            self.num_evictions += sum(report.plan is not None for report in reports.values())
            return reports

        self.bridge.end_step = count

    def add(self, prompt: Prompt, request_id: str | None = None, **params: Any) -> str:
        """Queue a greedy request; ``extra_args`` and every other sampling parameter may be given."""
        request_id = request_id or f"request-{self._next_id}"
        self._next_id += 1
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **params})
        whole = prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt}
        self.llm.llm_engine.add_request(request_id, whole, sampling)
        return request_id

    def step(self) -> list[RequestOutput]:
        outputs = self.llm.llm_engine.step()
        self.max_running = max(self.max_running, len(self.scheduler.running))
        self.check()
        return outputs

    def run(self) -> dict[str, RequestOutput]:
        """Step until every request has ended; return the last output of each."""
        last: dict[str, RequestOutput] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            last.update({output.request_id: output for output in self.step()})
        return last

    def generate(self, prompts: Sequence[Prompt], **params: Any) -> list[RequestOutput]:
        ids = [self.add(prompt, **params) for prompt in prompts]
        outputs = self.run()
        return [outputs[request_id] for request_id in ids]

    def tokens(self, prompts: Sequence[Prompt], **params: Any) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.generate(prompts, **params)]

    def check_as_alone(self, cases: Sequence[tuple[Prompt, dict[str, Any]]], max_tokens: int) -> None:
        """Requests (prompt, options) in one batch are answered as each of them alone."""
        alone = [self.tokens([prompt], max_tokens=max_tokens, extra_args=options)[0] for prompt, options in cases]
        ids = [self.add(prompt, max_tokens=max_tokens, extra_args=options) for prompt, options in cases]
        outputs = self.run()
        assert [list(outputs[request_id].outputs[0].token_ids) for request_id in ids] == alone
        self.check_all_free()

    @contextmanager
    def in_chunks(self, num_tokens: int) -> Iterator[None]:
        """Inside, no step computes more than ``num_tokens`` tokens."""
        usual, self.scheduler.max_num_scheduled_tokens = self.scheduler.max_num_scheduled_tokens, num_tokens
        try:
            yield
        finally:
            self.scheduler.max_num_scheduled_tokens = usual

    def block_table(self, internal_id: str) -> list[int]:
        """Return the blocks of a request, the null block where one has been freed."""
        groups = self.scheduler.kv_cache_manager.get_block_ids(internal_id)
        blocks: list[int] = groups[self.scheduler._manager.kv_cache_group_id]
        return blocks

    def pages_of(self, bridge: Any, request_id: str) -> list[list[list[int]]]:
        """Page ids [num_layers][num_kv_heads][pages] of an evicted request, in the tables of the model or its drafter.

        Those of the decode blocks that it has entered come last.
        """
        num_tokens = self.scheduler.requests[request_id].num_computed_tokens
        return pages_of(bridge.page_table, request_id, num_tokens, self.block_table(request_id))

    def blocks_held(self, internal_id: str, num_tokens: int | None = None) -> list[int]:
        """Return the blocks of a request, those of its first ``num_tokens`` tokens if given."""
        blocks = self.block_table(internal_id)
        if num_tokens is not None:
            blocks = blocks[: -(-num_tokens // self.bridge.pool.block_size)]
        return [block for block in blocks if block != self.block_pool.null_block.block_id]

    def check(self) -> None:
        """Pages held == blocks held * layers * heads; no page in two tables; the null block in none."""
        for bridge in self.bridges:
            self._check_pages(bridge)
        if self._poisoned is not None:
            self._poison_free_blocks(self._poisoned)

    def _check_pages(self, bridge: Any) -> None:
        owner: dict[int, str] = {}
        running = {request.request_id: request for request in self.scheduler.running}
        for request_id, request in running.items():
            is_evicted = request_id in bridge.page_table
            layers = self.pages_of(bridge, request_id) if is_evicted else []
            pages = [page for layer in layers for row in layer for page in row]
            if request_id in bridge.failures:  # a step that was in flight goes on in a block that was not emptied
                pages = list(set(pages))
            elif is_evicted and self._has_freed(request_id):
                # rejected drafts leave blocks behind that nothing has been written to yet
                blocks = self.blocks_held(request_id, request.num_computed_tokens)
                held = torch.tensor(blocks[:-1] if self._has_emptied_last_block(request) else blocks)
                assert sorted(pages) == sorted(bridge.pool.page_ids(held).flatten().tolist())
            for page in pages:
                assert page not in owner, f"page {page} belongs to {owner[page]} and {request_id}"
                owner[page] = request_id
        null_pages = bridge.pool.page_ids(torch.tensor([0])).flatten().tolist()
        assert not owner.keys() & set(null_pages)

    def _has_freed(self, request_id: str) -> bool:
        life = self.scheduler._lives.get(request_id)
        return life is not None and bool(life.evictions) and not life.to_free

    def _has_emptied_last_block(self, request: Any) -> bool:
        """Whether a request that evicts during decode has just filled a block, which it will use again; or any token
        of it has been in its last block, if it evicts token by token.
        """
        life = self.scheduler._lives[request.request_id]
        num_tokens, plan = request.num_computed_tokens, life.plan
        if plan.per_token:
            return num_tokens > plan.num_tokens // plan.block_size * plan.block_size
        is_full = num_tokens % plan.block_size == 0 and num_tokens > plan.num_tokens
        return is_full and life.prefill.evicts_answer

    def poison_unowned_memory(self) -> None:
        """From now on every block that nobody owns, the null block included, holds NaN.

        Blocks are cleared when a request gets them: vLLM's kernels multiply slots past a sequence's end by zero.
        In e4m3, which scores read as NaN, vLLM's CPU kernel takes the same byte for 480: logits then give it away.
        """
        self._poisoned = set()
        execute_model = self.worker.execute_model

        def clear_then_execute(output: Any) -> Any:
            new_blocks = [request.block_ids for request in output.scheduled_new_reqs]
            new_blocks += [groups for groups in output.scheduled_cached_reqs.new_block_ids if groups is not None]
            block_ids = [block_id for groups in new_blocks for ids in groups for block_id in ids]
            for pool in (bridge.pool for bridge in self.bridges):
                pages = pool.page_ids(torch.tensor(block_ids, dtype=torch.int64)).flatten()
                pool.pages[pages] = pool.pages[pages].float().nan_to_num(0.0).to(pool.pages.dtype)
            return execute_model(output)

        self.worker.execute_model = clear_then_execute
        self._poison_free_blocks(self._poisoned)

    def _poison_free_blocks(self, poisoned: set[int]) -> None:
        """Poison the blocks that nobody owns any more, and keep ``poisoned`` up to date."""
        blocks = self.block_pool.free_block_queue.get_all_free_blocks()
        unowned = {block.block_id for block in blocks if block.block_hash is None}
        block_ids = torch.tensor([self.block_pool.null_block.block_id, *sorted(unowned - poisoned)])
        poisoned.clear()
        poisoned.update(unowned)
        for pool in (bridge.pool for bridge in self.bridges):
            pool.pages[pool.page_ids(block_ids).flatten()] = float("nan")

    def check_all_free(self) -> None:
        """Every block is back once all requests have ended."""
        assert not self.scheduler.running and not self.scheduler.requests
        assert self.num_free_blocks == self._free_at_start
        if self.bridge is not None:
            assert not self.scheduler._lives
            assert self.scheduler._manager.in_use == CacheInUse()


_RUNNING: list[str] = []  # models of the engines in this process


@contextmanager
def async_on_cpu() -> Iterator[None]:
    """vLLM's CPU platform switches async scheduling off at start-up, though the engine can run it there."""
    check_and_update_config = CpuPlatform.check_and_update_config.__func__

    def keep_async(cls: type, vllm_config: VllmConfig) -> None:
        check_and_update_config(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_async))
        yield


@contextmanager
def engine(
    model: Path, policy: str | None = "snapkv", budget: int | float = 96, fields: Any = None, **kwargs: Any
) -> Iterator[Engine]:
    """Start an engine, with eviction unless ``policy`` is None, and end it."""
    reserve = {} if "speculative_config" in kwargs else {"max_num_seqs": kwargs.get("max_num_seqs", 16)}
    eviction = {"block_size": 32} if policy is None else kv_eviction_args(policy, budget, **reserve | (fields or {}))
    settings = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "seed": 0,
        "dtype": "float32",
        "kv_cache_memory_bytes": 64 << 20,
        **eviction,
        **kwargs,
    }
    if not _RUNNING:  # one that did not start has left its process groups, and a mixture of experts needs one more
        parallel_state.destroy_model_parallel()
    llm = LLM(str(model), **settings)
    _RUNNING.append(str(model))
    try:
        yield Engine(llm)
    finally:
        _RUNNING.remove(str(model))
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
