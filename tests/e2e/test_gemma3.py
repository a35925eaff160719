"""Gemma-3-270m, a real model with sliding-window layers: its full attention is evicted, its windows are left alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from tests.e2e.prompts import long_text
from tests.engine.harness import Engine, engine

MORE = pytest.mark.more("a real model: engine/test_hybrid_models.py and test_stress.py have a tiny one with windows")
pytestmark = pytest.mark.feature("models with sliding-window layers")

BUDGET = 256
BLOCK_SIZE = 32
FULL_ATTENTION = [5, 11, 17]
MAX_TOKENS = 40  # full attention enters a new block, the windows also leave one
# several chunks: the windows give blocks back during the prefill, too
SETTINGS = {
    "max_model_len": 4096,
    "max_num_batched_tokens": 1024,
    "dtype": "float32",
    "kv_cache_memory_bytes": 128 << 20,
}


class Trace(NamedTuple):
    """What a request held after each step, in blocks, and what it answered.

    windows: one number per group of sliding-window layers
    """

    full: list[int]
    windows: list[list[int]]
    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def tokenizer(gemma3: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gemma3)


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> list[int]:
    """A prompt for base weights: they know no chat and have to be led up to the answer."""
    tokens = tokenizer(long_text(170) + "\nAnswer:")["input_ids"]
    assert 2500 < len(tokens) < 3000 and tokens[0] == tokenizer.bos_token_id
    return tokens


@pytest.fixture(scope="module")
def stock(gemma3: Path, prompt: list[int]) -> Trace:
    with engine(gemma3, None, **SETTINGS) as running:
        return follow(running, prompt)


@pytest.fixture(scope="module")
def running(gemma3: Path, stock: Trace) -> Iterator[Engine]:
    with engine(gemma3, "snapkv", BUDGET, **SETTINGS) as started:
        yield started


def follow(running: Engine, prompt: list[int], **options: Any) -> Trace:
    """Run one request alone, step by step, to its end."""
    running.add(prompt, max_tokens=MAX_TOKENS, logprobs=0, skip_reading_prefix_cache=True, extra_args=options)
    full, windows = [], []
    while True:
        outputs = running.step()
        if outputs and outputs[0].finished:
            break
        of_full, of_windows = blocks_by_kind(running)
        full.append(of_full)
        windows.append(of_windows)
    running.check_all_free()
    (answer,) = outputs[0].outputs
    logprobs = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    return Trace(full, windows, list(answer.token_ids), logprobs)


def blocks_by_kind(running: Engine) -> tuple[int, list[int]]:
    """Blocks that the only request holds: of full attention, and of each group of sliding-window layers."""
    (request,) = running.scheduler.running
    manager, null = running.scheduler.kv_cache_manager, running.block_pool.null_block.block_id
    held = [sum(block != null for block in group) for group in manager.get_block_ids(request.request_id)]
    groups = running.scheduler.kv_cache_config.kv_cache_groups
    is_window = [isinstance(group.kv_cache_spec, SlidingWindowSpec) for group in groups]
    (full,) = [blocks for blocks, window in zip(held, is_window, strict=True) if not window]
    return full, [blocks for blocks, window in zip(held, is_window, strict=True) if window]


def test_the_converted_config_is_gemma_s(gemma3: Path) -> None:
    """The GGUF names the window but not the layers that have it, nor their RoPE: transformers' defaults must fit."""
    config = json.loads((gemma3 / "config.json").read_text())
    kinds = config["layer_types"]
    assert [layer for layer, kind in enumerate(kinds) if kind == "full_attention"] == FULL_ATTENTION
    assert kinds.count("sliding_attention") == 15 and config["sliding_window"] == 512
    assert config["rope_parameters"]["full_attention"] == {"rope_type": "default", "rope_theta": 1e6}
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["query_pre_attn_scalar"] == 256
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 1, 256)


@MORE
def test_full_attention_gives_blocks_back_and_windows_hold_what_they_hold_in_stock(
    running: Engine, stock: Trace, prompt: list[int], kept_masks: list[torch.Tensor]
) -> None:
    evicted = follow(running, prompt)
    (kept,) = kept_masks
    assert kept.shape == (len(FULL_ATTENTION), 1, len(prompt))
    assert evicted.windows == stock.windows
    assert len(stock.windows[0]) == 5 and max(max(stock.windows)) > max(stock.windows[-1])
    num_prefill = -(-len(prompt) // SETTINGS["max_num_batched_tokens"])
    num_freed = -(-len(prompt) // BLOCK_SIZE) - BUDGET // BLOCK_SIZE
    assert evicted.full[:num_prefill] == stock.full[:num_prefill]
    after = num_prefill + 3
    assert evicted.full[after - 1 :] == [blocks - num_freed for blocks in stock.full[after - 1 :]]
    # the first token comes from the whole prompt, the others from what was kept
    assert evicted.logprobs[0] == stock.logprobs[0]
    assert all(mine != full for mine, full in zip(evicted.logprobs[1:4], stock.logprobs[1:4], strict=True))


@MORE
def test_the_fact_survives_a_quarter_of_the_cache(
    running: Engine, stock: Trace, prompt: list[int], tokenizer: Any
) -> None:
    snapkv = follow(running, prompt, kv_budget=0.25)
    # the same budget without the fact: the windows, which end long after it, do not know it
    streaming_llm = follow(running, prompt, kv_budget=0.25, kv_eviction="streaming_llm")
    assert max(snapkv.full[-10:]) < 0.3 * stock.full[-1]
    answers = [tokenizer.decode(trace.tokens) for trace in (stock, snapkv, streaming_llm)]
    assert ["47" in answer for answer in answers] == [True, True, False], answers


@MORE
def test_a_budget_above_the_prompt_is_byte_identical_to_stock(running: Engine, stock: Trace, prompt: list[int]) -> None:
    num_evictions = running.num_evictions
    assert follow(running, prompt, kv_budget=len(prompt)) == stock
    assert running.num_evictions == num_evictions
