"""Models that mix full attention with sliding windows or chunks: the former is evicted, the latter untouched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import engine
from tests.tiny_llama import VOCAB_SIZE, random_prompt
from tools.matrix.families import SETTINGS, family_named
from vllm_kvevict.engine.models import windows_of
from vllm_kvevict.engine.offline.check.dense import DenseModel
from vllm_kvevict.engine.worker.evicted_part import evicted_part
from vllm_kvevict.policies import Need

NUM_STEPS = 70  # more than the window, and into a third block


@pytest.fixture(scope="module")
def tiny_llama4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_llama4")
    family_named("Llama 4").build(folder)
    return folder


CASES = pytest.mark.parametrize(
    ("allocator", "chunk"),
    [
        pytest.param("uniform", 2048, marks=pytest.mark.more_on_v2("on V1 prompts of one chunk are compared, too")),
        ("lava", 130),
    ],
)


@pytest.mark.feature("models with sliding-window layers")
@CASES
def test_logits_beside_windows_equal_masked_dense_forward(
    tiny_gemma: Path, kept_masks: list[torch.Tensor], allocator: str, chunk: int
) -> None:
    check_logits(tiny_gemma, kept_masks, allocator, chunk)


@pytest.mark.feature("models with chunked local attention")
@CASES
def test_logits_beside_chunks_equal_masked_dense_forward(
    tiny_llama4: Path, kept_masks: list[torch.Tensor], allocator: str, chunk: int
) -> None:
    check_logits(tiny_llama4, kept_masks, allocator, chunk, **SETTINGS)


def check_logits(folder: Path, kept_masks: list[torch.Tensor], allocator: str, chunk: int, **settings: Any) -> None:
    prompt = random_prompt(500, seed=1)
    with engine(
        folder,
        budget=128,
        fields={"allocator": allocator},
        max_num_batched_tokens=chunk,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        **settings,
    ) as running:
        (output,) = running.generate([prompt], max_tokens=NUM_STEPS, logprobs=-1)
        held = running.scheduler.kv_cache_manager.block_pool.get_usage()
        running.check_all_free()
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    logits = torch.tensor([[step[token].logprob for token in range(VOCAB_SIZE)] for step in completion.logprobs])
    (kept,) = kept_masks
    assert kept.shape == (2, 2, 500) and held == 0
    dense = DenseModel(folder)
    expected = dense.logits(prompt + tokens[:-1], kept)[499:]
    assert (logits - expected).abs().max() < 1e-3
    whole = dense.logits(prompt + tokens[:-1])[499:]
    assert (logits[0] - whole[0]).abs().max() < 1e-3
    assert (logits[1:] - whole[1:]).abs().max() > 0.1


def test_layers_that_rotate_nothing_are_scored_as_such(tiny_llama4: Path) -> None:
    """Llama 4's layers that see everything; policies that turn keys back do not refuse them."""
    prompt = random_prompt(500, seed=1)
    with engine(tiny_llama4, "compactor", budget=128) as running:
        weights = running.bridge._weights
        rotaries = [weights.of(layer, frozenset({Need.ROTARY})).rotary for layer in range(2)]
        x, far = torch.randn(2, 3, 32), torch.arange(1000, 1003)
        assert all(rotary is not None and torch.equal(rotary.unrotate(x, far), x) for rotary in rotaries)
        for policy in ("compactor", "expected_attention", "criticalkv"):
            running.tokens([prompt], extra_args={"kv_eviction": policy})
        assert running.num_evictions == 3
        running.check_all_free()


def test_a_front_end_knows_what_layers_hold_that_see_a_part(tiny_gemma: Path, tiny_llama4: Path) -> None:
    for model in (tiny_gemma, tiny_llama4):
        with engine(model, budget=96, max_num_batched_tokens=64) as running:
            assert windows_of(running.llm.llm_engine.vllm_config) == running.scheduler._cache.windows != ()
            line = evicted_part(running.worker.get_kv_cache_spec(), running.worker.vllm_config)
            num_layers, share = (int(number) for number in re.findall(r"(\d+) of .* hold (\d+)%", line)[0])
            assert num_layers == 2 and 30 < share < 100 and "2 KV heads of each" in line
    config = running.llm.llm_engine.vllm_config
    config.model_config.hf_text_config.attention_chunk_size = None  # such layers see everything
    assert windows_of(config) == ()


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
