"""Triton's kernels over folded page tables, vLLM's and xformers', in a real engine through Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.ops import triton_reshape_and_cache_flash

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.worker import cpu_worker
from vllm_kvevict.engine.worker.backends import triton, xformers
from vllm_kvevict.engine.worker.backends.base import backend_in_place_of
from vllm_kvevict.engine.worker.backends.triton import EvictionTritonBackend
from vllm_kvevict.engine.worker.backends.xformers import EvictionXformersBackend
from vllm_kvevict.kernels import optional_xformers, paged_attention

pytestmark = pytest.mark.skipif(not USES_V2_RUNNER, reason="the kernels run only through Triton's interpreter")

CASES = [(20, "uniform"), (100, "uniform"), (130, "lava")]  # tokens of a prompt, and how its budget is shared


def answers(running: Engine) -> list[list[int]]:
    running.poison_unowned_memory()
    names = [
        running.add(random_prompt(length, seed=length), extra_args={"kv_budget_allocator": allocator}, max_tokens=8)
        for length, allocator in CASES
    ]
    outputs = running.run()
    assert running.num_evictions == 2
    running.check_all_free()
    return [list(outputs[name].outputs[0].token_ids) for name in names]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> list[list[int]]:
    with engine(tiny_llama, budget=64, max_num_batched_tokens=128) as running:
        return answers(running)


def check_answers(
    tiny_llama: Path,
    plain: list[list[int]],
    backend: type[EvictionTritonBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM asks for it before it launches the kernel that writes keys and values
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    # the CPU platform would choose its own
    monkeypatch.setattr(cpu_worker, "cpu_backend", lambda: backend_in_place_of(AttentionBackendEnum.CPU_ATTN, backend))
    with engine(tiny_llama, budget=64, max_num_batched_tokens=128) as running:
        context = running.worker.vllm_config.compilation_config.static_forward_context
        assert {type(layer.impl) for layer in context.values()} == {backend.get_impl_cls()}
        assert answers(running) == plain


@pytest.mark.feature("Triton attention and FlashAttention 2 and 3, not run on a GPU", runners=("V2",))
def test_answers_are_those_of_cpu_attention(
    tiny_llama: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, splits = triton.unified_attention, []

    def spy(**arguments: Any) -> None:
        splits.append(len(arguments["seqused_k"]) <= arguments["seq_threshold_3D"] and arguments["max_seqlen_q"] == 1)
        attend(**arguments)

    monkeypatch.setattr(triton, "unified_attention", spy)
    check_answers(tiny_llama, plain, EvictionTritonBackend, monkeypatch)
    assert any(splits)  # few sequences are split among programs, as those of vLLM are


def kept_under(
    cache_dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch, masks: list[torch.Tensor]
) -> list[bool]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_reshape_and_cache_flash, "_is_supported_kv_cache_dtype", lambda dtype: True)
    ours = backend_in_place_of(AttentionBackendEnum.CPU_ATTN, EvictionTritonBackend)
    monkeypatch.setattr(cpu_worker, "cpu_backend", lambda: ours)
    with engine(folder, budget=64, kv_cache_dtype=cache_dtype) as running:
        running.tokens([random_prompt(130, seed=1)], max_tokens=4)
    return masks[-1].flatten().tolist()


@pytest.mark.more("test_attention.py says as what the cache is read")
def test_e5m2_is_scored_as_the_e4m3_that_triton_attention_stores(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, kept_masks: list[torch.Tensor]
) -> None:
    kept = kept_under("fp8_e5m2", tiny_llama, monkeypatch, kept_masks)
    assert kept == kept_under("fp8_e4m3", tiny_llama, monkeypatch, kept_masks)


@pytest.mark.more_on_v2("the interpreter is slow; kernels/test_paged_attention.py tests the kernel")
@pytest.mark.skipif(not optional_xformers.HAS_XFORMERS, reason="xformers is not installed")
def test_xformers_answers_as_cpu_attention_does(
    tiny_llama: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # float32, which the interpreter can multiply, so that the answers are the same to the last token
    monkeypatch.setattr(xformers, "DTYPES", (torch.float32,))
    monkeypatch.setattr(paged_attention, "DTYPES", (torch.float32,))
    attend, calls = xformers.paged_attention, []

    def spy(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[0]))
        return attend(*arguments)

    monkeypatch.setattr(xformers, "paged_attention", spy)
    check_answers(tiny_llama, plain, EvictionXformersBackend, monkeypatch)
    assert calls
