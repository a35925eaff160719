"""FlashAttention over folded page tables, in a real engine with a reference for the kernel. Not run on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests import flash_attention
from tests.conftest import USES_V2_RUNNER
from tests.engine.harness import Engine, engine
from tests.engine.test_flags import created
from tests.implementations import hard_sinks, probabilities
from tests.tiny_llama import random_prompt
from vllm_kvevict.engine.worker import cpu_worker
from vllm_kvevict.engine.worker.backends import cuda
from vllm_kvevict.engine.worker.backends.base import PagesToRead, backend_in_place_of
from vllm_kvevict.engine.worker.backends.cuda import InPlaceOfFlashAttention, check_backends, cuda_backends
from vllm_kvevict.engine.worker.backends.flash import EvictionFlashBackend, EvictionFlashImpl
from vllm_kvevict.engine.worker.backends.triton import EvictionTritonImpl
from vllm_kvevict.engine.worker.cpu_worker import EvictionCPUWorker
from vllm_kvevict.engine.worker.rows import FoldedQueries, fold_queries

PROMPTS = [random_prompt(length, seed=length) for length in (40, 383, 450, 512)]
ALLOCATORS = ("uniform", "lava")


@pytest.fixture
def on_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines use FlashAttention where the CPU platform would choose its own, and the reference for its kernel."""
    flash_attention.replace_kernels(monkeypatch, version=3)
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


@pytest.mark.parametrize(
    ("version", "fields", "message"),
    [
        (4, {}, "FlashAttention 4; use --attention-backend TRITON_ATTN or leave"),
        (3, {"kv_cache_dtype": "fp8"}, "a KV cache in fp8 on FlashAttention; use --attention-backend TRITON_ATTN or"),
    ],
)
def test_a_layer_that_flash_attention_does_not_fit_is_refused_where_nothing_took_its_place(
    tiny_llama: Path,
    on_flash_attention: None,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    fields: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: version)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True)
    with pytest.raises(ValueError, match=message), engine(tiny_llama, **fields):
        pass


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("query_lens", [(1, 1, 1), (5, 1, 3)], ids=["decode", "drafts"])
@pytest.mark.more_on_v2("it knows no runner")
def test_sinks_and_caps_over_folded_rows(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, version: int, query_lens: tuple[int, ...]
) -> None:
    """Neither version has a sink for each head of a request, whose heads are sequences: out * sigmoid(lse - sink)."""
    flash_attention.replace_kernels(monkeypatch, version)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)
    num_kv_heads, group, head_size, cap = 2, 3, 16, 2.0
    sinks = hard_sinks(num_kv_heads * group)
    with set_current_vllm_config(created(tiny_llama)):
        impl = EvictionFlashImpl(
            *(num_kv_heads * group, head_size, head_size**-0.5, num_kv_heads, None, None, "auto", cap), sinks=sinks
        )
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 12, 16, head_size, generator=generator)
    table = torch.randperm(12, generator=generator).view(6, 2).int()
    kv_lens = torch.tensor([20, 7, 32, 9, 5, 31], dtype=torch.int32)
    query = torch.randn(sum(query_lens), num_kv_heads, group, head_size, generator=generator)
    numpy_lens = np.array(query_lens)
    first_tokens = np.cumsum(numpy_lens) - numpy_lens
    index, tokens, starts, row_starts = fold_queries(first_tokens, numpy_lens, num_kv_heads, torch.device("cpu"))
    order = None if query_lens == (1, 1, 1) else index
    folded = query.flatten(0, 1) if order is None else query.flatten(0, 1)[order]
    output = torch.empty_like(folded)
    queries = FoldedQueries(order, starts, max(query_lens), tokens, row_starts)
    pool: Any = SimpleNamespace(keys=keys, values=values)
    impl.attend_folded(None, folded, PagesToRead(pool, table, kv_lens, 32), queries, 0, output)
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        rows = range(int(starts[sequence]), int(starts[sequence + 1]))
        held = [part[table[sequence].long()].flatten(0, 1)[:kv_len].double() for part in (keys, values)]
        for place, row in enumerate(rows):
            seen = kv_len - len(rows) + place + 1
            logits = folded[row].double() @ held[0][:seen].T * impl.scale
            paid = probabilities(logits, cap, sinks.view(num_kv_heads, group, 1)[sequence % num_kv_heads])
            torch.testing.assert_close(output[row].double(), paid @ held[1][:seen], rtol=1e-4, atol=1e-5)


def gemma_answers(running: Engine) -> list[list[int]]:
    running.poison_unowned_memory()
    tokens = running.tokens([random_prompt(100, seed=100)], max_tokens=4)
    assert running.num_evictions == 1
    running.check_all_free()
    return tokens


@pytest.mark.more("test_cuda_platform.py configures it, and test_triton_backend.py runs this backend")
@pytest.mark.skipif(not USES_V2_RUNNER, reason="Triton's kernels run only through its interpreter")
@pytest.mark.feature("Triton attention and FlashAttention 2 and 3, not run on a GPU", runners=("V2",))
def test_triton_takes_the_place_of_flash_attention_4_beside_sliding_windows(
    tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(tiny_gemma, budget=64, max_num_batched_tokens=64, max_num_seqs=2) as running:
        plain = gemma_answers(running)

    def load_as_on_cuda(worker: EvictionCPUWorker, **arguments: Any) -> None:
        with cuda_backends(worker.vllm_config):
            chosen = AttentionBackendEnum.FLASH_ATTN.get_class()
            with backend_in_place_of(AttentionBackendEnum.CPU_ATTN, chosen):
                super(EvictionCPUWorker, worker).load_model(**arguments)
        check_backends(get_layers_from_vllm_config(worker.vllm_config, Attention).values())
        worker.take_memory()

    warnings: list[str] = []
    monkeypatch.setattr(cuda.logger, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(EvictionCPUWorker, "load_model", load_as_on_cuda)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 4)
    # vLLM asks for it before it launches the kernel that writes keys and values
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with engine(tiny_gemma, budget=64, max_num_batched_tokens=64, max_num_seqs=2) as running:
        context = running.worker.vllm_config.compilation_config.static_forward_context
        assert all(isinstance(layer.impl, EvictionTritonImpl) for layer in context.values())
        assert gemma_answers(running) == plain
    assert warnings == [f"{InPlaceOfFlashAttention.reason}: Triton attention takes its place"]
