"""The worked example of docs/operations.md: every number in its table is what the code computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.config import CacheConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.conftest import ROOT
from tests.pages import commands_of
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.checks import empty_cache
from vllm_kvevict.engine.frontend.install import _DEFAULT_BLOCK_SIZE
from vllm_kvevict.engine.settings import FIELD
from vllm_kvevict.engine.worker.side_memory import Held, ModelMemory, SideMemory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
META = torch.device("meta")  # tensors with shapes and without memory
LLAMA = LlamaConfig(  # Llama-3.1-8B
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    dtype=torch.bfloat16,
)
LAYERS, HEADS, HEAD_SIZE = LLAMA.num_hidden_layers, LLAMA.num_key_value_heads, 128
GPU_BYTES, FORWARD_BYTES = 80 * GIB, 3 * GIB
PROMPT, ANSWER, BUDGET, MAX_NUM_SEQS = 32768, 1024, 2048, 256
MAX_TOKENS, BLOCK_SIZE = PROMPT + ANSWER, _DEFAULT_BLOCK_SIZE["cuda"]
EXAMPLE = (ROOT / "docs" / "operations.md").read_text().partition("\n### A worked example\n")[2].partition("\n## ")[0]


def config_of(**options: Any) -> Any:
    """As much of vLLM's configuration as sizes depend on."""
    return SimpleNamespace(
        additional_config={FIELD: {"policy": "snapkv", "budget": BUDGET, **options}},
        cache_config=SimpleNamespace(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        model_config=SimpleNamespace(
            max_model_len=MAX_TOKENS,
            dtype=LLAMA.dtype,
            get_num_attention_heads=lambda parallel_config: LLAMA.num_attention_heads,
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=MAX_NUM_SEQS,
            max_num_scheduled_tokens=None,
            max_num_batched_tokens=8192,
            long_prefill_token_threshold=0,
        ),
        parallel_config=None,
        speculative_config=None,
        num_speculative_tokens=0,
        max_concurrent_batches=2,  # asynchronous scheduling
    )


def weight_bytes() -> int:
    with META:
        return sum(weight.numel() for weight in LlamaForCausalLM(LLAMA).parameters()) * LLAMA.dtype.itemsize


def pool_of(num_blocks: int) -> PagePool:
    pages = torch.empty(num_blocks * LAYERS * HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=LLAMA.dtype, device=META)
    keys, values = pages.chunk(2, dim=-1)
    return PagePool(pages.flatten(1), keys, values, torch.empty(LAYERS, dtype=torch.int64, device=META), HEADS, HEADS)


def sizes(**options: Any) -> dict[str, str]:
    """What the table says of a server with such options of eviction: what -> how much."""
    vllm_config = config_of(**options)
    config = EvictionConfig.parse(vllm_config.additional_config[FIELD])
    spec = FullAttentionSpec(BLOCK_SIZE, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=LLAMA.dtype)
    memory = ModelMemory.take(vllm_config, config, {str(layer): spec for layer in range(LAYERS)}, nn.Module(), META)
    side, block_bytes = SideMemory(vllm_config, config, [memory]), spec.page_size_bytes * LAYERS

    share = CacheConfig().gpu_memory_utilization
    left = int(GPU_BYTES * share) - weight_bytes() - FORWARD_BYTES
    # taken when the model is loaded, and so no part of what vLLM has left for its cache
    loaded = sum(tensor.nbytes for tensor in vars(memory.page_table).values()) + memory.holes.nbytes
    num_blocks = side.cache_bytes(left - loaded) // block_bytes
    held = Held.beside(pool_of(num_blocks), memory, side.reserve, num_blocks).sizes()
    beside = sum(held.values()) + side.scratch_bytes
    assert beside + num_blocks * block_bytes <= left < beside + (num_blocks + 2) * block_bytes

    cache = empty_cache(vllm_config, num_blocks - 1, windows=())
    prefill = cache.plan_prefill(config, PROMPT, PROMPT)
    assert prefill is not None
    whole, reading = cache.num_needed(None, MAX_TOKENS), cache.num_needed(prefill, PROMPT)
    decoding = cache.num_decoding(prefill, MAX_TOKENS)

    def blocks(number: int) -> str:
        return f"{number:,} blocks, {number * block_bytes / MIB:,.0f} MiB"

    def mib(*names: str) -> str:
        return f"{sum(held[name] for name in held if name.startswith(names)) / MIB:,.0f} MiB"

    return {
        "weights": f"{weight_bytes() / GIB:.1f} GiB",
        "left for the KV cache and what is beside it": f"{left / GIB:.1f} GiB",
        "KV of one token": f"{block_bytes // BLOCK_SIZE // KIB} KiB",
        f"a block of {BLOCK_SIZE} tokens": f"{block_bytes // MIB} MiB",
        "page tables, page lists and arena": mib("page", "arena"),
        "last queries": mib("last queries"),
        "tokens in the slots of the cache": mib("tokens"),
        "left free for scoring": f"{side.scratch_bytes // MIB} MiB",
        "KV cache": f"{num_blocks:,} blocks, {num_blocks * block_bytes / GIB:.1f} GiB",
        "a request that is kept whole, with its answer": blocks(whole),
        "a request in the step that ends its prompt": blocks(reading),
        "a request that decodes, at most": blocks(decoding),
        "requests at once, kept whole": str(cache.num_blocks // whole),
        "requests that decode at once": str(cache.num_blocks // decoding),
        "requests that decode while one prompt is read": str((cache.num_blocks - reading) // decoding),
    }


def test_the_worked_example_is_what_the_code_computes() -> None:
    once, always = sizes(), sizes(during_decode=True)
    rows = [line.strip("| ").split(" | ") for line in EXAMPLE.splitlines() if line.startswith("| ")]
    assert rows[1:] == [[what, once[what], always[what]] for what in once]


def test_the_explanation_has_the_same_numbers() -> None:
    text = " ".join(EXAMPLE.split())

    def number(sizes_: dict[str, str], what: str) -> float:
        return float(sizes_[what].split()[0].replace(",", ""))

    def share(sizes_: dict[str, str]) -> float:
        beside = ("page tables, page lists and arena", "last queries", "tokens in the slots of the cache")
        mib = sum(number(sizes_, what) for what in (*beside, "left free for scoring"))
        return 100 * mib / (1024 * number(sizes_, "left for the KV cache and what is beside it"))

    once, always = sizes(), sizes(during_decode=True)
    assert f"vLLM takes {CacheConfig().gpu_memory_utilization:.0%}".replace("%", " %") in text
    assert f"We assume {FORWARD_BYTES // GIB} GiB" in text
    assert f"It is {share(once):.1f} % of what is left if requests are evicted once. During decode" in text
    assert f"During decode it is {share(always):.0f} %" in text
    reading, decoding = (
        number(once, f"a request {what}") for what in ("in the step that ends its prompt", "that decodes, at most")
    )
    assert f"each takes the place of {reading / decoding:.0f} that decode" in text
    beside, whole = once["requests that decode while one prompt is read"], once["requests at once, kept whole"]
    assert f"{beside} requests instead of {whole}" in text


def test_the_example_is_of_the_command_above_it() -> None:
    ((_, _, _, *flags),) = commands_of(EXAMPLE)
    assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
        "--kv-eviction": "snapkv",
        "--kv-budget": str(BUDGET),
        "--max-model-len": str(MAX_TOKENS),
        "--max-num-seqs": str(MAX_NUM_SEQS),
    }
