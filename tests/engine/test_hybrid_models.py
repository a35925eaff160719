"""Models that mix full attention with sliding windows: the former is evicted, the latter untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.harness import engine
from tests.tiny_llama import VOCAB_SIZE, random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel

NUM_STEPS = 70  # more than the window, and into a third block


@pytest.mark.feature("models with sliding-window layers")
@pytest.mark.parametrize(
    ("allocator", "chunk"),
    [
        pytest.param("uniform", 2048, marks=pytest.mark.more_on_v2("on V1 prompts of one chunk are compared, too")),
        ("lava", 130),
    ],
)
def test_logits_equal_masked_dense_forward(
    tiny_gemma: Path, kept_masks: list[torch.Tensor], allocator: str, chunk: int
) -> None:
    prompt = random_prompt(500, seed=1)
    with engine(
        tiny_gemma,
        budget=128,
        fields={"allocator": allocator},
        max_num_batched_tokens=chunk,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
    ) as running:
        (output,) = running.generate([prompt], max_tokens=NUM_STEPS, logprobs=-1)
        held = running.scheduler.kv_cache_manager.block_pool.get_usage()
        running.check_all_free()
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    logits = torch.tensor([[step[token].logprob for token in range(VOCAB_SIZE)] for step in completion.logprobs])
    (kept,) = kept_masks
    assert kept.shape == (2, 2, 500) and held == 0
    dense = DenseModel(tiny_gemma)
    expected = dense.logits(prompt + tokens[:-1], kept)[499:]
    assert (logits - expected).abs().max() < 1e-3
    whole = dense.logits(prompt + tokens[:-1])[499:]
    assert (logits[0] - whole[0]).abs().max() < 1e-3
    assert (logits[1:] - whole[1:]).abs().max() > 0.1


@pytest.mark.feature("models with sliding-window layers")
def test_a_repeated_prompt_hits_all_but_the_observation_window(tiny_gemma: Path) -> None:
    prompt = random_prompt(700, seed=4)
    with engine(tiny_gemma, budget=96) as running:
        cold, warm = (running.generate([prompt], max_tokens=24)[0] for _ in range(2))
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == (700 - 32) // 32 * 32
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


@pytest.mark.parametrize(
    "retention", [pytest.param(0, marks=pytest.mark.more_on_v2("on V1 with fewer cached windows, too")), None]
)
def test_what_follows_an_eviction_is_shared_by_no_kind_of_layer(tiny_gemma: Path, retention: int | None) -> None:
    """A chat goes on after an evicted answer: the windows over that answer saw what eviction left, too.

    retention: None makes vLLM cache the windows of every block, 0 those at the ends of prompts
    """
    whole = {"kv_eviction": "none"}
    prompt, more = random_prompt(500, seed=2), random_prompt(20, seed=3)
    with engine(tiny_gemma, budget=64, prefix_cache_retention_interval=retention) as running:
        (answer,) = running.tokens([prompt], max_tokens=150)  # all that a window sees from 640 on
        turns = prompt + answer + more
        running.tokens([turns[:-2]], extra_args=whole)  # brings full attention's blocks into the cache
        (hit,) = running.generate([turns], extra_args=whole, logprobs=0)
        (cold,) = running.generate([turns], extra_args=whole, logprobs=0, skip_reading_prefix_cache=True)
    assert hit.num_cached_tokens == 640
    assert hit.outputs[0].token_ids == cold.outputs[0].token_ids
    assert hit.outputs[0].cumulative_logprob == pytest.approx(cold.outputs[0].cumulative_logprob, abs=1e-3)
