"""A step that evicts nothing never waits for the device: its inputs are on one that cannot be waited for.

One that evicts waits at most once, and launches as much for many requests as for few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from tests.engine.counted_device import CountedDevice, Work
from tests.engine.fake_device import FakeDevice, WaitError
from tests.engine.harness import Engine, async_on_cpu, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.messages import StepEvictions
from vllm_kvevict.engine.worker.backends.base import EvictionMetadata, EvictionMetadataBuilder
from vllm_kvevict.engine.worker.backends.cpu import EvictionCPUImpl, EvictionCPUMetadataBuilder

LONG, SHORT = 300, 40
# kinds of requests: tokens of the prompt, and how it is evicted
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (SHORT, {}),
    "evicted": (LONG, {}),
    "ragged": (LONG + 5, {"kv_budget_allocator": "lava"}),
    "by_block": (LONG + 1, {"kv_evict_during_decode": True}),
    "by_token": (LONG + 2, {"kv_eviction": "morphkv", "kv_evict_interval": 1}),
    "summed": (LONG + 3, {"kv_eviction": "h2o", "kv_evict_during_decode": True, "kv_evict_interval": 1}),
    "between_chunks": (LONG + 4, {"kv_evict_during_prefill": True}),
}
BATCHES = {
    "whole": ["whole", "whole"],
    "evicted": ["evicted", "ragged", "evicted"],
    "mixed": ["whole", "evicted", "whole", "ragged"],
    "by block": ["by_block", "whole", "by_block"],
    "by token": ["by_token", "summed", "by_token"],
    "all kinds": list(KINDS),
}


WAYS = [
    pytest.param(False, id="sync", marks=pytest.mark.more_on_v2("steps in flight have more to wait for")),
    pytest.param(True, id="async", marks=pytest.mark.not_on_v1("on V2 requests decode with a step in flight")),
]


@pytest.fixture(scope="module", params=WAYS)
def running(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Engine]:
    if request.param:
        with async_on_cpu(), engine(tiny_llama, budget=96, async_scheduling=True) as started:
            yield started
    else:
        with engine(tiny_llama, budget=96) as started:
            yield started


@dataclasses.dataclass
class Batch:
    """A batch that the engine has run: what vLLM said of it, and the step that it belongs to."""

    builder: EvictionMetadataBuilder
    common: Any
    step: Any


@contextmanager
def last_batch(running: Engine, kinds: list[str], chunk: int | None = None) -> Iterator[Batch]:
    """Yield a batch in which requests of these kinds decode; with ``chunk``, some tokens of a prompt as well."""
    batches: list[Batch] = []
    build = EvictionMetadataBuilder.build

    def spy(builder: EvictionMetadataBuilder, prefix: int, common: Any, fast_build: bool = False) -> Any:
        if builder.bridge is not None:
            batches.append(Batch(builder, common, builder.bridge.step))
        return build(builder, prefix, common, fast_build)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EvictionMetadataBuilder, "build", spy)
            for seed, kind in enumerate(kinds):
                length, options = KINDS[kind]
                running.add(random_prompt(length, seed), extra_args=options, max_tokens=200, ignore_eos=True)
            for _ in range(8):
                running.step()
            if chunk is not None:
                running.add(random_prompt(3 * chunk, 99), max_tokens=2)
                with running.in_chunks(chunk):
                    running.step()
        yield batches[-1]
    finally:
        abort(running)


def abort(running: Engine) -> None:
    running.llm.llm_engine.abort_request(list(running.scheduler.requests), internal=True)
    running.run()
    running.check_all_free()


def serve(
    running: Engine, batch: Batch, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> EvictionMetadata | None:
    """Build the metadata of a batch and run attention over it on that device, kernels aside."""
    bridge = batch.builder.bridge
    assert bridge is not None
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", lambda *_: None)
    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", lambda *arguments: arguments[7])
    # of CPU attention, which has no device to wait for
    monkeypatch.setattr(EvictionCPUMetadataBuilder, "_launch", lambda *_: None)
    monkeypatch.setattr(EvictionCPUImpl, "attend_folded", lambda *_: None)
    layers = running.worker.vllm_config.compilation_config.static_forward_context
    heads = layers[next(iter(bridge.layer_index))].num_heads
    tokens = device.of(torch.zeros(batch.common.num_actual_tokens, heads, bridge.pool.head_size))
    keys = device.of(torch.zeros(batch.common.num_actual_tokens, bridge.pool.num_kv_heads, bridge.pool.head_size))
    bridge.step = dataclasses.replace(batch.step, is_over=False)
    with torch.inference_mode(), device.without_waits():  # as in a worker
        metadata = batch.builder.build(0, device.metadata(batch.common))
        for name in bridge.layer_index if metadata is not None else ():
            layer = layers[name]
            layer.impl.forward(layer, tokens, keys, keys, layer.kv_cache, metadata, device.of(tokens))
        if metadata is not None:
            bridge._replacing.choose_holes(bridge.step.replacements, bridge._weights)  # as at the end of a step
    bridge.step.is_over = True
    assert not {req_id: bridge.failures.get(req_id) for req_id in bridge.step.req_ids if req_id in bridge.failures}
    return metadata


def forget_batches(bridge: Any) -> None:
    """Nothing is known of the last batch, as if a request had come or gone."""
    bridge._folder._decoding = None
    bridge.ring._known = None
    bridge._replacing._known = ([], -1, [])


@pytest.mark.parametrize("kinds", BATCHES.values(), ids=BATCHES)
def test_a_decode_step_waits_for_nothing(running: Engine, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with last_batch(running, kinds) as batch:
        bridge, device = batch.builder.bridge, FakeDevice()
        assert bridge is not None
        assert not bridge.step.decisions.planned
        forget_batches(bridge)
        device.move(bridge)
        try:
            for _ in range(2):  # the second time all of the batch is known
                metadata = serve(running, batch, device, monkeypatch)
                assert (metadata is None) == (set(kinds) == {"whole"})
        finally:
            device.restore()
            forget_batches(bridge)


def test_a_chunk_of_a_prompt_beside_them_waits_for_nothing(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with last_batch(running, ["whole", "evicted", "by_block"], chunk=100) as batch:
        bridge, device = batch.builder.bridge, FakeDevice()
        assert bridge is not None
        assert bridge.step.decisions.prefilling
        forget_batches(bridge)
        device.move(bridge)
        try:
            assert serve(running, batch, device, monkeypatch) is not None
        finally:
            device.restore()
            forget_batches(bridge)


WAITS = {
    "a number": lambda tensor: int(tensor[0]),
    "a list": lambda tensor: tensor.tolist(),
    "a comparison": lambda tensor: torch.equal(tensor, tensor + 1),
    "a truth value": lambda tensor: bool((tensor > 0).any()),
    "places": lambda tensor: tensor.nonzero(),
    "a mask": lambda tensor: tensor[tensor > 0],
    "an assignment by a mask": lambda tensor: tensor.__setitem__(tensor > 0, 0),
    "an assignment of what a mask picks": lambda tensor: tensor.__setitem__(tensor > 0, tensor[tensor > 0]),
    "repeats": lambda tensor: torch.repeat_interleave(tensor),
    "a list that becomes a tensor": lambda tensor: torch.tensor([1, 2], device=tensor.device),
    "indices of the host": lambda tensor: tensor[torch.from_numpy(np.array([0]))],
    "numbers of the host": lambda tensor: tensor.copy_(torch.from_numpy(np.zeros(3))),
    "NumPy": lambda tensor: tensor.numpy(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waiting_is_noticed(wait: Any) -> None:
    device = FakeDevice()
    with torch.inference_mode(), device.without_waits():
        tensor = device.of(torch.arange(3))
        tensor[:2].add_(1)
        with pytest.raises((WaitError, RuntimeError, TypeError, AttributeError)) as caught:
            wait(tensor)
    assert not isinstance(caught.value, AttributeError) or "fake" in str(caught.value).lower()


def prompts_end(decisions: StepEvictions) -> int:
    return sum(not end.is_late for end in decisions.ending.values())


def answers_fill_the_budget(decisions: StepEvictions) -> int:
    return sum(end.is_late for end in decisions.ending.values())


BY_BLOCK, BY_TOKEN = {"kv_evict_during_decode": True}, {"kv_evict_during_decode": True, "kv_evict_interval": 1}
LAVA = {"kv_budget_allocator": "lava"}
# how many requests a step evicts, tokens of their prompts, how they are evicted, and how often that waits
EVICTING: dict[str, tuple[Callable[[StepEvictions], int], int, dict[str, Any], int]] = {
    "prompts": (prompts_end, LONG, {}, 0),
    "prompts, by what is scored": (prompts_end, LONG, LAVA, 1),
    "answers by block": (lambda decisions: len(decisions.shrinking), 318, BY_BLOCK | LAVA, 0),
    "answers by block, summed": (lambda decisions: len(decisions.shrinking), 318, BY_BLOCK | {"kv_eviction": "h2o"}, 0),
    "chunks": (lambda decisions: len(decisions.chunks), LONG, {"kv_evict_during_prefill": True}, 0),
    "late answers": (answers_fill_the_budget, 94, BY_BLOCK | LAVA, 1),
    "answers before their first": (lambda decisions: len(decisions.growing), 63, BY_BLOCK, 0),
    "token by token": (prompts_end, LONG, BY_TOKEN | {"kv_eviction": "tova"}, 0),
}


@pytest.mark.parametrize(("count", "length", "options", "num_waits"), EVICTING.values(), ids=EVICTING)
def test_a_step_that_evicts_waits_once_and_launches_as_much_for_five_as_for_two(
    running: Engine, count: Callable[[StepEvictions], int], length: int, options: dict[str, Any], num_waits: int
) -> None:
    two, five = (evicting(running, count, length, options, num_reqs) for num_reqs in (2, 5))
    assert two.waits == five.waits == ["to_host"] * num_waits
    assert two.launches == five.launches


def evicting(
    running: Engine, count: Callable[[StepEvictions], int], length: int, options: dict[str, Any], num_reqs: int
) -> Work:
    """Return the work of the first step that evicts as many requests."""
    found: list[Work] = []

    def stepped(work: Work) -> None:
        if count(running.bridge.step.decisions) == num_reqs:
            found.append(work)

    scheduling = running.scheduler.scheduler_config
    with pytest.MonkeyPatch.context() as patch, CountedDevice().serving(running.bridge, stepped):
        patch.setattr(scheduling, "long_prefill_token_threshold", 100 if "kv_evict_during_prefill" in options else 0)
        for seed in range(num_reqs):
            running.add(random_prompt(length, seed), extra_args=options, max_tokens=40, ignore_eos=True)
        while not found:
            running.step()
        abort(running)
    return found[0]


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waiting_is_counted(wait: Any) -> None:
    device = CountedDevice()
    with torch.inference_mode(), device.at_work():
        tensor = device.of(torch.arange(3))
        tensor[:2].add_(1)
        assert not device.work.waits
        wait(tensor)
    assert device.work.waits
