"""What is held beside the KV cache is what the log says, fits beside the cache, and seats no more than it is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict import kv_eviction_args
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import check_config
from vllm_kvevict.engine.offline.check.reachable import held_beside_cache
from vllm_kvevict.engine.reserve import Reserve, reserve_of
from vllm_kvevict.engine.worker import model, side_memory
from vllm_kvevict.engine.worker.attention_parts import AttentionParts
from vllm_kvevict.engine.worker.gpu_worker import EvictionGPUWorker
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.engine.worker.side_memory import SideMemory
from vllm_kvevict.policies import Need

MIB = 1 << 20
BY_BLOCK = {"kv_evict_during_decode": 1}
BY_TOKEN = {"kv_evict_during_decode": 1, "kv_evict_interval": 1, "kv_eviction": "h2o"}


def logged(text: str) -> tuple[float, dict[str, float]]:
    """Return the MiB that a log says are held in all, and for what."""
    ((total, said),) = re.findall(r"KV eviction holds ([\d.]+) MiB beside the KV cache: ([^;]*);", text)
    parts = [part.rpartition(" ") for part in said.split(", ")]
    return float(total), {name: float(size) for name, _, size in parts}


SERVERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "prompts only": ("snapkv", {"max_num_seqs": None}, {}),
    "reserved by the flag": ("snapkv", {"max_num_seqs": 3}, {}),
    "during decode": ("morphkv", {"max_num_seqs": None, "interval": 1}, {}),
    "between chunks": ("tova", {"max_num_seqs": None, "during_prefill": True, "request_options": "none"}, {}),
    "with output projections": ("criticalkv", {"max_num_seqs": None}, {}),
}


on_v1 = pytest.mark.more_on_v2("on V1 each; what is held does not depend on the runner")


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_v1 if "during" not in name else ()) for name in SERVERS])
def test_the_log_names_all_that_is_held(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    policy, fields_, settings = SERVERS[name]
    messages: list[str] = []  # vLLM sets its loggers up anew when the first engine starts
    monkeypatch.setattr(side_memory.logger, "info", lambda text, *args: messages.append(text % args))
    with engine(tiny_llama, policy, fields=fields_, **settings) as running:
        total, parts = logged("\n".join(messages))
        held = [bridge.held.sizes() for bridge in running.bridges]
        assert held_beside_cache(running.worker) == sum(sum(sizes.values()) for sizes in held)
        assert parts == {name: round(size / MIB, 1) for name, size in held[0].items()}
        assert total == round(sum(held[0].values()) / MIB, 1)
        at_start = held_beside_cache(running.worker)
        reserve = reserve_of(running.llm.llm_engine.vllm_config)
        assert (reserve is None) == (name in ("prompts only", "with output projections"))
        options = None if reserve is None or "none" in fields_.values() else BY_BLOCK
        prompts = [random_prompt(200 + index, seed=index) for index in range(4)]
        running.generate(prompts, extra_args=options, max_tokens=70, ignore_eos=True)
        running.generate([[1, 2, 3]], max_tokens=3)
        # what is known of the last batches: no more than some numbers for each request
        assert held_beside_cache(running.worker) - at_start < 64 << 10


@pytest.mark.parametrize("policy", [pytest.param("snapkv", marks=on_v1), pytest.param("h2o", marks=on_v1), "morphkv"])
def test_the_cache_and_all_beside_it_fit_into_what_is_available(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    available = 96 * MIB
    monkeypatch.setattr(CPUWorker, "determine_available_memory", lambda worker: available)
    fields_ = {"max_num_seqs": None, "scoring_scratch_mib": 8}
    settings = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.1}
    with engine(tiny_llama, policy, fields=fields_, **settings) as running:
        cache = running.bridge.pool.pages.untyped_storage().nbytes()
        block_bytes = cache // running.block_pool.num_gpu_blocks
        sizes = running.bridge.held.sizes()
        # what was there before vLLM measured is no part of what it has left
        before = {"page tables", "page lists", "output projections"}
        later = sum(size for name, size in sizes.items() if name not in before) - running.bridge.held.holes.nbytes
        # sums of prompts are float32, one of each token, layer and head
        pool = running.bridge.pool
        summed = 4 * pool.num_layers * pool.num_kv_heads * pool.block_size * (cache // block_bytes)
        later += summed if policy == "h2o" else 0
        assert available - 2 * block_bytes < cache + later + 8 * MIB <= available
        ring = running.bridge.ring.num_bytes
        assert (ring > 0) == (policy == "morphkv") and ring <= 0.01 * cache
        assert running.bridge.ring.slots.max_num_reqs == len(running.scheduler._seats)
        if policy == "snapkv":
            assert sum(sizes.values()) - sizes["page tables"] < 0.01 * cache


def spec_of(num_kv_heads: int, head_size: int, block_size: int) -> Any:
    return SimpleNamespace(
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        page_size_bytes=4 * num_kv_heads * head_size * block_size,
    )


@given(
    st.integers(1, 8),
    st.sampled_from([64, 128]),
    st.sampled_from([16, 32]),
    st.integers(1, 80),
    st.booleans(),
    st.integers(1, 1024),
    st.integers(0, 2**40),
    st.sampled_from([0.0, 0.0005, 0.009]),
    st.integers(0, 90),
)
def test_a_cache_of_any_size_leaves_room(
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    num_layers: int,
    is_default: bool,
    most: int,
    available: int,
    per_byte: float,
    num_sharing: int,
) -> None:
    reserve = Reserve(True, most, is_default, 32, 4 * num_kv_heads, torch.bfloat16)
    spec = spec_of(num_kv_heads, head_size, block_size)
    num_readers = num_layers + num_sharing
    cache = max(reserve.cache_bytes(available, spec, num_layers, per_byte, num_readers), 0)
    block_bytes = spec.page_size_bytes * num_layers
    num_blocks = cache // block_bytes
    num_seqs = reserve.num_seqs(num_blocks, spec)
    ring = num_seqs * reserve.request_bytes(head_size) * num_readers
    if cache > 0:
        assert num_blocks * block_bytes * (1 + per_byte) + ring <= available + 1
    if is_default:
        assert 1 <= num_seqs <= most and (
            num_seqs == 1 or ring * num_layers <= 0.01 * num_blocks * block_bytes * num_readers
        )
        # no room is given away: a tenth of a percent more would hold one more request
        more = reserve.num_seqs(int(1.03 * num_blocks) + 1, spec)
        assert num_seqs == most or num_seqs >= int(more / 1.03) - 1
    else:
        assert num_seqs == most


def config_of(model: Path, policy: str, settings: dict[str, Any] | None = None, **fields_: Any) -> Any:
    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "max_num_seqs": 8, **(settings or {})}
    return EngineArgs(model=str(model), **kv_eviction_args(policy, 256, **fields_), **settings).create_engine_config()


NO_POLICIES = {"options": ["kv_budget", "kv_evict_during_decode"]}


@pytest.mark.parametrize(
    ("policy", "fields_", "expected"),
    [
        ("snapkv", {}, None),
        ("snapkv", {"max_num_seqs": 0}, None),
        ("snapkv", {"max_num_seqs": 3}, (True, 3, False)),
        ("snapkv", {"max_num_seqs": 300}, (True, 8, False)),
        ("snapkv", {"max_num_seqs": 3, "request_options": NO_POLICIES}, (False, 3, False)),
        ("snapkv", {"max_num_seqs": 3, "request_options": {"options": ["kv_budget"]}}, (False, 0, False)),
        ("snapkv", {"during_decode": True}, (True, 8, True)),
        ("snapkv", {"during_decode": True, "request_options": "none"}, (False, 8, True)),
        ("h2o", {"during_decode": True, "request_options": "none"}, (True, 8, True)),
        ("streaming_llm", {"during_decode": True, "request_options": "none"}, (False, 0, True)),
        ("tova", {"during_decode": True, "request_options": {"policies": ["h2o"]}}, (True, 8, True)),
        ("tova", {"during_decode": True, "request_options": {"policies": ["snapkv"]}}, (False, 8, True)),
        ("snapkv", {"during_prefill": True, "request_options": "none"}, (False, 0, True)),
        ("morphkv", {}, (True, 8, True)),
        ("laq_deferred", {}, (True, 8, True)),
    ],
)
def test_what_is_kept_ready(
    tiny_llama: Path, policy: str, fields_: dict[str, Any], expected: tuple[bool, int, bool] | None
) -> None:
    reserve = reserve_of(config_of(tiny_llama, policy, **fields_))
    found = None if reserve is None else (reserve.has_sums, reserve.max_num_seqs, reserve.is_default)
    assert found == expected


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (BY_BLOCK, "kv_evict_during_decode"),
        (BY_TOKEN, "kv_evict_during_decode"),
        ({"kv_eviction": "morphkv"}, "kv_evict_during_decode"),
        ({"kv_evict_during_prefill": 1}, "kv_evict_during_prefill"),
        ({"kv_eviction": "laq_deferred"}, "kv_eviction"),
    ],
)
def test_a_request_without_memory_for_it_is_refused(tiny_llama: Path, options: dict[str, Any], option: str) -> None:
    config = config_of(tiny_llama, "snapkv")
    request = EvictionConfig.parse({"policy": "snapkv", "budget": 256}).for_request(options, 32)
    with pytest.raises(ValueError) as error:
        check_config(request, config)
    assert str(error.value) == (
        f"{option}: this server has reserved no memory for requests that are evicted between the chunks of their "
        "prompts or while they decode; start it with --kv-evict-max-num-seqs N, the most of them at once"
    )
    check_config(request, config_of(tiny_llama, "snapkv", max_num_seqs=1))


def test_a_request_that_no_seat_can_be_for_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tiny_llama, "streaming_llm", during_decode=True, request_options="none")
    assert reserve_of(config).max_num_seqs == 0
    check_config(EvictionConfig.parse({"policy": "streaming_llm", "budget": 256, "during_decode": True}), config)
    with pytest.raises(ValueError, match="kv_evict_during_decode: this server has reserved no memory"):
        check_config(EvictionConfig.parse({"policy": "snapkv", "budget": 256, "during_decode": True}), config)


def test_a_server_without_memory_for_its_own_options_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="kv_evict_during_decode: this server has reserved no memory"):
        config_of(tiny_llama, "morphkv", max_num_seqs=0)
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with pytest.raises(ValueError) as error:
        config_of(tiny_llama, "snapkv", {"speculative_config": drafts}, max_num_seqs=2)
    assert str(error.value) == (
        "kv_evict_max_num_seqs: expected 0 with speculative decoding, which goes with no eviction during decode or "
        "between chunks, got 2; leave it out, or drop --speculative-config"
    )


def test_a_cache_of_the_users_size_that_does_not_fit_is_refused(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with engine(tiny_llama, fields={"max_num_seqs": 2}) as running:
        memory: SideMemory = running.worker.side_memory
    cache = 64 * MIB
    beside = memory.beside(cache)
    assert beside > memory.scratch_bytes + 2 * memory.reserve.request_bytes(memory.models[0].spec.head_size)
    memory.check(cache, cache + beside, cache + beside)
    assert "gpu-memory-utilization" not in caplog.text
    memory.check(cache, cache + beside, cache + beside - 1)
    assert "more than --gpu-memory-utilization leaves" in caplog.text
    with pytest.raises(
        ValueError,
        match=r"--kv-cache-memory-bytes: .* give less than (\d+), for",
    ) as error:
        memory.check(cache, cache + beside - 1, cache)
    found = re.search(r"less than (\d+)", str(error.value))
    assert found is not None
    most = int(found[1])
    assert cache - 4096 < most < cache
    memory.check(most, cache + beside - 1, cache + beside)


def test_a_gpu_worker_tells_vllm_what_it_has_counted(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's log, and the size of the cache that it suggests, come from the worker's attributes."""
    with engine(tiny_llama, fields={"max_num_seqs": 2}) as running:
        memory: SideMemory = running.worker.side_memory
    worker: Any = EvictionGPUWorker.__new__(EvictionGPUWorker)
    worker.side_memory, worker.device, worker.total_consumed = memory, "cuda:0", 1000
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=None)
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: 200 * MIB)
    cache = worker.determine_available_memory()
    assert cache == memory.cache_bytes(200 * MIB) < 200 * MIB
    assert worker.total_consumed == 1000 + 200 * MIB - cache
    assert worker.available_kv_cache_memory_bytes == cache
    # a size that the user gave: 300 MiB of the device are free, and vLLM was told to use 250 of what was free at first
    worker.cache_config.kv_cache_memory_bytes = 200 * MIB
    worker.requested_memory, worker.init_snapshot = 250 * MIB, SimpleNamespace(free_memory=350 * MIB)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (300 * MIB, 1000 * MIB))
    checked: list[tuple[int, ...]] = []
    monkeypatch.setattr(memory, "check", lambda *sizes: checked.append(sizes))
    assert worker.determine_available_memory() == 200 * MIB
    assert checked == [(200 * MIB, 300 * MIB, 200 * MIB)]


def _answers(running: Engine, watch: Callable[[], None] = lambda: None) -> dict[str, list[int]]:
    """Serve answers that need a seat and some that need none; return the tokens of each."""
    tokens: dict[str, list[int]] = {}
    for index in range(9):
        options = [BY_BLOCK, BY_TOKEN, {}][index % 3]
        params = SamplingParams(temperature=0, max_tokens=40 + 9 * index, ignore_eos=True, extra_args=options)
        prompt = {"prompt_token_ids": random_prompt(100 + 20 * index, seed=index)}
        running.llm.llm_engine.add_request(str(index), prompt, params)
    while running.llm.llm_engine.has_unfinished_requests():
        for output in running.llm.llm_engine.step():
            tokens[output.request_id] = output.outputs[0].token_ids
        running.check()
        watch()
    running.check_all_free()
    return tokens


@pytest.mark.parametrize(
    "num_blocks", [pytest.param(None, marks=on_v1, id="enough memory"), pytest.param(24, id="preemptions")]
)
def test_the_next_request_waits_for_a_seat(tiny_llama: Path, num_blocks: int | None) -> None:
    settings: dict[str, Any] = {"max_model_len": 512}
    if num_blocks is not None:
        settings["num_gpu_blocks_override"] = num_blocks
    with engine(tiny_llama, fields={"max_num_seqs": 16}, **settings) as running:
        expected = _answers(running)
    with engine(tiny_llama, fields={"max_num_seqs": 2}, **settings) as running:
        running.poison_unowned_memory()
        most_seated, most_running = 0, 0

        def watch() -> None:
            nonlocal most_seated, most_running
            seated = running.scheduler._seats.num_taken
            assert len(running.bridge.ring.slots) <= 2 and seated <= 2
            most_seated, most_running = max(most_seated, seated), max(most_running, len(running.scheduler.running))

        found = _answers(running, watch)
        assert most_seated == 2 and running.scheduler._seats.num_taken == 0
        assert most_running > 2  # those that need no seat pass
    assert found.keys() == expected.keys()
    if num_blocks is None:  # what is computed anew after a preemption depends on when it comes
        assert found == expected


@on_v1
def test_seats_come_back_when_requests_are_aborted(tiny_llama: Path) -> None:
    with engine(tiny_llama, fields={"max_num_seqs": 1}) as running:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, extra_args=BY_BLOCK)
        llm_engine = running.llm.llm_engine
        for index in range(4):
            llm_engine.add_request(str(index), {"prompt_token_ids": random_prompt(120, seed=index)}, params)
        for index in range(4):
            for _ in range(3):
                llm_engine.step()
            assert [request.request_id.split("-")[0] for request in running.scheduler.running] == [str(index)]
            llm_engine.abort_request([str(index)])
        llm_engine.step()
        assert running.scheduler._seats.num_taken == 0
        running.check_all_free()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_are_copied_only_where_they_are_packed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnquantizedLinearMethod, "apply", lambda method, layer, x: x @ layer.weight.t())
    linear = nn.Module()  # as far as ``ModelWeights`` looks at one
    linear.weight = nn.Parameter(torch.zeros(6, 4, device=device))
    linear.input_size_per_partition, linear.quant_method = 4, UnquantizedLinearMethod()
    impl = SimpleNamespace(logits_soft_cap=0.0, sinks=None)
    attention = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0, impl=impl)
    parts = [AttentionParts(attention, None, linear, {})]
    monkeypatch.setattr(model, "attention_parts", lambda *_: parts)
    kept: dict[str, torch.Tensor] = {}
    weights = ModelWeights(linear, ["layer"], 128, kept)
    asked = frozenset({Need.OUTPUT_PROJECTION})
    found = weights.of(0, asked).output_projection
    assert found is not None and found.shape == (6, 4)
    assert (found is linear.weight) == (device == "meta") == (not kept)
    passing = ModelWeights(linear, ["layer"], 128)
    projection = passing.of(0, asked).output_projection
    assert projection is not None and projection.shape == (6, 4)
    # those that pass are asked for layer by layer
    assert passing.makes_copies(asked) == (device == "cpu")
    assert not weights.makes_copies(asked) and not passing.makes_copies(frozenset())
