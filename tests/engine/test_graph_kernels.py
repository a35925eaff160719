"""Decode steps as CUDA graphs of FlashAttention, for whose kernels functions stand in: with drafts, adapters, sleep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from vllm import SamplingParams
from vllm.lora.punica_wrapper import punica_cpu as ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.conftest import USES_V2_RUNNER
from tests.engine.cuda_graphs import Graph, StandInCall
from tests.engine.graph_engines import Join, check_replays, checked_replays, flash_engine, serve, triton_engine
from tests.engine.harness import Engine
from tests.engine.test_speculation import counted_drafts
from tests.tiny_llama import random_prompt
from tests.tiny_lora import make_adapter
from vllm_kvevict.engine.worker.graphs import FoldedDescriptor

pytestmark = pytest.mark.skipif(not USES_V2_RUNNER, reason="full graphs are those of model runner V2")

NUM_DRAFTS = 2
# more tokens than without drafts, for as many steps
JOINS = [
    Join(0, 20, 150, {"kv_eviction": "none"}),
    Join(4, 100, 70, {"kv_budget_allocator": "lava"}),
    Join(8, 70, 60, {"kv_eviction": "streaming_llm"}),
    Join(26, 110, 40, {"kv_budget_allocator": "pyramid"}),
    Join(27, 45, 12),
]


@pytest.fixture(scope="module")
def other_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that says often, and not always, what the tiny Llama says."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(1)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.add_(torch.randn_like(weight) * weight.std() * 0.3)
    folder = tmp_path_factory.mktemp("other_llama")
    model.save_pretrained(folder)
    return folder


def start(version: int, model: Path, sizes: list[int], **settings: Any) -> AbstractContextManager[Engine]:
    """Start an engine with a version of FlashAttention, or with Triton attention if that is 0."""
    settings = {"policy": "snapkv", "budget": 64, **settings}
    if version:
        return flash_engine(model, sizes, version, **settings)
    return triton_engine(model, sizes, **settings)


def check_folded_calls(running: Engine, version: int) -> None:
    """Numbers that FlashAttention's folded calls are captured with must do for whatever comes later."""
    config = running.worker.vllm_config
    most_splits = config.attention_config.flash_attn_max_num_splits_for_cuda_graph if version == 3 else 0
    graphs = running.worker.model_runner.cudagraph_manager.graphs
    for graph in (graph for desc, graph in graphs.items() if isinstance(desc, FoldedDescriptor)):
        calls = [each.arguments[1] for each in graph.work if isinstance(each, StandInCall)]
        attention = [numbers for numbers in calls if "num_splits" in numbers]
        assert len(attention) == config.model_config.hf_config.num_hidden_layers
        for numbers in attention:
            assert numbers["num_splits"] == most_splits
            assert numbers["max_seqlen_k"] == config.model_config.max_model_len


MORE = pytest.mark.more("drafts are verified through FlashAttention 3, and Triton attention decodes without")


@pytest.mark.feature("full CUDA graphs of decode steps, not run on a GPU", runners=("V2",))
@pytest.mark.parametrize(
    ("version", "drafter"),
    [
        (3, "draft_model"),
        pytest.param(2, "draft_model", marks=MORE),
        pytest.param(2, None, marks=MORE),
        pytest.param(3, None, marks=MORE),
        pytest.param(0, "ngram", marks=MORE),
    ],
)
def test_two_sets_replay_what_python_does(
    tiny_llama: Path, other_llama: Path, version: int, drafter: str | None
) -> None:
    settings: dict[str, Any] = {}
    query_len = 1
    if drafter is not None:
        query_len += NUM_DRAFTS
        settings["speculative_config"] = {"method": drafter, "num_speculative_tokens": NUM_DRAFTS}
    if drafter == "draft_model":
        settings["speculative_config"]["model"] = str(other_llama)
    elif drafter == "ngram":
        settings["speculative_config"] |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with start(version, tiny_llama, [], **settings) as running:
        counts = counted_drafts(running)
        served_eagerly = serve(running, JOINS)
    if drafter is not None:
        drafted, accepted = map(sum, zip(*counts, strict=True))
        assert accepted > 0 and drafted - accepted > 50
    with start(version, tiny_llama, [query_len, 4 * query_len], **settings) as running:
        replays = check_replays(running, JOINS, served_eagerly)
        assert {rows % query_len for rows in replays.rows} == {0}
        if version:
            check_folded_calls(running, version)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[list[int]]:
    with start(3, tiny_llama, []) as running:
        return short_answers(running)


def short_answers(running: Engine) -> list[list[int]]:
    prompts = [random_prompt(length, seed=length) for length in (100, 40)]
    return running.tokens(prompts, max_tokens=8) + running.tokens(prompts[1:], max_tokens=3)


@dataclass
class Estimate:
    """num_bytes: as vLLM estimates; made: graphs captured for that, and after it for the engine"""

    running: Engine
    num_bytes: int
    made: list[Graph]


@pytest.fixture(scope="module")
def estimated(tiny_llama: Path, expected: object) -> Iterator[Estimate]:
    """An engine that has asked for the memory of its graphs before it has a cache, as one on a GPU does."""
    made: list[Graph] = []
    num_bytes: list[int] = []
    determine, make, free = CPUWorker.determine_available_memory, Graph.__init__, 1 << 40

    def with_estimate(worker: Any) -> int:
        num_bytes.append(worker.model_runner.profile_cudagraph_memory())
        assert not worker.model_runner._eviction_builders
        return determine(worker)

    def noted(graph: Graph, *args: Any) -> None:
        make(graph, *args)
        made.append(graph)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Graph, "__init__", noted)
        patched.setattr(CPUWorker, "determine_available_memory", with_estimate)
        patched.setattr(
            torch.accelerator, "get_memory_info", lambda *_: (free - sum(graph.num_bytes for graph in made), free)
        )
        with start(3, tiny_llama, [1, 2, 4]) as running:
            yield Estimate(running, *num_bytes, made)


def check_short_answers(running: Engine, expected: list[list[int]]) -> None:
    with checked_replays(running) as replays:
        assert short_answers(running) == expected
    assert replays.rows and not replays.faults


@pytest.mark.smoke
def test_memory_of_graphs_is_estimated_for_both_sets(estimated: Estimate, expected: list[list[int]]) -> None:
    # vLLM captures two of each set, and takes the others to be like the second, of a MiB or more
    first, second, *_ = estimated.made
    assert estimated.num_bytes == first.num_bytes + 5 * max(second.num_bytes, 1 << 20)
    assert len(estimated.made) == 4 + 6
    check_short_answers(estimated.running, expected)


def test_graphs_are_right_after_sleep(estimated: Estimate, expected: list[list[int]]) -> None:
    """At level 1 weights come back where they were, and the cache without what was in it."""
    caches, llm = estimated.running.worker.model_runner.kv_caches, estimated.running.llm
    assert short_answers(estimated.running) == expected
    llm.sleep(level=1)
    for cache in caches:
        cache.fill_(torch.nan)
    llm.wake_up()
    for cache in caches:
        cache.zero_()
    check_short_answers(estimated.running, expected)


@contextmanager
def _adapters_as_on_a_gpu() -> Iterator[None]:
    """vLLM's kernels for adapters look up the one of each token; what it has for CPUs counts tokens on the host."""

    def indices(wrapper: PunicaWrapperCPU, tokens: torch.Tensor) -> torch.Tensor:
        return wrapper._token_lora_indices[: len(tokens)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            PunicaWrapperCPU,
            "_shrink_prefill",
            lambda self, y, x, weights, scale: ops.bgmv_shrink(x, weights, y, indices(self, x), scale),
        )
        patched.setattr(
            PunicaWrapperCPU,
            "_expand_prefill",
            lambda self, y, x, weights, add: ops.bgmv_expand(x, weights, y, indices(self, x), add),
        )
        patched.setattr(
            PunicaWrapperCPU,
            "_expand_slice_prefill",
            lambda self, y, x, weights, *place: ops.bgmv_expand_slice(x, weights, y, indices(self, x), *place),
        )
        yield


@pytest.mark.feature("LoRA", runners=("V2",))
def test_graphs_of_batches_with_and_without_adapters(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = LoRARequest("red", 1, str(make_adapter(tiny_llama, tmp_path / "red", seed=0)))
    settings = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    cases = [(100, {}, adapter), (40, {"kv_eviction": "none"}, adapter), (90, {}, None)]

    def answers(running: Engine) -> list[list[int]]:
        tokens = []
        for batch in (cases, cases[1:2], cases[2:]):
            for index, (length, options, with_adapter) in enumerate(batch):
                params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, extra_args=options)
                prompt = {"prompt_token_ids": random_prompt(length, seed=length)}
                running.llm.llm_engine.add_request(str(index), prompt, params, lora_request=with_adapter)
            outputs = running.run()
            tokens += [list(outputs[str(index)].outputs[0].token_ids) for index in range(len(batch))]
        return tokens

    with _adapters_as_on_a_gpu():
        with start(3, tiny_llama, [], **settings) as running:
            eagerly = answers(running)
        with start(3, tiny_llama, [1, 4], **settings) as running:
            with checked_replays(running) as replays:
                assert answers(running) == eagerly
            graphs = running.worker.model_runner.cudagraph_manager.graphs
    assert replays.rows and not replays.faults
    kinds = [(type(desc) is FoldedDescriptor, desc.num_active_loras > 0) for desc in graphs]
    replayed = {kind for kind, graph in zip(kinds, graphs.values(), strict=True) if graph.num_replays}
    assert replayed == {(False, True), (True, False), (True, True)}
    assert len(kinds) == 2 * len(set(kinds)) == 8
