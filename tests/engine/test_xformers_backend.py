"""Evicted rows read by xformers, in a real engine through Triton's interpreter; and what is refused without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import engine
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine import worker, xformers_backend
from vllm_kvevict.engine.attention import backend_in_place_of
from vllm_kvevict.engine.cuda_backends import XFORMERS, cuda_backends
from vllm_kvevict.engine.xformers_backend import EvictionXformersBackend, EvictionXformersImpl
from vllm_kvevict.kernels import optional_xformers, paged_attention

CASES = [(20, "uniform"), (100, "uniform"), (130, "lava")]  # tokens of a prompt, and how its budget is shared


def test_it_is_what_custom_means_unless_somebody_has_a_backend_of_that_name() -> None:
    custom = AttentionBackendEnum.CUSTOM
    with cuda_backends():
        assert custom.get_path() == XFORMERS
        assert custom.get_class() is EvictionXformersBackend
    assert not custom.is_overridden()
    with backend_in_place_of(custom, "somebody.Else"):
        with cuda_backends():
            assert custom.get_path() == "somebody.Else"
        assert custom.get_path() == "somebody.Else"


@pytest.mark.skipif(not USES_V2_RUNNER, reason="the kernel runs only through Triton's interpreter")
@pytest.mark.skipif(not optional_xformers.HAS_XFORMERS, reason="xformers is not installed")
def test_answers_are_those_of_cpu_attention(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # float32, which the interpreter can multiply, so that the answers are the same to the last token
    monkeypatch.setattr(xformers_backend, "DTYPES", (torch.float32,))
    monkeypatch.setattr(paged_attention, "DTYPES", (torch.float32,))
    # vLLM asks for it before it launches the kernel that writes keys and values
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attend, calls = xformers_backend.paged_attention, []

    def spy(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[0]))
        return attend(*arguments)

    monkeypatch.setattr(xformers_backend, "paged_attention", spy)
    answers = []
    for is_xformers in (False, True):
        if is_xformers:  # the CPU platform would choose its own
            ours = lambda: backend_in_place_of(AttentionBackendEnum.CPU_ATTN, EvictionXformersBackend)  # noqa: E731
            monkeypatch.setattr(worker, "cpu_backend", ours)
        with engine(tiny_llama, budget=64, max_num_batched_tokens=128) as running:
            context = running.worker.vllm_config.compilation_config.static_forward_context
            assert {isinstance(layer.impl, EvictionXformersImpl) for layer in context.values()} == {is_xformers}
            running.poison_unowned_memory()
            names = [
                running.add(
                    random_prompt(length, seed=length), extra_args={"kv_budget_allocator": allocator}, max_tokens=8
                )
                for length, allocator in CASES
            ]
            outputs = running.run()
            answers.append([list(outputs[name].outputs[0].token_ids) for name in names])
            assert running.num_evictions == 2
            running.check_all_free()
    assert answers[0] == answers[1]
    assert calls


@pytest.mark.parametrize(
    ("is_installed", "message"),
    [
        (False, r"CUSTOM: .* is xformers, which is not installed; run `pip install vllm-kvevict\[xformers\]` or use"),
        (True, r"CUSTOM: xformers takes float16 or bfloat16.* got torch.float32, a cache in auto and 32; use --att"),
    ],
)
def test_what_it_cannot_serve_is_refused_at_start_up(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, is_installed: bool, message: str
) -> None:
    monkeypatch.setattr(xformers_backend, "HAS_XFORMERS", is_installed)
    ours = lambda: backend_in_place_of(AttentionBackendEnum.CPU_ATTN, EvictionXformersBackend)  # noqa: E731
    monkeypatch.setattr(worker, "cpu_backend", ours)
    with pytest.raises(ValueError, match=message), engine(tiny_llama, budget=64):
        pass
