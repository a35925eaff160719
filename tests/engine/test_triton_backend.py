"""vLLM's Triton attention over folded page tables, in a real engine through Triton's interpreter. Not run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import engine
from tests.tiny_llama import random_prompt

CASES = [(20, "uniform"), (100, "uniform"), (130, "lava")]  # tokens of a prompt, and how its budget is shared


@pytest.mark.skipif(not USES_V2_RUNNER, reason="the kernel runs only through Triton's interpreter")
@pytest.mark.feature("Triton attention and FlashAttention 2 and 3, not run on a GPU", runners=("V2",))
def test_answers_are_those_of_cpu_attention(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_kvevict.engine import triton_backend, worker
    from vllm_kvevict.engine.attention import backend_in_place_of
    from vllm_kvevict.engine.triton_backend import EvictionTritonBackend, EvictionTritonImpl

    # vLLM asks for it before it launches the kernel that writes keys and values
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attend, splits = triton_backend.unified_attention, []

    def spy(**arguments: Any) -> None:
        splits.append(len(arguments["seqused_k"]) <= arguments["seq_threshold_3D"] and arguments["max_seqlen_q"] == 1)
        attend(**arguments)

    monkeypatch.setattr(triton_backend, "unified_attention", spy)
    answers = []
    for is_triton in (False, True):
        if is_triton:  # the CPU platform would choose its own
            ours = lambda: backend_in_place_of(AttentionBackendEnum.CPU_ATTN, EvictionTritonBackend)  # noqa: E731
            monkeypatch.setattr(worker, "cpu_backend", ours)
        with engine(tiny_llama, budget=64, max_num_batched_tokens=128) as running:
            context = running.worker.vllm_config.compilation_config.static_forward_context
            assert {isinstance(layer.impl, EvictionTritonImpl) for layer in context.values()} == {is_triton}
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
    assert any(splits)  # few sequences are split among programs, as those of vLLM are
