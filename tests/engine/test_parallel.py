"""Several workers: each holds some of the heads or of the layers, and all of them evict the same blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams

from tests.conftest import USES_V2_RUNNER
from tests.engine.failing_policies import WHERE, installed
from tests.tiny_llama import random_prompt
from vllm_kvevict import kv_eviction_args

LENGTHS = (40, 333, 700, 1100)
BUDGET = 96
ALLOCATORS = {name: {"kv_budget_allocator": name} for name in ("uniform", "pyramid", "lava")}
OTHERS = {"laq": {"kv_eviction": "laq"}, "auto": {"kv_budget": "auto"}}
CASES = {**ALLOCATORS, **OTHERS}
CALIBRATION = {"snapkv": {"alpha": 10.0, "beta": -74.0}}


# when a policy raises -> options of the request
FAILURES: dict[str, list[dict[str, int]]] = {
    "made": [{}],
    "observing": [{}],
    "end": [{}],
    "again": [{"kv_evict_during_prefill": 1}, {"kv_evict_during_decode": 1}],
    "step": [{"kv_evict_during_decode": 1, "kv_evict_interval": 1}],
}


def answers(
    model: Path, cases: dict[str, Any], failing: dict[str, list[dict[str, int]]] | None = None, **settings: Any
) -> dict[str, list[list[int]]]:
    """Return what an engine answers in every case, after it has outlived policies that raise."""
    settings = {"enforce_eager": True, **settings}
    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_batched_tokens=512,
        seed=0,
        dtype="float32",
        kv_cache_memory_bytes=32 << 20,
        disable_log_stats=False,
        **settings,
        **kv_eviction_args("snapkv", BUDGET, calibration=CALIBRATION, max_num_seqs=16),
    )
    try:
        if failing:
            check_only_they_end(llm, failing)
        return {name: generate(llm, options) for name, options in cases.items()}
    finally:
        llm.llm_engine.engine_core.shutdown()


def generate(llm: LLM, options: dict[str, str]) -> list[list[int]]:
    prompts = [{"prompt_token_ids": random_prompt(length, seed=length)} for length in LENGTHS]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False, extra_args=options)
    before = num_evictions()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert num_evictions() == before + sum(length > BUDGET for length in LENGTHS)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.kv_cache_manager.block_pool.get_usage() == 0
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_only_they_end(llm: LLM, failing: dict[str, list[dict[str, int]]]) -> None:
    """Requests of policies that raise on some worker, beside others of which one is evicted and one is whole."""
    options: list[dict[str, Any]] = [{}, {"kv_eviction": "none"}]
    options += [
        {"kv_eviction": f"{where}_{when}", **each} for when, of in failing.items() for where in WHERE for each in of
    ]
    prompts = [{"prompt_token_ids": random_prompt(length, seed=length)} for length in (400, 60)]
    # several chunks only where something happens between them; both answers soon go beyond a block
    lengths = [700 if "kv_evict_during_prefill" in each else 220 for each in options[2:]]
    prompts += [{"prompt_token_ids": random_prompt(length, seed=index)} for index, length in enumerate(lengths)]
    settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(**settings, extra_args=each) for each in options]
    alone = [llm.generate([prompts[index]], params[index], use_tqdm=False)[0].outputs[0] for index in (0, 1)]
    first, second, *failed = (output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False))
    assert [first.token_ids, second.token_ids] == [output.token_ids for output in alone]
    for output, each in zip(failed, options[2:], strict=True):
        assert output.finish_reason == "error" and len(output.token_ids) < 12, each
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.kv_cache_manager.block_pool.get_usage() == 0


def num_evictions() -> float:
    """Return how many prompts all engines of this process have evicted."""
    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    return sum(sample.value for sample in samples if sample.name == "kvevict:evictions_total")


@pytest.fixture(scope="module")
def one(tiny_llama: Path) -> dict[str, list[list[int]]]:
    """What one worker answers."""
    return answers(tiny_llama, CASES)


@pytest.mark.not_on_v1("the newest vLLM with V2 runs it in `make test`")
@pytest.mark.feature("tensor parallelism")
def test_two_workers_answer_as_one(
    tiny_llama: Path, one: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with installed(tmp_path):
        two = answers(tiny_llama, CASES, FAILURES, tensor_parallel_size=2)
    for same in ("uniform", "pyramid", *OTHERS):
        assert two[same] == one[same]
    # lava compares heads, and a worker sees its own ones only: the shares differ, the blocks do not
    assert two["lava"][0] == one["lava"][0], "this prompt fits its budget"
    assert [len(answer) for answer in two["lava"]] == [24] * len(LENGTHS)


@pytest.mark.not_on_v1("the newest vLLM with V2 runs it in `make test`")
@pytest.mark.feature("pipeline parallelism")
def test_two_stages_answer_as_one(
    tiny_llama: Path, one: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled on V1, which has no pipeline in eager mode on CPU."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with installed(tmp_path):
        two = answers(tiny_llama, ALLOCATORS, FAILURES, pipeline_parallel_size=2, enforce_eager=USES_V2_RUNNER)
    assert two["uniform"] == one["uniform"]
    # these compare layers, and a stage sees its own ones only
    for allocator in ("pyramid", "lava"):
        assert two[allocator][0] == one[allocator][0], "this prompt fits its budget"
        assert [len(answer) for answer in two[allocator]] == [24] * len(LENGTHS)
