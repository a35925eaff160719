"""Decode steps as CUDA graphs: vLLM's own graph manager captures and replays them, with graphs of cuda_graphs.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends import triton_attn

from tests.conftest import USES_V2_RUNNER
from tests.engine.cuda_graphs import CaptureError
from tests.engine.graph_engines import (
    Join,
    Replays,
    Served,
    capture,
    check_replays,
    checked_replays,
    serve,
    triton_engine,
)
from tests.engine.harness import Engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.worker import all_rows
from vllm_kvevict.engine.worker.all_rows import AllRows

pytestmark = pytest.mark.skipif(not USES_V2_RUNNER, reason="full graphs are those of model runner V2")

SIZES = [1, 4]
PROMPTS = [random_prompt(length, seed=length) for length in (20, 30, 31)]
Plant = Callable[[Engine, pytest.MonkeyPatch], None]
LENGTHS = [3, 5, 4]  # of their answers: the batch shrinks from three rows to one, and two of them enter a block


@pytest.fixture(scope="module")
def eager(tiny_llama: Path) -> list[list[int]]:
    with triton_engine(tiny_llama, []) as running:
        return answers(running)


@pytest.fixture(scope="module")
def stock(tiny_llama: Path, eager: list[list[int]]) -> Iterator[Engine]:
    with triton_engine(tiny_llama, SIZES) as running:
        yield running


def answers(running: Engine, options: dict[str, Any] | None = None) -> list[list[int]]:
    cases = zip(PROMPTS, LENGTHS, strict=True)
    names = [running.add(prompt, max_tokens=length, extra_args=options) for prompt, length in cases]
    outputs = running.run()
    return [list(outputs[name].outputs[0].token_ids) for name in names]


def test_vllms_graphs_replay_what_its_python_does(stock: Engine, eager: list[list[int]]) -> None:
    assert answers(stock) == eager
    with checked_replays(stock) as replays:
        assert answers(stock) == eager
    assert replays == Replays([3, 3, 2, 1])


def reallocate(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths are in another tensor since the capture."""
    capture(running)
    buffers = running.worker.model_runner.input_buffers
    monkeypatch.setattr(buffers, "seq_lens", buffers.seq_lens.clone())


def free(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths that the capture was shown are nobody's after it."""
    builder = triton_attn.TritonAttentionMetadataBuilder
    build = builder.build_for_cudagraph_capture

    def with_a_copy(self: Any, common: Any) -> Any:
        return build(self, common.replace(seq_lens=common.seq_lens.clone()))

    monkeypatch.setattr(builder, "build_for_cudagraph_capture", with_a_copy)
    capture(running)


def freeze_a_number(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is told the longest length of the batch."""
    attend = triton_attn.unified_attention

    def by_length(**arguments: Any) -> None:
        attend(**{**arguments, "softmax_scale": 1 / arguments["max_seqlen_k"]})

    monkeypatch.setattr(triton_attn, "unified_attention", by_length)
    capture(running)


def freeze_a_shape(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block table as wide as the batch of the capture needs."""
    attend = triton_attn.unified_attention

    def over_blocks_in_use(**arguments: Any) -> None:
        num_blocks = -(-arguments["seqused_k"].max() // 32)
        attend(**{**arguments, "block_table": arguments["block_table"][:, :num_blocks].contiguous()})

    monkeypatch.setattr(triton_attn, "unified_attention", over_blocks_in_use)
    capture(running)


def wait(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads a length."""
    attend = triton_attn.unified_attention

    def over_read_length(**arguments: Any) -> None:
        attend(**{**arguments, "max_seqlen_k": int(arguments["seqused_k"].max())})

    monkeypatch.setattr(triton_attn, "unified_attention", over_read_length)
    capture(running)


def leave_a_table_stale(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks, which is written once and not for every step."""
    builder = triton_attn.TritonAttentionMetadataBuilder
    build, tables = builder.build_for_cudagraph_capture, []

    def with_a_copy(self: Any, common: Any) -> Any:
        tables.append(common.block_table_tensor.clone())
        return build(self, common.replace(block_table_tensor=tables[-1]))

    monkeypatch.setattr(builder, "build_for_cudagraph_capture", with_a_copy)
    capture(running)


IN_CAPTURES = [wait, freeze_a_shape]
IN_REPLAYS = {reallocate: "hidden", free: "freed", freeze_a_number: "hidden", leave_a_table_stale: "hidden"}


@pytest.mark.parametrize("plant", IN_CAPTURES)
def test_what_no_graph_can_hold_is_refused(stock: Engine, monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    with pytest.raises(CaptureError, match="a GPU would be waited for"):
        plant(stock, monkeypatch)


@pytest.mark.parametrize("plant", IN_REPLAYS)
def test_planted_faults_are_found(stock: Engine, monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    plant(stock, monkeypatch)
    with checked_replays(stock) as replays:
        stock.tokens([PROMPTS[2]], max_tokens=2)
    assert any(IN_REPLAYS[plant] in fault for fault in replays.faults)


@pytest.fixture(scope="module")
def served_eagerly(tiny_llama: Path, stock: Engine) -> Served:
    with triton_engine(tiny_llama, [], "snapkv", budget=64) as running:
        return serve(running, JOINS)


@pytest.fixture(scope="module")
def evicting(tiny_llama: Path, served_eagerly: object) -> Iterator[Engine]:
    """After the others: an engine that ends takes with it what is there once in a process."""
    with triton_engine(tiny_llama, SIZES, "snapkv", budget=64) as running:
        yield running


def test_batches_without_an_evicted_request_are_replayed(evicting: Engine, eager: list[list[int]]) -> None:
    with checked_replays(evicting) as replays:
        assert answers(evicting, {"kv_eviction": "none"}) == eager
    assert replays == Replays([3, 3, 2, 1])
    evicting.check_all_free()


# the whole life of a request, and evictions between the steps of others
JOINS = [
    Join(0, 20, 80, {"kv_eviction": "none"}),
    Join(4, 100, 20, {"kv_budget_allocator": "lava"}),
    Join(8, 70, 50, {"kv_eviction": "streaming_llm", "kv_evict_during_decode": True}),
    Join(26, 110, 30, {"kv_budget_allocator": "pyramid"}),
    Join(27, 45, 12),
]


@pytest.mark.feature("full CUDA graphs of decode steps, not run on a GPU", runners=("V2",))
def test_two_sets_replay_what_python_does_while_requests_join_leave_and_are_evicted(
    evicting: Engine, served_eagerly: Served
) -> None:
    check_replays(evicting, JOINS, served_eagerly)


def stage_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows are evicted is what it was at the capture."""
    monkeypatch.setattr(all_rows, "to_device", lambda values, device: torch.full((len(values),), -1))


def stage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = AllRows.fold

    def with_new_slots(self: AllRows, *args: Any) -> Any:
        self._slots = self._slots.clone()
        return fold(self, *args)

    monkeypatch.setattr(AllRows, "fold", with_new_slots)


@pytest.mark.parametrize("plant", [stage_no_slots, stage_in_new_memory])
def test_planted_faults_of_folded_graphs_are_found(
    evicting: Engine, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    params = {"max_tokens": 3, "extra_args": {"kv_budget_allocator": "lava"}}
    expected = evicting.tokens([random_prompt(100, seed=100)], **params)
    plant(monkeypatch)
    with checked_replays(evicting) as replays:
        found = evicting.tokens([random_prompt(100, seed=100)], **params)
    assert replays.faults or found != expected
