"""A policy that waits for the first tokens of the answer: no pass more, and kept is what those tokens attend to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.dense_decode import Budget, LayerNow, check_kept
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel
from vllm_kvevict.eviction.record import recorded_evictions

BLOCK, BUDGET, LOOKAHEAD = 32, 128, 8


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, "laq_deferred", BUDGET) as started:
        started.poison_unowned_memory()
        yield started


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> DenseModel:
    return DenseModel(tiny_llama)


def lookahead(now: LayerNow) -> torch.Tensor:
    """The answer's queries over the prompt's keys, mean over the group, the best of seven neighbours."""
    num_keys = now.num_tokens - LOOKAHEAD
    attention = now.logits[:, :, -LOOKAHEAD:, :num_keys].softmax(-1).sum(dim=2).mean(dim=1)
    pooled = torch.nn.functional.max_pool1d(attention, 7, stride=1, padding=3)
    return torch.nn.functional.pad(pooled, (0, LOOKAHEAD))


ON_V1 = pytest.mark.more_on_v2("on V1 the same lengths are compared")


@pytest.mark.parametrize("length", [pytest.param(125, marks=ON_V1), 200, pytest.param(535, marks=ON_V1), 536])
def test_kept_is_what_the_answer_attends_to(running: Engine, dense: DenseModel, length: int) -> None:
    prompt = random_prompt(length, seed=length)
    with recorded_evictions() as records:
        (answer,) = running.tokens([prompt], max_tokens=60)
    (record,) = records
    now = length + LOOKAHEAD
    assert record.plan.num_tokens == now
    kept = {now: [[head.nonzero()[:, 0].tolist() for head in layer] for layer in record.kept]}
    target = record.plan.num_kept_tokens
    assert BUDGET - BLOCK < target <= BUDGET
    # what a head holds when its last block is full is all that the budget allows: one block more than in decode
    budget = Budget(BUDGET // BLOCK + (now % BLOCK == 0), num_sink=0, num_recent=LOOKAHEAD)
    _, logits = check_kept(dense, [*prompt, *answer], kept, lookahead, budget)
    assert logits[length - 1 : -1].argmax(-1).tolist() == answer
    running.check_all_free()


def test_it_adds_no_pass_and_costs_its_memory_for_a_few_steps_only(running: Engine) -> None:
    prompt = random_prompt(600, seed=1)
    steps = {}
    for policy in ("none", "snapkv", "laq_deferred"):
        running.add(prompt, max_tokens=40, extra_args={"kv_eviction": policy})
        held = []
        while running.llm.llm_engine.has_unfinished_requests():
            running.step()
            held += [len(running.blocks_held(request_id)) for request_id in running.scheduler.requests]
        steps[policy] = held
    assert len(steps["none"]) == len(steps["snapkv"]) == len(steps["laq_deferred"])
    whole = -(-600 // BLOCK)
    assert max(steps["snapkv"][4:]) <= BUDGET // BLOCK + 2
    assert all(blocks >= whole for blocks in steps["laq_deferred"][:LOOKAHEAD])
    assert max(steps["laq_deferred"][LOOKAHEAD + 4 :]) <= BUDGET // BLOCK + 2
    running.check_all_free()


@pytest.mark.parametrize("max_tokens", [1, 7, 8, 9])
def test_an_answer_that_ends_before_is_not_evicted(running: Engine, max_tokens: int) -> None:
    before = running.num_evictions
    (answer,) = running.tokens([random_prompt(400, seed=9)], max_tokens=max_tokens)
    assert len(answer) == max_tokens
    # the token that was sampled last is never computed
    assert running.num_evictions - before == (max_tokens > LOOKAHEAD)
    running.check_all_free()


def test_requests_that_wait_and_others_in_one_batch_are_as_alone(running: Engine) -> None:
    cases = [
        (random_prompt(90 + 70 * index, seed=index), {"kv_eviction": policy, "kv_evict_during_decode": bounded})
        for index, (policy, bounded) in enumerate(
            [("laq_deferred", 0), ("laq_deferred", 1), ("snapkv", 0), ("laq_deferred", 0), ("h2o", 1), ("none", 0)]
        )
    ]
    running.check_as_alone(cases, max_tokens=150)
