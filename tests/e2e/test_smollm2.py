"""A real model, in the test's process: blocks come back, the answer stays, a whole cache is stock vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.prompts import chat_tokens, long_text
from tests.engine.harness import engine
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.spec import bounded_blocks

# float32: faster on CPUs without bfloat16 instructions
SETTINGS = {"max_model_len": 8192, "dtype": "float32", "kv_cache_memory_bytes": 1 << 30}


def test_ninety_percent_of_the_blocks_return_within_three_decode_steps(smollm2: Path) -> None:
    prompt = chat_tokens(smollm2, long_text(250))
    with engine(smollm2, budget=256, max_num_batched_tokens=8192, **SETTINGS) as running:
        free = running.num_free_blocks
        running.add(prompt, max_tokens=20)
        running.step()
        prompt_blocks = -(-len(prompt) // 32)
        fresh_blocks = 256 // 32 - (len(prompt) % 32 > 0)
        assert 3900 < len(prompt) < 4400 and free - running.num_free_blocks == prompt_blocks + fresh_blocks
        usage = running.scheduler.get_kv_cache_usage()
        for _ in range(3):
            running.step()
        returned = prompt_blocks - (free - running.num_free_blocks)
        assert returned >= 0.9 * prompt_blocks
        assert running.scheduler.get_kv_cache_usage() <= 0.1 * usage
        running.run()
        running.check_all_free()


@pytest.mark.parametrize("budget", [128, 256, 512])
def test_ragged_budgets_give_back_what_uniform_ones_do(
    smollm2: Path, kept_masks: list[torch.Tensor], budget: int
) -> None:
    prompt = chat_tokens(smollm2, long_text(250))[3:]  # the last block is partly filled: decode needs no new one
    held = {}
    with engine(smollm2, "lava", budget=budget, max_num_batched_tokens=8192, **SETTINGS) as running:
        for policy, allocator in (("lava", "lava"), ("snapkv", "uniform")):
            running.scheduler._eviction_config = EvictionConfig(policy=policy, budget=budget, allocator=allocator)
            free = running.num_free_blocks
            running.add(prompt, max_tokens=6, skip_reading_prefix_cache=True)
            running.step()
            most = free - running.num_free_blocks
            running.step()
            held[allocator] = (most, free - running.num_free_blocks)
            running.run()
            running.check_all_free()
    kept = budget // 32
    assert held["lava"] == held["uniform"] == (-(-len(prompt) // 32) + kept - 1, kept)
    ragged = kept_masks[0].sum(-1)
    assert ragged.max() > 4 * ragged.min()


@pytest.mark.parametrize("chunk", [2048, 256])
def test_the_fact_survives_a_quarter_of_the_cache(smollm2: Path, chunk: int) -> None:
    from transformers import AutoTokenizer

    prompt = chat_tokens(smollm2, long_text(60))
    with engine(smollm2, budget=0.25, max_num_batched_tokens=chunk, **SETTINGS) as running:
        (tokens,) = running.tokens([prompt], max_tokens=24)
        assert running.num_evictions == 1
    assert "47" in AutoTokenizer.from_pretrained(smollm2).decode(tokens)


@pytest.mark.feature("prompts that do not fit into the KV cache")
def test_eight_thousand_tokens_are_served_in_the_memory_of_three_thousand(smollm2: Path) -> None:
    prompt, budget, chunk = chat_tokens(smollm2, long_text(500)), 512, 512
    bytes_per_block = 30 * 3 * 2 * 32 * 64 * 4  # layers, KV heads, K and V of 64 elements
    settings = {**SETTINGS, "kv_cache_memory_bytes": 3000 // 32 * bytes_per_block, "max_num_batched_tokens": chunk}
    with engine(smollm2, budget=budget, fields={"during_prefill": True, "during_decode": True}, **settings) as running:
        assert 7900 < len(prompt) < 8192 - 40 and running.num_free_blocks * 32 < 3000
        bound = bounded_blocks(budget // 32 - 1, chunk // 32 + 1)
        running.add(prompt, max_tokens=40)
        while running.scheduler.waiting or running.scheduler.running:
            free = running.num_free_blocks
            outputs = running.step()
            assert running.block_pool.num_gpu_blocks - 1 - free <= bound
        assert len(outputs[0].outputs[0].token_ids) == 40
        running.check_all_free()


def test_budget_above_the_prompt_is_byte_identical_to_stock(smollm2: Path) -> None:
    prompts = [chat_tokens(smollm2, long_text(2 + index, fact_at=index / 32)) for index in range(32)]
    answers = []
    for policy in (None, "snapkv"):
        with engine(smollm2, policy, budget=1024, max_num_seqs=32, **SETTINGS) as running:
            answers.append(running.tokens(prompts, max_tokens=24))
            assert not running.num_evictions
    assert answers[0] == answers[1]
