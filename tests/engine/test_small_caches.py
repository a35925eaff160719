"""Caches that no prompt of the longest kind fits into, and prompts for which nothing of this matters."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.exceptions import VLLMValidationError

from tests.engine.dense_decode import BLOCK
from tests.engine.harness import engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.eviction.record import recorded_evictions

BUDGET, CHUNK = 128, 100
ON, OFF = {"kv_evict_during_prefill": 1}, {"kv_evict_during_prefill": 0}


@pytest.mark.feature("prompts that do not fit into the KV cache")
def test_a_prompt_is_served_that_does_not_fit_into_the_cache(tiny_llama: Path) -> None:
    """2,000 tokens in a cache of 576: without eviction between chunks such an engine does not even start."""
    bytes_per_block = 2 * 2 * BLOCK * 64 * 4  # layers, KV heads, K and V of 32 elements in float32
    settings = {"max_num_batched_tokens": CHUNK, "kv_cache_memory_bytes": 18 * bytes_per_block}
    with pytest.raises(ValueError, match="KV cache"), engine(tiny_llama, budget=BUDGET, **settings):
        pass
    fields = {"during_prefill": True, "during_decode": True}
    with engine(tiny_llama, budget=BUDGET, fields=fields, **settings) as running:
        running.poison_unowned_memory()
        ids = [running.add(random_prompt(2000 - 40 * index, seed=index), max_tokens=40) for index in range(5)]
        outputs = running.run()
        assert all(len(outputs[request_id].outputs[0].token_ids) == 40 for request_id in ids)
        running.check_all_free()
        with pytest.raises(VLLMValidationError, match="during_prefill: a prompt of 700 tokens needs 22 blocks"):
            running.add(random_prompt(700, seed=1), extra_args=OFF)
        with pytest.raises(VLLMValidationError, match="kv_budget: a prompt of 700 tokens needs 20 blocks"):
            running.add(random_prompt(700, seed=1), extra_args={"kv_budget": 512})
        assert len(running.tokens([random_prompt(400, seed=1)], extra_args={"kv_eviction": "none"})[0]) == 16
        # 17 blocks of 32 tokens, and the last token of an answer is never computed
        settings = {"max_tokens": 1000, "extra_args": {"kv_eviction": "none"}}
        (cut_short,) = running.generate([random_prompt(300, seed=2)], **settings)
        assert cut_short.outputs[0].finish_reason == "length"
        assert len(cut_short.outputs[0].token_ids) == 17 * BLOCK - 300 + 1
        assert running.scheduler._num_cut_short == 1
        running.check_all_free()


@pytest.mark.more_on_v2("on V1 prompts of one chunk are compared")
def test_a_prompt_of_one_chunk_is_evicted_as_without(tiny_llama: Path) -> None:
    with engine(tiny_llama, budget=BUDGET) as running, recorded_evictions() as records:
        for length in (129, 320, 333, 1000):
            prompt = random_prompt(length, seed=length)
            on, off = (running.tokens([prompt], max_tokens=50, extra_args=options)[0] for options in (ON, OFF))
            assert on == off
        for on, off in zip(records[::2], records[1::2], strict=True):
            assert on.plan == off.plan
            assert on.kept.equal(off.kept)
        running.check_all_free()
