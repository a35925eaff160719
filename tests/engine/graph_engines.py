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
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu import model_runner
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from tests.engine.cuda_graphs import graphs_on_cpu
from tests.engine.harness import Engine, engine
from vllm_kvevict.engine.worker import cpu_worker
from vllm_kvevict.engine.worker.backends import triton
from vllm_kvevict.engine.worker.backends.base import backend_in_place_of
from vllm_kvevict.engine.worker.graphs import EvictionModelRunner

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

    sizes: of the batches to capture; without any all steps are eager
    """
    backend = triton_attn.TritonAttentionBackend if policy is None else triton.EvictionTritonBackend
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
    """rows: of each step that was replayed; faults: what was wrong with them"""

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
