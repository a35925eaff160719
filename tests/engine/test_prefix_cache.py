"""Prefix caching stays on: every full block of a prompt can be hit, kept and decode blocks never are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt

BUDGET, BLOCK = 96, 32
KEPT = BUDGET // BLOCK
WINDOW = 32  # the queries that SnapKV looks at are computed in any case
COLD = {"skip_reading_prefix_cache": True}


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, budget=BUDGET) as started:
        started.poison_unowned_memory()
        yield started


def cached_tokens(running: Engine, prompt: list[int], **params: object) -> tuple[int, list[int]]:
    (output,) = running.generate([prompt], max_tokens=24, **params)
    return output.num_cached_tokens, list(output.outputs[0].token_ids)


@pytest.mark.feature("prefix caching")
@pytest.mark.parametrize("length", [700, 704, 705])
def test_a_repeated_prompt_hits_all_but_the_observation_window(running: Engine, length: int) -> None:
    prompt = random_prompt(length, seed=1)
    first_hit, cold = cached_tokens(running, prompt)
    second_hit, warm = cached_tokens(running, prompt)
    assert first_hit == (0 if length == 700 else 21 * BLOCK)
    assert second_hit == (length - WINDOW) // BLOCK * BLOCK
    assert warm == cold


def test_a_longer_prompt_hits_the_shared_prefix_and_equals_a_cold_run(running: Engine) -> None:
    shared, tail = random_prompt(500, seed=2), random_prompt(300, seed=3)
    cached_tokens(running, shared)
    hit, warm = cached_tokens(running, shared + tail)
    assert hit == 500 // BLOCK * BLOCK
    assert cached_tokens(running, shared + tail, **COLD)[1] == warm


def test_whole_and_evicted_requests_share_only_untouched_blocks(running: Engine) -> None:
    prompt = random_prompt(640, seed=4)
    whole = {"kv_eviction": "none"}
    _, evicted = cached_tokens(running, prompt)
    _, full = cached_tokens(running, prompt, extra_args=whole)
    assert cached_tokens(running, prompt, **COLD)[1] == evicted
    assert cached_tokens(running, prompt, extra_args=whole, **COLD)[1] == full
    hit, again = cached_tokens(running, prompt)
    assert (hit, again) == (19 * BLOCK, evicted)
    hit, again = cached_tokens(running, prompt, extra_args=whole)
    assert (hit, again) == (19 * BLOCK, full)


@pytest.mark.smoke
def test_both_at_once(running: Engine) -> None:
    """An evicted and a whole request run over the same prompt in one batch and keep out of each other's blocks."""
    prompt = random_prompt(640, seed=5)
    whole = {"kv_eviction": "none"}
    expected = [cached_tokens(running, prompt, extra_args=extra, **COLD)[1] for extra in (None, whole)]
    ids = [running.add(prompt, max_tokens=24, extra_args=extra) for extra in (None, whole, None)]
    outputs = running.run()
    answers = [list(outputs[request_id].outputs[0].token_ids) for request_id in ids]
    assert answers == [*expected, expected[0]]


def test_kept_and_decode_blocks_are_never_registered(running: Engine) -> None:
    running.add(random_prompt(700, seed=6), max_tokens=80)
    running.step()
    checked = 0
    while running.llm.llm_engine.has_unfinished_requests():
        running.step()
        for request in running.scheduler.running:
            blocks = running.scheduler.kv_cache_manager.get_blocks(request.request_id).blocks[0]
            private = [block for block in blocks if not block.is_null]
            assert KEPT <= len(private) <= KEPT + 3
            assert all(block.block_hash is None and block.ref_cnt == 1 for block in private)
            checked += 1
    assert checked >= 70
