"""Engines on CPU that decode through captured graphs, as vLLM's GPU worker does, and replays that are checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from tests import flash_attention
from tests.engine.cuda_graphs import as_kernel, graphs_on_cpu
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.worker import cpu_worker
from vllm_kvevict.engine.worker.backends import triton
from vllm_kvevict.engine.worker.backends.base import backend_in_place_of
from vllm_kvevict.engine.worker.backends.flash import EvictionFlashBackend
from vllm_kvevict.engine.worker.graphs import EvictionModelRunner, FoldedDescriptor

_SETTINGS = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "max_model_len": 512, "kv_cache_memory_bytes": 4 << 20}
# The interpreter runs programs one after the other: sequences are split into few of them, and only if one runs alone.
_SPLITS = {"NUM_PAR_SOFTMAX_SEGMENTS": 2, "MIN_LAUNCH_GRID_SIZE_2D": 2}


@contextmanager
def _configured(sizes: list[int]) -> Iterator[None]:
    """What vLLM's CPU platform switches off at start-up is on."""
    check_and_update_config = CpuPlatform.check_and_update_config.__func__

    def with_graphs(cls: type, vllm_config: VllmConfig) -> None:
        check_and_update_config(cls, vllm_config)
        config = vllm_config.compilation_config
        if sizes:
            config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
            config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = list(sizes), max(sizes)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CpuPlatform, "check_and_update_config", classmethod(with_graphs))
        # vLLM asks for it before it launches the kernel that writes keys and values
        patched.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        for name, value in _SPLITS.items():
            patched.setattr(triton_attn, name, value)
            patched.setattr(triton, name, value, raising=False)
        yield


@contextmanager
def triton_engine(model: Path, sizes: list[int], policy: str | None = None, **settings: Any) -> Iterator[Engine]:
    """Start an engine with Triton attention, and end it.

    sizes: of the batches to capture, in tokens; without any all steps are eager
    """
    backend = triton_attn.TritonAttentionBackend if policy is None else triton.EvictionTritonBackend
    with _engine(model, backend, sizes, policy, **settings) as running:
        yield running


@contextmanager
def flash_engine(model: Path, sizes: list[int], version: int, policy: str, **settings: Any) -> Iterator[Engine]:
    """As ``triton_engine``, with a version of FlashAttention, for whose kernels functions stand in."""
    with pytest.MonkeyPatch.context() as patched:
        flash_attention.replace_kernels(patched, version, as_kernel)
        with _engine(model, EvictionFlashBackend, sizes, policy, **settings) as running:
            yield running


@contextmanager
def _engine(
    model: Path, backend: type[AttentionBackend], sizes: list[int], policy: str | None, **settings: Any
) -> Iterator[Engine]:
    ours = partial(backend_in_place_of, AttentionBackendEnum.CPU_ATTN, backend)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patched:
        stack.enter_context(_configured(sizes))
        stack.enter_context(ours())
        stack.enter_context(graphs_on_cpu())
        patched.setattr(cpu_worker, "cpu_backend", ours)
        if policy is not None:
            patched.setattr(model_runner, "CPUModelRunner", _EvictionCPUModelRunner)
        running = stack.enter_context(engine(model, policy, **{**_SETTINGS, **settings}))
        stack.callback(reset_workspace_manager)
        init_workspace_manager(running.worker.device)
        if sizes:
            capture(running)
        yield running


class _EvictionCPUModelRunner(EvictionModelRunner, model_runner.CPUModelRunner):
    """What a GPU worker makes: that of the CPU does not ask ``_make_model_runner``."""


def capture(running: Engine) -> None:
    """Let vLLM capture its graphs, again if it has; no request may be running."""
    runner = running.worker.model_runner
    runner.cudagraph_manager.release_graphs()
    with running.worker._on_its_own() if running.bridge is not None else nullcontext():
        runner.capture_model()


@dataclass
class Replays:
    """rows: tokens of each step that was replayed; faults: what was wrong with them"""

    rows: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@contextmanager
def checked_replays(running: Engine) -> Iterator[Replays]:
    """Inside, each step that is replayed is then run by Python, at the same padded shape and over the same cache, and
    the engine goes on with what Python did: a replay must have given the same bits, in the cache as well.
    """
    runner = running.worker.model_runner
    manager, state, caches = runner.cudagraph_manager, runner.model_state, runner.kv_caches
    prepare_attn, run_fullgraph, replays = state.prepare_attn, manager.run_fullgraph, Replays()
    prepared: list[Any] = []

    def prepare(batch: Any, mode: Any, tables: Any, slots: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = prepare_attn(batch, mode, tables, slots, *args, **kwargs)
        prepared[:] = [batch, metadata, dict.fromkeys(metadata, slots[0])]
        return metadata

    def python(num_tokens: int) -> torch.Tensor:
        batch, metadata, slots = prepared
        inputs = {"input_ids": batch.input_ids, "positions": batch.positions, "intermediate_tensors": None}
        config = running.worker.vllm_config
        with set_forward_context(metadata, config, num_tokens, slot_mapping=slots, is_padding=batch.is_padding):
            return runner.model(**inputs)

    def run(desc: Any) -> torch.Tensor:
        num_tokens, before = prepared[0].num_tokens, [cache.clone() for cache in caches]
        replayed = None
        try:
            replayed = run_fullgraph(desc)
        except RuntimeError as error:
            replays.faults.append(str(error))
        after = [cache.clone() for cache in caches]
        for cache, kept in zip(caches, before, strict=True):
            cache.copy_(kept)
        expected = python(desc.num_tokens)
        if replayed is not None and not torch.equal(replayed[:num_tokens], expected[:num_tokens]):
            replays.faults.append("hidden states differ")
        if not all(map(torch.equal, caches, after)):
            replays.faults.append("caches differ")
        replays.rows.append(num_tokens)
        return expected

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state, "prepare_attn", prepare)
        patched.setattr(manager, "run_fullgraph", run)
        yield replays


@dataclass(frozen=True)
class Join:
    """A request that joins before a step: tokens of its prompt and of its answer, its options."""

    step: int
    num_prompt_tokens: int
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)


Served = list[tuple[list[int], list[float]]]


def serve(running: Engine, joins: list[Join]) -> Served:
    """Return the tokens of each answer and their log-probabilities."""
    outputs, joined, step = {}, [], 0
    while len(joined) < len(joins) or running.llm.llm_engine.has_unfinished_requests():
        if step == 10:  # as with data parallelism where another engine has work
            running.llm.collective_rpc("execute_dummy_batch")
        for join in joins:
            if join.step == step:
                prompt = random_prompt(join.num_prompt_tokens, seed=join.num_prompt_tokens)
                joined.append(running.add(prompt, max_tokens=join.max_tokens, logprobs=0, extra_args=join.options))
        outputs.update({output.request_id: output.outputs[0] for output in running.step()})
        step += 1
    answers = [outputs[name] for name in joined]
    return [(list(each.token_ids), [next(iter(of.values())).logprob for of in each.logprobs]) for each in answers]


def num_replays(running: Engine) -> dict[str, int]:
    graphs = running.worker.model_runner.cudagraph_manager.graphs.items()
    sets = {"folded": FoldedDescriptor, "stock": BatchExecutionDescriptor}
    return {name: sum(graph.num_replays for desc, graph in graphs if type(desc) is kind) for name, kind in sets.items()}


def check_replays(running: Engine, joins: list[Join], served_eagerly: Served, at_least: int = 64) -> Replays:
    """Serve requests through graphs of both sets: what they do is what Python does, and what an engine without does."""
    before = num_replays(running)
    with checked_replays(running) as replays:
        served = serve(running, joins)
    counts = {name: count - before[name] for name, count in num_replays(running).items()}
    assert replays.faults == []
    assert sum(counts.values()) == len(replays.rows) >= at_least and min(counts.values()) > 0
    for (tokens, logprobs), (expected, expected_logprobs) in zip(served, served_eagerly, strict=True):
        assert tokens == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)  # float32, in batches of other sizes
    running.check_all_free()
    return replays
