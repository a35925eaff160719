"""The simulated engine notices what it is there for: faults that are planted into scheduler, pool and messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.simulated import Setting, SimulatedEngine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.messages import STEP
from vllm_kvevict.engine.scheduler.managers import EvictionManager

pytestmark = pytest.mark.more_on_v2("messages of both runners look alike in a simulated engine")

SETTING = Setting(80, {"policy": "snapkv", "budget": 96, "during_decode": True}, max_num_batched_tokens=100)


def decoding(model: Path) -> SimulatedEngine:
    """Return an engine in which two requests decode, one that was evicted and a whole one."""
    engine = SimulatedEngine(model, SETTING)
    engine.add(random_prompt(333, seed=1), "evicted", max_tokens=100)
    engine.add(random_prompt(200, seed=2), "whole", max_tokens=100, extra_args={"kv_eviction": "none"})
    engine.run(12)
    assert all(answer.tokens and answer.finish_reason is None for answer in engine.answers.values())
    return engine


def kept_block(engine: SimulatedEngine) -> Any:
    return engine.block_pool.blocks[engine.worker.rows["evicted"].kept[0]]


def whole_block(engine: SimulatedEngine) -> Any:
    return engine.block_pool.blocks[engine.worker.rows["whole"].tables[0][0]]


def lose_a_block(engine: SimulatedEngine) -> None:
    engine.block_pool.get_new_blocks(1)


def free_the_null_block(engine: SimulatedEngine) -> None:
    engine.block_pool.free_block_queue.append(engine.block_pool.null_block)


def free_a_kept_block(engine: SimulatedEngine) -> None:
    engine.block_pool.free_blocks([kept_block(engine)])


def share_a_kept_block(engine: SimulatedEngine) -> None:
    engine.block_pool.touch([kept_block(engine)])


def cache_a_kept_block(engine: SimulatedEngine) -> None:
    kept_block(engine)._block_hash = whole_block(engine).block_hash


def write_to_a_kept_block(engine: SimulatedEngine) -> None:
    engine.worker.memory[kept_block(engine).block_id, 3] += 1


def write_to_a_whole_block(engine: SimulatedEngine) -> None:
    engine.worker.memory[whole_block(engine).block_id, 3] += 1


@pytest.mark.parametrize(
    ("plant", "noticed"),
    [
        (lose_a_block, "counted"),
        (free_the_null_block, "the null block is free"),
        (free_a_kept_block, "which nobody holds"),
        (share_a_kept_block, "is not private"),
        (cache_a_kept_block, "is not private"),
        (write_to_a_kept_block, "kept blocks were written by others"),
        (write_to_a_whole_block, "holds what others, or other times, have written"),
    ],
)
def test_a_pool_in_disorder_is_noticed(
    tiny_llama: Path, plant: Callable[[SimulatedEngine], None], noticed: str
) -> None:
    engine = decoding(tiny_llama)
    plant(engine)
    with pytest.raises(AssertionError, match=noticed):
        engine.advance()


def announce_nothing(step: Any, engine: SimulatedEngine) -> None:
    step.prefilling.clear()


def end_a_token_later(step: Any, engine: SimulatedEngine) -> None:
    for req_id, end in step.ending.items():
        step.ending[req_id] = replace(end, plan=replace(end.plan, num_tokens=end.plan.num_tokens + 1))


def evict_into_another(step: Any, engine: SimulatedEngine) -> None:
    others = engine.worker.rows["whole"].tables[0] if "whole" in engine.worker.rows else []
    for req_id, end in step.ending.items():
        step.ending[req_id] = replace(end, fresh_block_ids=others[: len(end.fresh_block_ids)])


def evict_in_place(step: Any, engine: SimulatedEngine) -> None:
    """These blocks are in the prefix cache."""
    for req_id, end in step.ending.items():
        step.ending[req_id] = replace(end, fresh_block_ids=None)


def keep_the_answer(step: Any, engine: SimulatedEngine) -> None:
    step.shrinking.clear()


@pytest.mark.parametrize(
    ("plant", "noticed"),
    [
        (announce_nothing, "a chunk of its prompt was not announced"),
        (end_a_token_later, "the scheduler evicts it at 334 tokens, it has 333"),
        (evict_into_another, "of the prefix cache"),
        (evict_in_place, "of the prefix cache"),
        (keep_the_answer, "holds what others, or other times, have written"),
    ],
)
def test_a_wrong_decision_is_noticed(
    tiny_llama: Path, plant: Callable[[Any, SimulatedEngine], None], noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SimulatedEngine(tiny_llama, SETTING)
    schedule = engine.scheduler.schedule

    def wrong(*args: Any) -> Any:
        output = schedule(*args)
        plant(getattr(output, STEP), engine)
        return output

    monkeypatch.setattr(engine.scheduler, "schedule", wrong)
    engine.add(random_prompt(200, seed=2), "whole", max_tokens=100, extra_args={"kv_eviction": "none"})
    engine.add(random_prompt(333, seed=1), "evicted", max_tokens=100)
    with pytest.raises(AssertionError, match=noticed):
        engine.run(200)


def test_blocks_that_are_back_too_early_are_noticed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that evicts is still in flight, and reads them."""
    remove = EvictionManager.remove_skipped_blocks

    def too_early(self: Any, request_id: str, processed: int, num_prompt_tokens: int | None = None) -> None:
        remove(self, request_id, processed + 1000, num_prompt_tokens)

    monkeypatch.setattr(EvictionManager, "remove_skipped_blocks", too_early)
    engine = SimulatedEngine(tiny_llama, replace(SETTING, async_scheduling=True))
    engine.add(random_prompt(333, seed=1), max_tokens=100)
    with pytest.raises(AssertionError, match="which nobody holds"):
        engine.run(200)


def test_a_table_that_is_not_sent_is_noticed(tiny_llama: Path) -> None:
    engine = SimulatedEngine(tiny_llama, SETTING)
    engine.add(random_prompt(150, seed=1), max_tokens=100, extra_args={"kv_eviction": "none"})
    engine.run(3)
    engine.worker.rows["request-0"].tables[0][-1] = 79
    with pytest.raises(AssertionError, match="the scheduler has other blocks"):
        engine.advance()


def test_a_text_that_is_not_shared_is_noticed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts that differ, whose blocks are taken for the same."""
    engine = SimulatedEngine(tiny_llama, SETTING)
    engine.add(random_prompt(150, seed=1), "first", max_tokens=2)
    engine.run(10)
    monkeypatch.setattr(engine, "request_block_hasher", lambda request: hashes if not request.block_hashes else [])
    hashes = [block.block_hash[:-4] for block in engine.block_pool.blocks if block.block_hash is not None]
    engine.add(random_prompt(150, seed=2), "second", max_tokens=2)
    with pytest.raises(AssertionError, match="what others, or other times, have written"):
        engine.run(10)
