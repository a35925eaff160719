"""Blocks come back, batches mix freely, chunks do not matter, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt

pytestmark = pytest.mark.on_v1

BUDGET, BLOCK = 96, 32


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, budget=BUDGET, enable_prefix_caching=False) as started:
        started.poison_unowned_memory()
        yield started


def test_blocks_return_within_three_decode_steps(running: Engine) -> None:
    before = running.num_free_blocks
    running.add(random_prompt(1000, seed=1), max_tokens=20)
    running.step()
    assert before - running.num_free_blocks == 32
    for _ in range(3):
        running.step()
    # three kept blocks, of which the last has room for decode
    assert before - running.num_free_blocks == BUDGET // BLOCK
    running.run()
    running.check_all_free()


@pytest.mark.parametrize("length", [97, 128, 161] if USES_V2_RUNNER else [96, 97, 98, 127, 128, 129, 159, 160, 161])
def test_lengths_around_block_boundaries(running: Engine, length: int) -> None:
    prompt = random_prompt(length, seed=length)
    evictions = running.num_evictions
    (tokens,) = running.tokens([prompt], max_tokens=70)
    assert len(tokens) == 70
    assert running.num_evictions - evictions == (length > BUDGET)
    running.check_all_free()


def test_alone_and_in_a_batch_are_the_same(running: Engine) -> None:
    prompts = [random_prompt(length, seed=length) for length in (40, 333, 700, 98, 1200, 500)]
    options = [None, None, {"kv_eviction": "none"}, None, {"kv_budget": 200}, {"kv_budget": 0.5}]
    alone = [
        running.tokens([prompt], max_tokens=40, extra_args=extra)[0]
        for prompt, extra in zip(prompts, options, strict=True)
    ]
    ids = [running.add(prompt, max_tokens=40, extra_args=extra) for prompt, extra in zip(prompts, options, strict=True)]
    outputs = running.run()
    assert [list(outputs[request_id].outputs[0].token_ids) for request_id in ids] == alone
    running.check_all_free()


@pytest.mark.feature("chunked prefill")
def test_requests_that_join_later_change_nothing(running: Engine) -> None:
    first, second = random_prompt(600, seed=3), random_prompt(450, seed=4)
    expected = [running.tokens([prompt], max_tokens=50)[0] for prompt in (first, second)]
    ids = [running.add(first, max_tokens=50)]
    for _ in range(10):
        running.step()
    ids.append(running.add(second, max_tokens=50))
    outputs = running.run()
    assert [list(outputs[request_id].outputs[0].token_ids) for request_id in ids] == expected


@pytest.mark.feature("aborted requests")
def test_aborted_requests_leave_no_page_behind(running: Engine) -> None:
    for after in (1, 2, 3, 30):
        victim = running.add(random_prompt(900, seed=after), max_tokens=100)
        witness = running.add(random_prompt(400, seed=9), max_tokens=40)
        for _ in range(after):
            running.step()
        running.llm.llm_engine.abort_request([victim])
        assert witness in running.run()
        running.check_all_free()
    running.tokens([random_prompt(40, seed=1)], max_tokens=2)  # the worker hears of the last one's end
    assert len(running.bridge.page_table) == 0


def test_an_answer_that_nothing_reads_is_not_evicted(running: Engine) -> None:
    before = running.num_evictions
    prompt = random_prompt(300, seed=5)
    assert len(running.tokens([prompt], max_tokens=1)[0]) == 1
    assert running.num_evictions == before
    assert len(running.tokens([prompt], max_tokens=2)[0]) == 2
    assert running.num_evictions == before + 1
    running.check_all_free()


def test_streaming_input_sessions_are_kept_whole(running: Engine) -> None:
    """More of their prompt is to come, in chunks that an evicted row could not take."""
    prompt = random_prompt(300, seed=5)
    running.add(prompt, max_tokens=4)
    (request,) = running.scheduler.requests.values()
    assert running.scheduler._life(request) is not None
    request.resumable = True
    assert running.scheduler._life(request) is None
    request.resumable = False
    running.run()
