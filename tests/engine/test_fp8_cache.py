"""Eviction over an fp8 KV cache: pages move as bytes, scores read what they stand for, attention gets its scales."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops

from tests.engine.harness import Engine, engine
from tests.engine.test_dense_reference import dense_snapkv_scores, run_with_logits
from tests.fp8 import DTYPES, KEY_SCALES, VALUE_SCALES, checkpoint_with_scales, stored
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.offline.check.dense import DenseModel

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 KV cache on CPU needs AVX-512 or AMX"
)

LENGTH, BUDGET = 500, 96
# What vLLM and transformers compute in float32 differs by rounding. Next to a boundary between two fp8 numbers it is
# then stored as one or as the other, 1/8 (e4m3) or 1/4 (e5m2) apart: few of the 128,000 numbers, but every step sees
# them. Most steps agree to float32 rounding; none may be off by as much as what a wrong page or no fp8 at all makes.
TYPICAL, LARGEST = 1e-3, 0.1


@dataclass(frozen=True)
class Cache:
    """What a test's engine is given, and what it then stores."""

    folder: Path
    settings: dict[str, Any]
    dtype: torch.dtype
    key_scales: tuple[float, float] = (1.0, 1.0)
    value_scales: tuple[float, float] = (1.0, 1.0)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what attention reads after these were written."""
        scales = self.key_scales[layer], self.value_scales[layer]
        kept = [stored(kv, self.dtype, scale).float() * scale for kv, scale in zip((keys, values), scales, strict=True)]
        return kept[0], kept[1]


WITH_SCALES = "scales of a checkpoint"


@pytest.fixture
def cache(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Cache:
    if request.param in DTYPES:
        return Cache(tiny_llama, {"kv_cache_dtype": request.param}, DTYPES[request.param])
    folder = checkpoint_with_scales(tiny_llama, tmp_path / "model")
    return Cache(folder, {}, torch.float8_e4m3fn, KEY_SCALES, VALUE_SCALES)


@pytest.mark.more_on_v2("vLLM's kernel knows no runner")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_the_reference_stores_what_vllms_kernel_does(cache_dtype: str, scale: float, dtype: torch.dtype) -> None:
    """Byte for byte, for numbers from far below the smallest to far above the largest; K transposed, then V."""
    block_size, head_size, num_blocks = 32, 64, 8
    keys, values = torch.randn(2, num_blocks * block_size, 1, head_size).to(dtype)
    keys *= 10 ** torch.empty_like(keys).uniform_(-6, 6)
    pages = torch.zeros(num_blocks, 1, 2 * block_size, head_size, dtype=torch.uint8)
    slots = torch.randperm(num_blocks * block_size)
    ops.cpu_attn_reshape_and_cache(
        keys, values, *pages.chunk(2, dim=2), slots, "vec", k_scale=scale, v_scale=scale, kv_cache_dtype=cache_dtype
    )
    halves = pages.view(num_blocks, 2, -1)
    key_slots = halves[:, 0].unflatten(1, (head_size, block_size)).transpose(1, 2).flatten(0, 1)
    value_slots = halves[:, 1].unflatten(1, (block_size, head_size)).flatten(0, 1)
    for found, written in ((key_slots, keys), (value_slots, values)):
        assert found[slots].equal(stored(written[:, 0], DTYPES[cache_dtype], scale).view(torch.uint8))


def logits_of(cache: Cache, policy: str, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    settings = {"logprobs_mode": "raw_logits", "max_logprobs": -1, **cache.settings}
    with engine(cache.folder, policy, budget=BUDGET, **settings) as running:
        assert running.bridge.pool.pages.dtype == cache.dtype
        running.poison_unowned_memory()
        tokens, logits = run_with_logits(running, prompt)
        assert running.num_evictions == 1
        running.check_all_free()
    return tokens, logits


ON_V1 = pytest.mark.more_on_v2("on V1 caches of every kind are compared")


@pytest.mark.feature("KV cache in fp8")
@pytest.mark.parametrize(
    ("cache", "policy"),
    [
        pytest.param("fp8", "snapkv", marks=ON_V1),
        pytest.param("fp8_e5m2", "snapkv", marks=ON_V1),
        (WITH_SCALES, "snapkv"),
        pytest.param(WITH_SCALES, "lava", marks=ON_V1),
    ],
    indirect=["cache"],
)
def test_scores_and_logits_are_those_of_a_dense_model_over_stored_numbers(
    cache: Cache, tiny_llama: Path, kept_masks: list[torch.Tensor], policy: str
) -> None:
    prompt = random_prompt(LENGTH, seed=LENGTH)
    tokens, logits = logits_of(cache, policy, prompt)
    (kept,) = kept_masks
    dense = DenseModel(tiny_llama, cache.store)
    text = prompt + tokens[:-1]

    def difference(model: DenseModel, mask: torch.Tensor | None) -> torch.Tensor:
        """The largest of every step's logits."""
        return (logits - model.logits(text, mask)[LENGTH - 1 :]).abs().amax(-1)

    found = difference(dense, kept)
    assert found.median() < TYPICAL
    assert found.max() < LARGEST
    # the check can tell the whole cache, one wrong page, and numbers that were not rounded to fp8
    whole = difference(dense, None)
    assert whole[0] < LARGEST, "the first token must come from the full cache"
    assert whole[1:].min() > 10 * LARGEST
    for layer, head in ((0, 0), (1, 1)):
        assert difference(dense, with_a_wrong_page(kept, layer, head)).max() > 10 * LARGEST
    exact = difference(DenseModel(tiny_llama), kept)
    assert exact.median() > 2 * LARGEST
    if policy == "snapkv":
        inner = kept[..., :-32]
        assert contradictions(dense, prompt, inner) == 0
        assert contradictions(DenseModel(tiny_llama), prompt, inner) > 0


def contradictions(dense: DenseModel, prompt: list[int], inner: torch.Tensor) -> int:
    """Return how many tokens have gone whose scores are above those of a token that stayed.

    inner: [num_layers, num_kv_heads, num_prompt_tokens - 32] bool, what stayed of the tokens before the window
    """
    dense.logits(prompt)
    scores = dense_snapkv_scores(dense, LENGTH)
    lowest_kept = scores.masked_fill(~inner, float("inf")).amin(-1, keepdim=True)
    # above it by more than float32 rounding, and a number stored one step off, make of them
    return int((scores.masked_fill(inner, 0.0) > 1.01 * lowest_kept).sum())


def with_a_wrong_page(kept: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """Return a mask in which one head keeps 32 other tokens than it should."""
    wrong = kept.clone()
    wrong[layer, head, kept[layer, head].nonzero()[:32, 0]] = False
    wrong[layer, head, (~kept[layer, head]).nonzero()[:32, 0]] = True
    return wrong


PROMPTS = [random_prompt(40 + 61 * index, seed=index) for index in range(8)]


@pytest.mark.parametrize(
    ("cache", "dtype"),
    [("fp8", "float32"), pytest.param(WITH_SCALES, "bfloat16", marks=ON_V1)],
    indirect=["cache"],
)
def test_a_budget_above_the_prompt_is_stock_vllm(cache: Cache, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # on AMX stock vLLM multiplies bfloat16 by another kernel, which rounds differently; ours has the AVX-512 one for
    # 8-bit caches, and is compared with stock vLLM on that
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with engine(cache.folder, policy=None, dtype=dtype, **cache.settings) as stock:
        expected = stock.tokens(PROMPTS)
    with engine(cache.folder, budget=max(map(len, PROMPTS)), dtype=dtype, **cache.settings) as running:
        assert running.tokens(PROMPTS) == expected
        assert not running.num_evictions
        running.check_all_free()


@pytest.mark.parametrize("cache", [WITH_SCALES], indirect=True)
@pytest.mark.more_on_v2("on V1 requests of such a cache are compared")
def test_many_requests_in_chunks_are_answered_as_alone(cache: Cache) -> None:
    """Prompts that are evicted and others that are not, in one batch; blocks come back while they run."""

    def start(**kwargs: Any) -> Any:
        return engine(cache.folder, "lava", budget=BUDGET, max_num_batched_tokens=150, **cache.settings, **kwargs)

    with start() as running:
        running.poison_unowned_memory()
        together = running.tokens(PROMPTS)
        assert running.max_running > 4
        assert running.num_evictions == sum(len(prompt) > BUDGET for prompt in PROMPTS) > 4
        running.check_all_free()
    with start() as running:
        assert [running.tokens([prompt])[0] for prompt in PROMPTS] == together


def held_blocks(running: Engine, prompt: list[int]) -> tuple[int, int]:
    """Return the blocks in use at the end of the prefill, and two steps later."""
    before = running.num_free_blocks
    running.add(prompt)
    running.step()
    most = before - running.num_free_blocks
    running.step()
    running.step()
    return most, before - running.num_free_blocks


@pytest.mark.more_on_v2("on V1 the same blocks are counted")
def test_blocks_return_and_there_are_twice_as_many_as_in_bfloat16(tiny_llama: Path) -> None:
    counts = []
    for cache_dtype in ("fp8", "auto"):
        with engine(tiny_llama, budget=BUDGET, dtype="bfloat16", kv_cache_dtype=cache_dtype) as running:
            counts.append(running.block_pool.num_gpu_blocks)
            # fresh ones beside those of the prompt, whose partly filled last block stays
            assert held_blocks(running, random_prompt(LENGTH, seed=1)) == (16 + BUDGET // 32 - 1, BUDGET // 32)
            running.run()
            running.check_all_free()
    assert counts[0] == 2 * counts[1]
