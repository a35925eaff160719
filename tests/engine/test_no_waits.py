"""A step that evicts nothing never waits for the device: its inputs are on one that cannot be waited for.

One that evicts waits at most once, and launches as much for many requests as for few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from tests.engine.counted_device import CountedDevice, Work, on_host
from tests.engine.fake_device import FakeDevice, WaitError
from tests.engine.harness import Engine, async_on_cpu, engine
from tests.paged import make_pool
from tests.tiny_llama import random_prompt
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.engine.messages import StepEvictions
from vllm_kvevict.engine.worker.backends.base import EvictionMetadata, EvictionMetadataBuilder
from vllm_kvevict.engine.worker.backends.cpu import EvictionCPUImpl, EvictionCPUMetadataBuilder
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.likelihood import PromptLikelihood, mean_nlls
from vllm_kvevict.engine.worker.model import ModelWeights
from vllm_kvevict.engine.worker.pseudo_passes import PseudoPasses
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.pseudo_tokens import PseudoDecode
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs
from vllm_kvevict.policies.snapkv import SnapKV

LONG, SHORT = 300, 40
FIELDS = {"calibration": {"snapkv": {"alpha": 10.0, "beta": -74.0}}}
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
        with async_on_cpu(), engine(tiny_llama, budget=96, fields=FIELDS, async_scheduling=True) as started:
            yield started
    else:
        with engine(tiny_llama, budget=96, fields=FIELDS) as started:
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
METHODS = [LAVA, {"kv_budget_allocator": "adakv"}, {"kv_eviction": "keydiff"} | LAVA]
# how many requests a step evicts, tokens of their prompts, how they are evicted, and how often that waits
EVICTING: dict[str, tuple[Callable[[StepEvictions], int], int, dict[str, Any], int]] = {
    "prompts": (prompts_end, LONG, {}, 0),
    "prompts, by what is scored": (prompts_end, LONG, LAVA, 1),
    "answers by block": (lambda decisions: len(decisions.shrinking), 318, BY_BLOCK | LAVA, 0),
    "answers by block, by keys": (
        lambda decisions: len(decisions.shrinking),
        318,
        BY_BLOCK | {"kv_eviction": "keydiff"},
        0,
    ),
    "answers by block, by values": (
        lambda decisions: len(decisions.shrinking),
        318,
        BY_BLOCK | {"kv_eviction": "curdkv"},
        0,
    ),
    "answers by block, summed": (lambda decisions: len(decisions.shrinking), 318, BY_BLOCK | {"kv_eviction": "h2o"}, 0),
    "chunks": (lambda decisions: len(decisions.chunks), LONG, {"kv_evict_during_prefill": True}, 0),
    "late answers": (answers_fill_the_budget, 94, BY_BLOCK | LAVA, 1),
    "answers before their first": (lambda decisions: len(decisions.growing), 63, BY_BLOCK, 0),
    "token by token": (prompts_end, LONG, BY_TOKEN | {"kv_eviction": "tova"}, 0),
    "prompts, summed": (prompts_end, LONG, {"kv_eviction": "h2o"}, 0),
    "prompts, by their surroundings": (
        prompts_end,
        LONG,
        {"kv_eviction": "compactor", "kv_budget": 128},
        1,
    ),
    "prompts, by expectation": (prompts_end, LONG, {"kv_eviction": "expected_attention"}, 0),
    "prompts, looking ahead": (prompts_end, LONG, {"kv_eviction": "laq++"}, 1),
}


@pytest.mark.parametrize(("count", "length", "options", "num_waits"), EVICTING.values(), ids=EVICTING)
def test_a_step_that_evicts_waits_once_and_launches_as_much_for_five_as_for_two(
    running: Engine, count: Callable[[StepEvictions], int], length: int, options: dict[str, Any], num_waits: int
) -> None:
    two, five = (evicting(running, count, length, options, num_reqs) for num_reqs in (2, 5))
    assert two.waits == five.waits == ["to_host"] * num_waits
    assert two.launches == five.launches


@pytest.mark.parametrize(
    ("count", "length", "methods"),
    [
        pytest.param(prompts_end, LONG, METHODS, id="prompts"),
        pytest.param(answers_fill_the_budget, 94, [BY_BLOCK | method for method in METHODS], id="late answers"),
        pytest.param(prompts_end, LONG, [{"kv_budget": "auto"}], id="budgets by likelihood"),
    ],
)
def test_a_step_that_evicts_by_several_methods_waits_once(
    running: Engine, count: Callable[[StepEvictions], int], length: int, methods: list[dict[str, Any]]
) -> None:
    work = evicting(running, count, length, methods, 4)
    assert work.waits == ["to_host"]


def evicting(
    running: Engine,
    count: Callable[[StepEvictions], int],
    length: int,
    options: dict[str, Any] | list[dict[str, Any]],
    num_reqs: int,
) -> Work:
    """Return the work of the first step that evicts as many requests, which take turns if there are several options."""
    methods = options if isinstance(options, list) else [options]
    found: list[Work] = []

    def stepped(work: Work) -> None:
        if count(running.bridge.step.decisions) == num_reqs:
            found.append(work)

    scheduling, device, passes = running.scheduler.scheduler_config, CountedDevice(), running.bridge._pseudo_passes
    noisy = Passes(running.bridge.pool, passes._layer_names, running.bridge.failures, device, passes._vllm_config)
    with pytest.MonkeyPatch.context() as patch, device.serving(running.bridge, stepped):
        patch.setattr(running.bridge, "_pseudo_passes", noisy)
        patch.setattr(scheduling, "long_prefill_token_threshold", 100 if "kv_evict_during_prefill" in methods[0] else 0)
        for seed in range(num_reqs):
            method = methods[seed % len(methods)]
            running.add(random_prompt(length, seed), extra_args=method, max_tokens=40, ignore_eos=True)
        while not found:
            running.step()
        abort(running)
    return found[0]


class Passes(PseudoPasses):
    """Whose model answers with noise, on the device."""

    def __init__(
        self, pool: PagePool, layer_names: list[str], failures: Failures, device: CountedDevice, config: Any
    ) -> None:
        states = SimpleNamespace(hidden_states=device.of(torch.randn(3000, 8)))
        runner = SimpleNamespace(vllm_config=config, execute_model_state=states)
        super().__init__(runner, pool, layer_names, failures)
        self.device, self._end_tokens = device, device.of(torch.tensor([50, 51]))  # which never come

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, :1] + self.device.of(torch.randn(len(hidden), 50))

    def _pass(
        self, tokens: torch.Tensor, positions: torch.Tensor, decode: PseudoDecode, weights: ModelWeights
    ) -> torch.Tensor:
        for layer in range(self._pool.num_layers):
            shapes = [(len(tokens), group * self._pool.num_kv_heads, self._pool.head_size) for group in (4, 1, 1)]
            query, key, value = (self.device.of(torch.randn(shape)) for shape in shapes)
            decode.attend(layer, query, key, value, 0.25, LayerWeights())
        return self.device.of(torch.randn(len(tokens), 8))


class Sees(SnapKV):
    """Lets pseudo tokens see some tokens that it knows."""

    seen: torch.Tensor

    def __init__(self, seen: torch.Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "seen", seen)

    def preselect(self, inputs: ScoreInputs) -> torch.Tensor:
        return self.seen


@pytest.mark.parametrize("known", [True, False])
def test_pseudo_tokens_are_waited_for_once_and_together(known: bool) -> None:
    """The first request wants four of them and sees 3 tokens in each layer, the second one wants two and sees 5."""
    device, failures, plan, rows = CountedDevice(), Failures(), EvictionPlan(100, 3, 16), []
    with torch.inference_mode():
        pool = make_pool(2, 2, 20, 16, 16, "interleaved").pool
        pool.pages.zero_()
        device.move(pool)
    with torch.inference_mode(), device.at_work():
        for index, (wanted, num_seen) in enumerate([(4, 3), (2, 5)]):
            tokens = device.of(torch.full((2, num_seen), 99 if known or index else 100))
            eviction = Eviction(Method(Sees(tokens), Uniform(), 0, 0), plan, pool, device.of(torch.arange(1, 8)))
            request = SimpleNamespace(req_id=str(index), num_pseudo_tokens=wanted, seconds=0.0)
            row = SimpleNamespace(request=request, kv_len=100, end=9 * index + 9, eviction=eviction, selected=[])
            rows.append(row)
            query = device.of(torch.randn(32, 8, 16))
            row.selected = [eviction.preselect_layer(layer, query, 0.25) for layer in range(2)]
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=103))
        passes = Passes(pool, ["a", "b"], failures, device, config)
        (first, is_first_known), (second, is_second_known) = passes.run(rows, None)  # type: ignore[arg-type]
    assert device.work.waits == ["to_host"]
    # the context has room for three
    assert [len(queries) for queries in (*first, *second)] == [3, 3, 2, 2]
    assert (is_first_known, is_second_known) == (known, True)


def test_likelihoods_of_prompts_are_waited_for_once_and_together() -> None:
    device = CountedDevice()
    head = torch.nn.Linear(8, 50, bias=False)
    requests = [SimpleNamespace(likelihood=[], waiting=None) for _ in range(2)]
    ids = torch.randint(0, 50, (300,))
    ids[8 + 1] = 99  # an image's
    with torch.inference_mode(), device.at_work():
        weight = device.of(head.weight.detach())
        states = SimpleNamespace(hidden_states=device.of(torch.randn(300, 8)), input_batch=None)
        model = SimpleNamespace(compute_logits=lambda hidden: hidden @ weight.t(), modules=list)
        runner = SimpleNamespace(model=model, execute_model_state=states, input_ids=SimpleNamespace(gpu=device.of(ids)))
        rows = [SimpleNamespace(request=requests[0], start=0, end=200, kv_len=200)]
        rows += [SimpleNamespace(request=requests[1], start=200, end=300, kv_len=100)]
        for _ in range(2):
            PromptLikelihood(runner).observe(rows)  # type: ignore[arg-type]
        assert not device.work.waits
        found = mean_nlls([*requests, SimpleNamespace(likelihood=[])])  # type: ignore[list-item]
    assert device.work.waits == ["to_host"]
    logits = on_host(states.hidden_states) @ on_host(weight).t()
    nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:].clamp(max=49), reduction="none")
    assert found[0] == pytest.approx(float(nll[24:199:16].mean()))
    assert found[1] == pytest.approx(float(nll[208:299:16].mean()))
    assert found[2] is None


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waiting_is_counted(wait: Any) -> None:
    device = CountedDevice()
    with torch.inference_mode(), device.at_work():
        tensor = device.of(torch.arange(3))
        tensor[:2].add_(1)
        assert not device.work.waits
        wait(tensor)
    assert device.work.waits
