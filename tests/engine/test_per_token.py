"""Token by token: each new token takes the slot of the one that goes, and what stays is what the papers keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import USES_V2_RUNNER
from tests.engine.dense_decode import (
    BLOCK,
    Budget,
    Score,
    check_kept,
    h2o,
    morphkv,
    run_and_watch,
    streaming_llm,
    tova,
)
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel

BUDGET = 128
NUM_BLOCKS = BUDGET // BLOCK
ON = {"kv_evict_during_decode": 1, "kv_evict_interval": 1}


@pytest.fixture(scope="module", params=[True] if USES_V2_RUNNER else [True, False], ids=lambda on: f"cache {on}")
def running(tiny_llama: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    fields = {"policy_options": {"window": 40}}  # the ring is as deep as the server's own policy needs
    with engine(tiny_llama, "morphkv", BUDGET, fields, enable_prefix_caching=request.param) as started:
        started.poison_unowned_memory()
        yield started


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> DenseModel:
    return DenseModel(tiny_llama)


CASES = [
    pytest.param({"kv_eviction": "tova"}, tova, 0, 1, id="tova"),
    pytest.param({"kv_eviction": "h2o"}, h2o, 0, 32, id="h2o", marks=pytest.mark.smoke),
    pytest.param({"kv_eviction": "streaming_llm"}, streaming_llm, 4, 0, id="streaming_llm"),
    pytest.param({"kv_eviction": "morphkv"}, morphkv(40, "sum", "max"), 0, 40, id="morphkv"),
]


# below the budget; where the last block is empty; one behind that; the budget; above it
MORE_LENGTHS = pytest.mark.more("prompts of other lengths relative to blocks and budget")
LENGTHS = [pytest.param(length, marks=MORE_LENGTHS) for length in (40, 101, 128)] + [96, 203]


@pytest.mark.feature("eviction while the answer grows")
@pytest.mark.parametrize("length", [203] if USES_V2_RUNNER else LENGTHS)
@pytest.mark.parametrize(("options", "score", "num_sink", "num_recent"), CASES)
def test_tokens_kept_and_answers_are_those_of_a_dense_model(
    running: Engine,
    dense: DenseModel,
    options: dict[str, Any],
    score: Score,
    num_sink: int,
    num_recent: int,
    length: int,
) -> None:
    prompt = random_prompt(length, seed=length)
    answer, held, kept = run_and_watch(running, prompt, True, max_tokens=70, extra_args=options | ON)
    start = max(length, (NUM_BLOCKS - 1) * BLOCK)
    assert sorted(kept) == list(range(start, length + 69))
    assert set(held[start - length + 3 :]) == {NUM_BLOCKS}
    budget = Budget(NUM_BLOCKS, num_sink, num_recent, per_token_from=0)
    num_swaps, logits = check_kept(dense, [*prompt, *answer], kept, score, budget)
    assert num_swaps <= 2  # at most one tie, up to rounding, for which all heads of a layer decide together
    assert logits[length - 1 : -1].argmax(-1).tolist() == answer
    running.check_all_free()


@pytest.mark.more_on_v2("on V1 the same prompts go on token by token")
def test_prompts_evicted_chunk_by_chunk_go_on_token_by_token(tiny_llama: Path, dense: DenseModel) -> None:
    fields = {"during_prefill": True, "during_decode": True, "interval": 1}
    with engine(tiny_llama, "h2o", BUDGET, fields, max_num_batched_tokens=100) as running:
        running.poison_unowned_memory()
        for length in (96, 333, 640):
            prompt = random_prompt(length, seed=length)
            answer, _, kept = run_and_watch(running, prompt, True, max_tokens=40)
            assert [now for now in sorted(kept) if now >= length] == list(range(length, length + 39))
            budget = Budget(NUM_BLOCKS, 0, 32, per_token_from=length)
            num_swaps, logits = check_kept(dense, [*prompt, *answer], kept, h2o, budget)
            assert num_swaps <= 1
            assert logits[length - 1 : -1].argmax(-1).tolist() == answer
            running.check_all_free()


POLICIES = ["tova", "h2o", "streaming_llm", "morphkv"]


OTHER_ALLOCATORS = pytest.mark.more("shares that another allocator has found")
ALLOCATORS = ["lava", *(pytest.param(name, marks=OTHER_ALLOCATORS) for name in ("uniform", "adakv"))]


@pytest.mark.parametrize("allocator", ["lava"] if USES_V2_RUNNER else ALLOCATORS)
def test_batches_of_several_policies_and_allocators_with_aborts(running: Engine, allocator: str) -> None:
    prompts = [random_prompt(50 + 60 * index, seed=index) for index in range(8)]
    options = [{"kv_eviction": POLICIES[index % 4], "kv_budget_allocator": allocator, **ON} for index in range(8)]
    running.check_as_alone(list(zip(prompts, options, strict=True)), 60)
    ids = [running.add(prompt, max_tokens=60, extra_args=each) for prompt, each in zip(prompts, options, strict=True)]
    for index, request_id in enumerate(ids[::2]):
        for _ in range(7 * index):
            running.step()
        running.llm.llm_engine.abort_request([request_id])
    outputs = running.run()
    assert all(len(outputs[request_id].outputs[0].token_ids) == 60 for request_id in ids[1::2])
    running.check_all_free()


def test_a_request_that_must_start_again_is_evicted_anew(running: Engine) -> None:
    prompt = random_prompt(200, seed=7)
    running.add(prompt, max_tokens=80, extra_args={"kv_eviction": "morphkv", **ON})
    for _ in range(30):
        running.step()
    assert running.llm.reset_prefix_cache(reset_running_requests=True)
    before = running.num_evictions
    (output,) = running.run().values()
    assert len(output.outputs[0].token_ids) == 80
    assert running.num_evictions == before + 1
    running.check_all_free()


def test_blocks_of_answers_are_counted(running: Engine) -> None:
    evicted = [record for record in records_of(running, random_prompt(200, seed=3)) if record.during_decode]
    assert [record.evicted_tokens for record in evicted] == [BLOCK] * 2
    assert {record.policy for record in evicted} == {"tova"}


def records_of(running: Engine, prompt: list[int]) -> list[Any]:
    running.add(prompt, max_tokens=70, extra_args={"kv_eviction": "tova", **ON})
    records: list[Any] = []
    make_stats = running.scheduler.make_stats
    running.scheduler.make_stats = lambda *args, **kwargs: (
        records.extend(running.scheduler._records),
        make_stats(*args, **kwargs),
    )[1]
    try:
        running.run()
    finally:
        del running.scheduler.make_stats
    return records
