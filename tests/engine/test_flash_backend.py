"""FlashAttention over folded page tables, in a real engine with a reference for the kernel. Not run on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests import flash_attention
from tests.engine.harness import Engine, engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine import cpu_worker
from vllm_kvevict.engine.attention import backend_in_place_of
from vllm_kvevict.engine.flash_backend import EvictionFlashBackend, EvictionFlashImpl

PROMPTS = [random_prompt(length, seed=length) for length in (40, 383, 450, 512)]
ALLOCATORS = ("uniform", "lava")


@pytest.fixture
def on_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines use FlashAttention where the CPU platform would choose its own, and the reference for its kernel."""
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", flash_attention.varlen, raising=False)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", flash_attention.reshape_and_cache, raising=False)
    monkeypatch.setattr(
        flash_attn, "get_scheduler_metadata", lambda **_: torch.zeros(1, dtype=torch.int32), raising=False
    )
    monkeypatch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda: False)
    monkeypatch.setattr(
        cpu_worker, "cpu_backend", lambda: backend_in_place_of(AttentionBackendEnum.CPU_ATTN, EvictionFlashBackend)
    )


def answers(running: Engine) -> list[list[list[int]]]:
    running.poison_unowned_memory()
    tokens = [running.tokens(PROMPTS, max_tokens=40, extra_args={"kv_budget_allocator": name}) for name in ALLOCATORS]
    assert running.num_evictions == 3 * len(ALLOCATORS)
    running.check_all_free()
    return tokens


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> list[list[list[int]]]:
    with engine(tiny_llama, max_num_batched_tokens=256) as running:
        return answers(running)


@pytest.mark.parametrize(
    "version", [pytest.param(2, marks=pytest.mark.more_on_v2("FlashAttention 3 runs on both, 2 on V1")), 3]
)
@pytest.mark.feature("Triton attention and FlashAttention 2 and 3, not run on a GPU")
def test_answers_are_those_of_cpu_attention(
    tiny_llama: Path,
    plain: list[list[list[int]]],
    on_flash_attention: None,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
) -> None:
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: version)
    with engine(tiny_llama, max_num_batched_tokens=256) as running:
        context = running.worker.vllm_config.compilation_config.static_forward_context
        assert all(isinstance(layer.impl, EvictionFlashImpl) for layer in context.values())
        assert answers(running) == plain


def test_flash_attention_4_is_refused(
    tiny_llama: Path, on_flash_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 4)
    with (
        pytest.raises(ValueError, match="FlashAttention 4; use --attention-backend TRITON_ATTN or leave"),
        engine(tiny_llama),
    ):
        pass
