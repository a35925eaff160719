"""Eviction while the answer grows: the blocks stay the same in number, and the right tokens stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import USES_V2_RUNNER
from tests.engine.dense_decode import (
    BLOCK,
    Budget,
    LayerNow,
    Score,
    check_kept,
    h2o,
    run_and_watch,
    streaming_llm,
    tova,
)
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel

BUDGET = 128
NUM_BLOCKS = BUDGET // BLOCK
NUM_ANSWERED = 170


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, budget=BUDGET, fields={"during_decode": True}) as started:
        started.poison_unowned_memory()
        yield started


LENGTHS = (40, 128, 129, 500)
# the length that each has in the first tier: together they have all of them and both allocators
POLICIES = {
    "snapkv": 40,
    "lava": 129,
    "tova": 128,
    "h2o": 500,
    "streaming_llm": 500,
    "knorm": 128,
    "keydiff": 129,
    "curdkv": 40,
    "criticalkv": 128,
    "morphkv": 129,
}
IN_V2_S_FIRST_TIER = ("snapkv", "lava", "tova", "h2o", "morphkv")


def lengths_and_policies() -> Iterator[Any]:
    others = pytest.mark.more("each policy with the other lengths and allocators")
    on_v1 = pytest.mark.more_on_v2("on V1 every policy; on V2 one of each kind")
    for index, (policy, first) in enumerate(POLICIES.items()):
        for place, length in enumerate(LENGTHS):
            allocator = ("uniform", "lava")[(index + place) % 2]
            if length == first:
                marks = () if policy in IN_V2_S_FIRST_TIER else on_v1
                yield pytest.param(length, policy, allocator, marks=marks)
            elif not USES_V2_RUNNER:
                yield pytest.param(length, policy, allocator, marks=others)


@pytest.mark.parametrize(("length", "policy", "allocator"), list(lengths_and_policies()))
def test_a_request_holds_its_budget_and_no_more(running: Engine, policy: str, allocator: str, length: int) -> None:
    options = {"kv_eviction": policy, "kv_budget_allocator": allocator}
    answer, held, kept = run_and_watch(
        running, random_prompt(length, seed=length), max_tokens=NUM_ANSWERED, extra_args=options
    )
    assert len(answer) == NUM_ANSWERED
    assert max(held[3:]) == NUM_BLOCKS or length == 40
    first = next(step for step, blocks in enumerate(held) if step > 2 and blocks == NUM_BLOCKS)
    # a late first eviction may need fresh blocks beside the old ones, for the steps until it is seen to be done
    late = held.index(max(held)) if max(held) > NUM_BLOCKS else first
    assert set(held[max(first, late) + 3 :]) == {NUM_BLOCKS}
    total = length + NUM_ANSWERED - 1
    assert len(kept) >= total // BLOCK - max(length // BLOCK, NUM_BLOCKS) - 1
    for num_tokens, layers in kept.items():
        counts = [len(head) for layer in layers for head in layer]
        assert sum(counts) == ((NUM_BLOCKS - 1) * BLOCK + num_tokens % BLOCK) * len(counts)
        for head in (head for layer in layers for head in layer):
            assert len(set(head)) == len(head)
            assert not head or (head[0] >= 0 and head[-1] < num_tokens)
    running.check_all_free()


def snapkv(now: LayerNow) -> torch.Tensor:
    """Neighbours are those that are left."""
    attention = now.attention_now(32).mean(dim=(1, 2))
    scores = torch.zeros_like(attention)
    for head, resident in enumerate(now.resident):
        older = resident.nonzero()[:-32, 0]
        pooled = torch.nn.functional.max_pool1d(attention[head, older][None], 7, stride=1, padding=3)
        scores[head, older] = pooled[0]
    return scores


def policy_cases() -> Iterator[Any]:
    yield pytest.param("tova", tova, 0, 1, id="tova", marks=pytest.mark.more_on_v2("on V1 the same policy is compared"))
    yield pytest.param("h2o", h2o, 0, 32, id="h2o", marks=pytest.mark.more_on_v2("on V1 the same policy is compared"))
    yield pytest.param(
        "streaming_llm",
        streaming_llm,
        4,
        0,
        id="streaming_llm",
        marks=pytest.mark.more_on_v2("on V1 the same policy is compared"),
    )
    yield pytest.param("snapkv", snapkv, 0, 32, id="snapkv", marks=pytest.mark.smoke)


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> DenseModel:
    return DenseModel(tiny_llama)


@pytest.mark.parametrize(
    "length",
    [203] if USES_V2_RUNNER else [40, 203, pytest.param(128, marks=pytest.mark.more("a prompt that fills the budget"))],
)
@pytest.mark.parametrize(("policy", "score", "num_sink", "num_recent"), list(policy_cases()))
def test_tokens_kept_and_answers_are_those_of_a_dense_model(
    running: Engine,
    dense: DenseModel,
    policy: str,
    score: Score,
    num_sink: int,
    num_recent: int,
    length: int,
) -> None:
    prompt = random_prompt(length, seed=length)
    answer, _, kept = run_and_watch(running, prompt, max_tokens=300, extra_args={"kv_eviction": policy})
    budget = Budget(NUM_BLOCKS, num_sink, num_recent)
    num_swaps, logits = check_kept(dense, [*prompt, *answer], kept, score, budget)
    assert num_swaps <= (1 if policy != "snapkv" else 200)  # its neighbours share their scores
    assert logits[length - 1 : -1].argmax(-1).tolist() == answer
    expected = range(max(length, BUDGET) // BLOCK * BLOCK + BLOCK, length + 300, BLOCK)
    assert sorted(kept) == [max(length, BUDGET), *expected]


def test_the_last_tokens_stay(running: Engine) -> None:
    options = {"kv_eviction": "streaming_llm"}
    _, _, kept = run_and_watch(running, random_prompt(200, seed=1), max_tokens=200, extra_args=options)
    for num_tokens, layers in kept.items():
        size = (NUM_BLOCKS - 1) * BLOCK + num_tokens % BLOCK
        expected = [*range(4), *range(num_tokens - size + 4, num_tokens)]
        assert all(head == expected for layer in layers for head in layer)


@pytest.mark.parametrize("when", [BLOCK, BLOCK + 5])
def test_a_request_that_must_start_again_is_evicted_anew(running: Engine, when: int) -> None:
    """At a length that is a multiple of the block size, where it would have been due if it had gone on."""
    prompt = random_prompt(300, seed=7)
    running.add(prompt, max_tokens=120)
    while not any(
        request.num_computed_tokens >= 300 + when - 300 % BLOCK for request in running.scheduler.requests.values()
    ):
        running.step()
    before = running.num_evictions
    assert running.llm.reset_prefix_cache(reset_running_requests=True)
    (output,) = running.run().values()
    assert len(output.outputs[0].token_ids) == 120
    assert running.num_evictions == before + 1
    running.check_all_free()
