"""What would happen on CUDA, by vLLM's own selection code: what is taken, and what refused. Not run on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_kvevict import kv_eviction_args, register
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine import cuda_backends as cuda_backends_module
from vllm_kvevict.engine import install
from vllm_kvevict.engine.cuda_backends import InPlaceOfFlashInfer, check_backends, cuda_backends
from vllm_kvevict.engine.flash_backend import EvictionFlashBackend, EvictionFlashMetadataBuilder
from vllm_kvevict.engine.triton_backend import EvictionTritonBackend, EvictionTritonMetadataBuilder

GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
SELECTOR_CONFIG = AttentionSelectorConfig(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's CUDA platform; its compiled operators, which nothing here calls, are not part of the build for CPU."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    return NonNvmlCudaPlatform


@pytest.fixture
def vllm_config(tiny_llama: Path) -> Any:
    return EngineArgs(str(tiny_llama), skip_tokenizer_init=True).create_engine_config()


@pytest.mark.parametrize(
    ("capability", "selected", "expected"),
    [
        ((8, 0), None, EvictionFlashBackend),
        ((9, 0), None, EvictionFlashBackend),
        ((10, 0), None, InPlaceOfFlashInfer),
        ((9, 0), AttentionBackendEnum.TRITON_ATTN, EvictionTritonBackend),
        ((9, 0), AttentionBackendEnum.FLASHINFER, InPlaceOfFlashInfer),
        ((9, 0), AttentionBackendEnum.FLEX_ATTENTION, FlexAttentionBackend),
    ],
)
def test_the_platform_s_choice_becomes_ours(
    cuda: Any,
    vllm_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    selected: AttentionBackendEnum | None,
    expected: type,
) -> None:
    monkeypatch.setattr(cuda, "get_device_capability", classmethod(lambda *_: DeviceCapability(*capability)))
    with set_current_vllm_config(vllm_config), cuda_backends():
        path = cuda.get_attn_backend_cls(selected, SELECTOR_CONFIG, 8)
    assert path == f"{expected.__module__}.{expected.__name__}"


def layer_with(backend: type) -> Any:
    return SimpleNamespace(get_attn_backend=lambda: backend, impl=SimpleNamespace(attn_type=AttentionType.DECODER))


def test_other_backends_are_refused_and_flashinfer_is_replaced_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(cuda_backends_module.logger, "warning", warnings.append)
    with pytest.raises(ValueError, match="the attention backend FLEX_ATTENTION; use --attention-backend FLASH_ATTN or"):
        check_backends([layer_with(EvictionFlashBackend), layer_with(FlexAttentionBackend)])
    check_backends([layer_with(EvictionFlashBackend)])
    assert not warnings
    check_backends([layer_with(InPlaceOfFlashInfer)])
    assert "Triton attention takes its place" in warnings[0]


@pytest.mark.parametrize("builder", [EvictionFlashMetadataBuilder, EvictionTritonMetadataBuilder])
def test_no_full_graph_is_captured(builder: Any) -> None:
    """It would go on with stock attention for rows that are evicted later."""
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER


def test_on_cuda_our_worker_is_named_and_the_log_says_that_it_is_untested(
    cuda: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    args = kv_eviction_args("snapkv", 96)
    vllm_config = EngineArgs(str(tiny_llama), skip_tokenizer_init=True, **args).create_engine_config()
    vllm_config.parallel_config.worker_cls = GPU_WORKER
    warnings: list[str] = []
    monkeypatch.setattr(install, "current_platform", cuda())
    monkeypatch.setattr(install.logger, "warning", warnings.append)
    install._switch_on(EvictionConfig(policy="snapkv", budget=96), vllm_config)
    assert vllm_config.parallel_config.worker_cls == "vllm_kvevict.engine.gpu_worker.EvictionGPUWorker"
    assert "not been run on a GPU" in warnings[0]
