"""Budget at or above the prompt, or eviction off: the output is byte for byte that of stock vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import engine
from tests.tiny_llama import random_prompt

# more than run at once, and as few as that in Triton's interpreter
PROMPTS = [random_prompt(17 + 13 * index, seed=index) for index in range(20 if USES_V2_RUNNER else 32)]
LONGEST = max(map(len, PROMPTS))


@pytest.mark.smoke
def test_budget_above_the_prompt_is_stock_vllm(tiny_llama: Path) -> None:
    with engine(tiny_llama, budget=LONGEST) as running:
        whole = running.tokens(PROMPTS, max_tokens=32)
        assert not running.num_evictions
        # the same engine, told by the request not to evict
        options = {"kv_eviction": "none", "kv_budget": 96}
        assert running.tokens(PROMPTS, max_tokens=32, extra_args=options) == whole
        assert not running.num_evictions
        running.check_all_free()
        running.tokens(PROMPTS[-1:], extra_args={"kv_budget": 96})
        assert running.num_evictions
    # an engine without eviction, after one with it
    with engine(tiny_llama, policy=None) as stock:
        assert stock.tokens(PROMPTS, max_tokens=32) == whole
        assert stock.bridge is None
        assert type(stock.scheduler).__module__.startswith("vllm.v1")
        backends = {group.backend.__module__ for groups in stock.worker.model_runner.attn_groups for group in groups}
        assert backends == {"vllm.v1.attention.backends.cpu_attn"}
