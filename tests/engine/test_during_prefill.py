"""Eviction between the chunks of a prompt: constant memory for prompts of any length, and the right tokens stay."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.conftest import USES_V2_RUNNER
from tests.engine.dense_decode import BLOCK, Budget, check_kept, h2o, run_and_watch, streaming_llm, tova
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.policies import POLICIES, EvictionPolicy, ScoreInputs

BUDGET, CHUNK = 128, 100
ON, OFF = {"kv_evict_during_prefill": 1}, {"kv_evict_during_prefill": 0}
NUM_BLOCKS = BUDGET // BLOCK
BOUND = 2 * (NUM_BLOCKS - 1) + -(-CHUNK // BLOCK) + 1


IN_PLACE = pytest.param(False, id="in place", marks=pytest.mark.more_on_v2("on V1 prompts are compacted in place, too"))


@pytest.fixture(scope="module", params=[pytest.param(True, id="fresh blocks"), IN_PLACE])
def running(tiny_llama: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    settings = {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": request.param}
    with engine(tiny_llama, budget=BUDGET, fields={"during_prefill": True}, **settings) as started:
        started.poison_unowned_memory()
        yield started


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> DenseModel:
    return DenseModel(tiny_llama)


CASES = [
    pytest.param("streaming_llm", streaming_llm, 4, 0, id="streaming_llm"),
    pytest.param("h2o", h2o, 0, 32, id="h2o", marks=pytest.mark.smoke),
    pytest.param("tova", tova, 0, 1, id="tova"),
]
MORE_LENGTHS = pytest.mark.more("shorter prompts, of which fewer chunks are evicted")
LENGTHS = [1001, *(pytest.param(length, marks=MORE_LENGTHS) for length in (150, 640))]


@pytest.mark.feature("eviction between the chunks of a prompt")
@pytest.mark.parametrize("bounded", [0, 1])
@pytest.mark.parametrize("length", [1001] if USES_V2_RUNNER else LENGTHS)
@pytest.mark.parametrize(("policy", "score", "num_sink", "num_recent"), CASES)
def test_tokens_kept_and_answers_are_those_of_a_dense_model(
    running: Engine,
    dense: DenseModel,
    policy: str,
    score: Any,
    num_sink: int,
    num_recent: int,
    length: int,
    bounded: int,
) -> None:
    prompt = random_prompt(length, seed=length)
    options = {"kv_eviction": policy, "kv_evict_during_decode": bounded}
    answer, held, kept = run_and_watch(running, prompt, max_tokens=70, extra_args=options)
    if not bounded:
        kept = {now: heads for now, heads in kept.items() if now <= length}
    budget = Budget(NUM_BLOCKS, num_sink, num_recent)
    num_swaps, logits = check_kept(dense, [*prompt, *answer], kept, score, budget)
    assert num_swaps <= 1
    # a hit in the prefix cache moves where chunks end
    ends = [now for now in sorted(kept) if now <= length]
    assert ends[-1] == length
    assert all(0 < after - before <= CHUNK for before, after in pairwise([CHUNK, *ends]))
    assert logits[length - 1 : -1].argmax(-1).tolist() == answer
    assert max(held[: length // CHUNK + 1]) <= BOUND
    running.check_all_free()


def test_chunks_and_decodes_in_one_batch_with_aborts(running: Engine) -> None:
    rng = random.Random(3)
    policies = ["snapkv", "lava", "h2o", "knorm", "morphkv", "curdkv"]
    names = []
    for index in range(16):
        options = {"kv_eviction": rng.choice(policies), "kv_budget_allocator": rng.choice(["uniform", "lava"])}
        options |= {"kv_budget": rng.choice([96, 128, 0.3]), **rng.choice([ON, ON, OFF])}
        prompt = random_prompt(rng.randint(20, 1500), seed=rng.randint(0, 3))
        names.append(running.add(prompt, max_tokens=rng.randint(1, 80), extra_args=options))
        for _ in range(rng.randint(0, 6)):
            running.step()
        if index % 5 == 4:
            running.llm.llm_engine.abort_request([rng.choice(names)])
    running.run()
    running.check_all_free()


@dataclass(frozen=True)
class _Counting(EvictionPolicy):
    """Looks at more queries than a block has tokens, and notes how many it was shown."""

    seen: ClassVar[list[int]] = []

    @property
    def query_window(self) -> int:
        return 2 * BLOCK

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_size: int) -> int:
        return 0

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        self.seen.append(len(inputs.query))
        return torch.arange(inputs.kv_len, dtype=torch.float32).expand(inputs.num_kv_heads, -1)


def test_a_first_eviction_behind_a_hit_sees_a_whole_window(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES._classes, "counting", _Counting)
    prompt = random_prompt(1001, seed=77)
    running.tokens([prompt], max_tokens=1, extra_args={"kv_eviction": "none"})
    for chunk in (33, CHUNK):
        _Counting.seen.clear()
        with running.in_chunks(chunk):
            running.tokens([prompt], max_tokens=4, extra_args={"kv_eviction": "counting", "kv_budget": 160})
        assert len(_Counting.seen) > 10 and set(_Counting.seen) == {2 * BLOCK}


def test_chunks_that_fail_together_are_scored_alone(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is answered in another way, since who failed is nobody."""
    monkeypatch.setattr(running.scheduler.scheduler_config, "long_prefill_token_threshold", CHUNK // 2)
    prompts = [random_prompt(320 + index, seed=index) for index in range(3)]
    options = {"skip_reading_prefix_cache": True, "extra_args": ON}
    expected = running.tokens(prompts, **options)
    score_layers, broken_up = ResidentEvictions.score_layers, []

    def fail(evictions: ResidentEvictions, layers: range, *rest: Any) -> None:
        if len(evictions.num_tokens) > 1 and layers.start > 0:
            broken_up.append(evictions)
            raise ZeroDivisionError("a bug in what scores several")
        score_layers(evictions, layers, *rest)

    monkeypatch.setattr(ResidentEvictions, "score_layers", fail)
    assert running.tokens(prompts, **options) == expected
    assert broken_up
