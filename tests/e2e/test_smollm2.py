"""A real model, in the test's process: blocks come back, the answer stays, a whole cache is stock vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.prompts import chat_tokens, long_text
from tests.engine.harness import Engine, engine

# float32: faster on CPUs without bfloat16 instructions
SETTINGS = {
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 30,
}
PROMPTS = [long_text(2 + 4 * index, fact_at=index / 8) for index in range(8)]


@pytest.fixture(scope="module")
def stock_answers(smollm2: Path) -> list[list[int]]:
    with engine(smollm2, None, **SETTINGS) as stock:
        return stock.tokens([chat_tokens(smollm2, prompt) for prompt in PROMPTS], max_tokens=24)


@pytest.fixture(scope="module")
def running(smollm2: Path, stock_answers: list[list[int]]) -> Iterator[Engine]:
    with engine(smollm2, budget=256, **SETTINGS) as started:
        yield started


def test_budget_above_the_prompt_is_byte_identical_to_stock(
    smollm2: Path, stock_answers: list[list[int]], running: Engine
) -> None:
    prompts = [chat_tokens(smollm2, prompt) for prompt in PROMPTS]
    assert running.tokens(prompts, max_tokens=24, extra_args={"kv_budget": 1024}) == stock_answers
    assert not running.num_evictions


def held_while_prefilled_and_after(running: Engine, prompt: list[int], **options: Any) -> tuple[int, int]:
    """Return the blocks that a prompt takes in the step that evicts it, and one step later."""
    free = running.num_free_blocks
    running.add(prompt, max_tokens=6, skip_reading_prefix_cache=True, extra_args=options)
    running.step()
    most = free - running.num_free_blocks
    running.step()
    return most, free - running.num_free_blocks


@pytest.mark.parametrize(
    "budget",
    [
        256,
        pytest.param(128, marks=pytest.mark.more("other budgets of a real model give back what 256 tokens do")),
        pytest.param(512, marks=pytest.mark.more("other budgets of a real model give back what 256 tokens do")),
    ],
)
def test_nine_tenths_of_the_blocks_return_however_ragged_budgets_are(
    smollm2: Path, running: Engine, kept_masks: list[torch.Tensor], budget: int
) -> None:
    """Of 2,700 tokens, in the step after the prefill."""
    prompt = chat_tokens(smollm2, long_text(165))[3:]  # the last block is partly filled: decode needs no new one
    prompt_blocks, kept = -(-len(prompt) // 32), budget // 32
    assert 2600 < len(prompt) < 3000
    for policy, allocator in (("lava", "lava"), ("snapkv", "uniform")):
        options = {"kv_eviction": policy, "kv_budget_allocator": allocator, "kv_budget": budget}
        held = held_while_prefilled_and_after(running, prompt, **options)
        assert held == (prompt_blocks + kept - 1, kept)
        usage = running.scheduler.get_kv_cache_usage()
        assert usage == pytest.approx(kept / (running.block_pool.num_gpu_blocks - 1))
        assert budget > 256 or kept <= 0.1 * prompt_blocks
        running.run()
        running.check_all_free()
    ragged = kept_masks[0].sum(-1)
    assert ragged.max() > 4 * ragged.min()


@pytest.mark.parametrize("chunk", [256, pytest.param(2048, marks=pytest.mark.more("the same in one chunk"))])
def test_the_fact_survives_a_quarter_of_the_cache(smollm2: Path, running: Engine, chunk: int) -> None:
    from transformers import AutoTokenizer

    prompt, before = chat_tokens(smollm2, long_text(60)), running.num_evictions
    settings = {"skip_reading_prefix_cache": True, "extra_args": {"kv_budget": 0.25}}
    with running.in_chunks(chunk):
        (tokens,) = running.tokens([prompt], max_tokens=24, **settings)
    assert running.num_evictions == before + 1
    assert "47" in AutoTokenizer.from_pretrained(smollm2).decode(tokens)


@pytest.mark.more("a real model: engine/test_small_caches.py shows the same with a tiny one")
@pytest.mark.feature("prompts that do not fit into the KV cache")
def test_eight_thousand_tokens_are_served_in_the_memory_of_three_thousand(smollm2: Path) -> None:
    prompt, budget, chunk = chat_tokens(smollm2, long_text(500)), 512, 512
    bytes_per_block = 30 * 3 * 2 * 32 * 64 * 4  # layers, KV heads, K and V of 64 elements
    settings = {**SETTINGS, "kv_cache_memory_bytes": 3000 // 32 * bytes_per_block, "max_num_batched_tokens": chunk}
    with engine(smollm2, budget=budget, fields={"during_prefill": True, "during_decode": True}, **settings) as running:
        assert 7900 < len(prompt) < 8192 - 40 and running.num_free_blocks * 32 < 3000
        # at its first eviction: a hit in the prefix cache, a chunk, and as many fresh blocks as are kept
        bound = 2 * (budget // 32 - 1) + chunk // 32 + 1
        running.add(prompt, max_tokens=40)
        while running.scheduler.waiting or running.scheduler.running:
            free = running.num_free_blocks
            outputs = running.step()
            assert running.block_pool.num_gpu_blocks - 1 - free <= bound
        assert len(outputs[0].outputs[0].token_ids) == 40
        running.check_all_free()
