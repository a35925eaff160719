"""What is said and refused once a model's layers have their backends on CUDA; test_cuda_platform.py chooses them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

from vllm_kvevict.engine.worker.backends import cuda
from vllm_kvevict.engine.worker.backends.cuda import InPlaceOfFlashAttention, InPlaceOfFlashInfer, check_backends
from vllm_kvevict.engine.worker.backends.flash import EvictionFlashBackend


def layers_with(*backends: type) -> list[Any]:
    impl = SimpleNamespace(attn_type=AttentionType.DECODER)
    return [SimpleNamespace(get_attn_backend=lambda backend=backend: backend, impl=impl) for backend in backends]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(cuda.logger, "warning", lambda text, *args: found.append(text % args))
    return found


def test_other_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="the attention backend FLEX_ATTENTION; use --attention-backend FLASH_ATTN or"):
        check_backends(layers_with(EvictionFlashBackend, FlexAttentionBackend))


@pytest.mark.parametrize(
    ("backends", "expected"),
    [
        ([EvictionFlashBackend, EvictionFlashBackend], []),
        (
            [InPlaceOfFlashInfer, EvictionFlashBackend, InPlaceOfFlashInfer],
            ["FlashInfer reads no page tables per KV head: Triton attention takes its place"],
        ),
        (
            [InPlaceOfFlashInfer, InPlaceOfFlashAttention],
            [f"{InPlaceOfFlashAttention.reason} and {InPlaceOfFlashInfer.reason}: Triton attention takes its place"],
        ),
    ],
)
def test_what_is_replaced_is_said_in_one_sentence(
    warnings: list[str], backends: list[type], expected: list[str]
) -> None:
    check_backends(layers_with(*backends))
    assert warnings == expected


def test_one_of_several_workers_says_it(warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "is_global_first_rank", lambda: False)
    check_backends(layers_with(InPlaceOfFlashInfer))
    assert not warnings
