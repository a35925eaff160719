"""What attention backends promise vLLM for themselves is true of ours, and not only of those that they derive from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadataBuilder

from vllm_kvevict.engine.attention import EvictionMetadata
from vllm_kvevict.engine.cache_dtype import cache_of
from vllm_kvevict.engine.cpu_backend import EvictionCPUImpl
from vllm_kvevict.engine.flash_backend import EvictionFlashImpl, EvictionFlashMetadataBuilder
from vllm_kvevict.engine.triton_backend import EvictionTritonImpl, EvictionTritonMetadataBuilder
from vllm_kvevict.engine.xformers_backend import EvictionXformersImpl

IMPLS = [EvictionCPUImpl, EvictionFlashImpl, EvictionTritonImpl, EvictionXformersImpl]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_output_is_quantized_in_attention(impl: Any) -> None:
    """vLLM would fuse it, and what evicted rows wrote would not be what the next layer reads."""
    assert TritonAttentionImpl.fused_output_quant_supported(None, kFp8StaticTensorSym)
    assert not impl.fused_output_quant_supported(None, kFp8StaticTensorSym)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", ["output_scale", "output_block_scale"])
def test_a_scale_of_the_output_is_not_dropped_in_silence(impl: Any, scale: str) -> None:
    metadata = EvictionMetadata(*[None] * 4)  # type: ignore[arg-type]
    tensors = [torch.empty(0)] * 4
    with pytest.raises(NotImplementedError, match="does not quantize its output"):
        impl.forward(impl.__new__(impl), None, *tensors, metadata, torch.empty(0), **{scale: torch.ones(1)})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (EvictionFlashMetadataBuilder, FlashAttentionMetadataBuilder),
        (EvictionTritonMetadataBuilder, TritonAttentionMetadataBuilder),
    ],
)
def test_draft_metadata_is_not_updated_in_place(monkeypatch: pytest.MonkeyPatch, ours: Any, theirs: Any) -> None:
    """A draft's next pass reads one token more in every head: page tables and lengths are built for it."""

    def promise(self: Any) -> None:
        self.supports_draft_decode_metadata_update = True

    monkeypatch.setattr(theirs, "__init__", promise)
    assert not ours().supports_draft_decode_metadata_update


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("fp8_e5m2", torch.float8_e4m3fn, torch.float8_e4m3fn),  # Triton attention on CUDA
        ("fp8", torch.float8_e4m3fn, torch.float8_e4m3fn),
        ("fp8_e5m2", None, torch.float8_e5m2),  # CPU attention, which stores what was asked for
        ("auto", torch.float8_e4m3fn, torch.uint8),
    ],
)
def test_a_cache_is_read_as_what_its_kernel_stores(asked: str, stored: Any, expected: torch.dtype) -> None:
    impl = SimpleNamespace() if stored is None else SimpleNamespace(fp8_dtype=stored)
    layer = SimpleNamespace(kv_cache_dtype=asked, impl=impl, kv_cache=torch.zeros(4, dtype=torch.uint8))
    assert cache_of(layer).dtype == expected
