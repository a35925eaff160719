"""Every registered policy through the real engine: any chunks, any neighbours, any allocator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.eviction.record import RecordedEviction, recorded_evictions
from vllm_kvevict.policies import POLICIES, Need

pytestmark = pytest.mark.on_v1

BUDGET, NUM_TOKENS = 160, 1003
# the runner hands over what policies need: on V2, whose interpreter takes its time, one policy for each kind of it
OF_EACH_KIND = ["snapkv", "h2o", "obcache_k", "compactor", "criticalkv", "keydiff", "laq", "laq_deferred", "morphkv"]
NAMES = OF_EACH_KIND if USES_V2_RUNNER else POLICIES.names()
ALL_QUERIES = [name for name in NAMES if Need.ALL_QUERIES in POLICIES.get(name)().needs]
# Triton's interpreter takes its time
ALLOCATORS = ("lava",) if USES_V2_RUNNER else ("uniform", "adakv", "lava")


def options(policy: str, allocator: str = "uniform") -> dict[str, str]:
    return {"kv_eviction": policy, "kv_budget_allocator": allocator}


def evict_in_chunks(model: Path, chunk: int) -> dict[str, RecordedEviction]:
    """What every policy sees and keeps of one prompt that is computed ``chunk`` tokens at a time."""
    prompt = random_prompt(NUM_TOKENS, seed=11)
    settings = {"max_num_batched_tokens": chunk, "enable_prefix_caching": False}
    with engine(model, budget=BUDGET, **settings) as running, recorded_evictions() as records:
        for name in NAMES:
            running.tokens([prompt], max_tokens=10, extra_args=options(name))  # some look at the answer
    return dict(zip(NAMES, records, strict=True))


@pytest.fixture(scope="module")
def whole(tiny_llama: Path) -> dict[str, RecordedEviction]:
    return evict_in_chunks(tiny_llama, 2048)


@pytest.mark.more_on_v2("on V1 every policy sees such chunks; test_schedules.py has some on V2")
@pytest.mark.parametrize("chunk", [64, 1000, pytest.param(256, marks=pytest.mark.more("chunks of another size"))])
def test_chunks_do_not_change_what_is_kept(tiny_llama: Path, whole: dict[str, RecordedEviction], chunk: int) -> None:
    """Where two runs differ, the two tokens tie: the sums of another chunk size are rounded in another order."""
    for name, record in evict_in_chunks(tiny_llama, chunk).items():
        torch.testing.assert_close(record.scores, whole[name].scores, rtol=1e-3, atol=1e-6, msg=name)
        assert record.kept_tokens.equal(whole[name].kept_tokens), name
        moved = record.kept != whole[name].kept
        cut = record.scores.masked_fill(~record.kept, torch.inf).amin(-1, keepdim=True)
        distance = ((record.scores - cut).abs() / cut.abs().clamp(min=1e-6))[moved]
        assert (distance < 1e-3).all() and moved.sum() <= 4, (name, int(moved.sum()), distance)


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, budget=BUDGET, kv_cache_memory_bytes=128 << 20) as started:
        started.poison_unowned_memory()
        yield started


@pytest.mark.parametrize("policy", NAMES)
def test_only_prompts_whose_every_query_is_needed_miss_the_cache(running: Engine, policy: str) -> None:
    prompt = random_prompt(700, seed=NAMES.index(policy) + 50)
    window = POLICIES.get(policy)().query_window
    (cold,) = running.generate([prompt], extra_args=options(policy))
    (warm,) = running.generate([prompt], extra_args=options(policy))
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == (0 if policy in ALL_QUERIES else (700 - window) // 32 * 32)
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


def test_some_policies_need_every_query_and_some_do_not() -> None:
    assert 0 < len(ALL_QUERIES) < len(NAMES)


def test_all_of_them_in_one_batch_answer_as_alone(running: Engine) -> None:
    cases = [options(policy, allocator) for policy in NAMES for allocator in ALLOCATORS]
    prompts = [random_prompt(300 + 17 * index, seed=index) for index in range(len(cases))]
    alone = [
        running.tokens([prompt], extra_args=case, skip_reading_prefix_cache=True)[0]
        for prompt, case in zip(prompts, cases, strict=True)
    ]
    before = running.num_evictions
    ids = [running.add(prompt, extra_args=case) for prompt, case in zip(prompts, cases, strict=True)]
    outputs = running.run()
    assert running.max_running > 8
    assert running.num_evictions == before + len(cases)
    assert [list(outputs[request_id].outputs[0].token_ids) for request_id in ids] == alone
    running.check_all_free()
