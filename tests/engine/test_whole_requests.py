"""Budget at or above the prompt, or eviction off: the output is byte for byte that of stock vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.harness import engine
from tests.tiny_llama import random_prompt

PROMPTS = [random_prompt(17 + 13 * index, seed=index) for index in range(32)]
LONGEST = max(map(len, PROMPTS))


@pytest.mark.smoke
def test_budget_above_the_prompt_is_stock_vllm(tiny_llama: Path) -> None:
    with engine(tiny_llama, policy=None) as stock:
        expected = stock.tokens(PROMPTS, max_tokens=32)
    with engine(tiny_llama, budget=LONGEST) as running:
        assert running.tokens(PROMPTS, max_tokens=32) == expected
        assert not running.num_evictions
        # the same engine, told by the request not to evict
        options = {"kv_eviction": "none", "kv_budget": 96}
        assert running.tokens(PROMPTS, max_tokens=32, extra_args=options) == expected
        assert not running.num_evictions
        running.check_all_free()


def test_an_engine_without_eviction_after_one_with_it_is_stock(tiny_llama: Path) -> None:
    with engine(tiny_llama, budget=96) as running:
        running.tokens([random_prompt(300, seed=1)])
    with engine(tiny_llama, policy=None) as stock:
        assert stock.bridge is None
        assert type(stock.scheduler).__module__.startswith("vllm.v1")
        backends = {group.backend.__module__ for groups in stock.worker.model_runner.attn_groups for group in groups}
        assert backends == {"vllm.v1.attention.backends.cpu_attn"}
