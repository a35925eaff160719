"""What attention backends promise vLLM for themselves is true of ours, and not only of those that they derive from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.utils.math_utils import next_power_of_2
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import (
    NUM_PAR_SOFTMAX_SEGMENTS,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_kvevict.engine.cache_dtype import cache_dtypes, cache_of
from vllm_kvevict.engine.worker.backends.base import EvictionMetadata
from vllm_kvevict.engine.worker.backends.cpu import EvictionCPUImpl
from vllm_kvevict.engine.worker.backends.flash import EvictionFlashImpl, EvictionFlashMetadataBuilder
from vllm_kvevict.engine.worker.backends.triton import EvictionTritonImpl, EvictionTritonMetadataBuilder
from vllm_kvevict.engine.worker.backends.xformers import EvictionXformersImpl

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
    ("asked", "scheme", "drafts", "expected"),
    [
        ("auto", None, None, ["auto"]),
        ("auto", {"num_bits": 8}, None, ["fp8"]),  # scales in the checkpoint
        ("bfloat16", {"num_bits": 8}, "fp8", ["bfloat16", "fp8"]),
    ],
)
def test_a_cache_may_be_fp8_by_a_checkpoint_or_for_drafts(
    asked: str, scheme: Any, drafts: Any, expected: list[str]
) -> None:
    speculation = None if drafts is None else SimpleNamespace(kv_cache_dtype=drafts)
    quantization = SimpleNamespace(kv_cache_scheme=scheme)
    cache_config = SimpleNamespace(cache_dtype=asked)
    settings = {"cache_config": cache_config, "quant_config": quantization, "speculative_config": speculation}
    assert cache_dtypes(SimpleNamespace(**settings)) == expected


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "seen_kv_heads", "seen_head_size"),
    [
        pytest.param(8, 2, 64, 2, 64, id="one kind of layers"),
        pytest.param(32, 4, 512, 16, 256, id="the full layers of Gemma 4"),
        pytest.param(14, 2, 64, 4, 128, id="a draft model with fewer heads than its target"),
        pytest.param(14, 2, 64, 8, 128, id="a draft model with far fewer"),
        pytest.param(8, 2, 80, 2, 80, id="an odd head size"),
    ],
)
def test_triton_s_scratch_memory_is_enough_for_what_it_is_lent_for(
    heads: int, kv_heads: int, head_size: int, seen_kv_heads: int, seen_head_size: int
) -> None:
    """vLLM's builder takes the KV heads and the size of heads from the model, which may have other layers as well."""
    builder = EvictionTritonMetadataBuilder.__new__(EvictionTritonMetadataBuilder)
    builder.kv_cache_spec = SimpleNamespace(num_kv_heads=kv_heads, head_size=head_size)
    builder.num_heads_q, builder.num_heads_kv = heads, seen_kv_heads
    builder.seq_threshold_3D = 128 // seen_kv_heads
    rows, padded = builder.seq_threshold_3D, next_power_of_2(seen_head_size)
    builder.softmax_segm_output = torch.empty(rows, heads, NUM_PAR_SOFTMAX_SEGMENTS, padded)
    builder.softmax_segm_max = torch.empty(rows, heads, NUM_PAR_SOFTMAX_SEGMENTS)
    builder.softmax_segm_expsum = torch.empty(rows, heads, NUM_PAR_SOFTMAX_SEGMENTS)
    launch = builder._launch(None)
    shape = launch.max_sequences, heads // kv_heads, NUM_PAR_SOFTMAX_SEGMENTS
    assert launch.max_sequences > 0
    for lent, owned in (
        (launch.output, builder.softmax_segm_output),
        (launch.maxima, builder.softmax_segm_max),
        (launch.sums, builder.softmax_segm_expsum),
    ):
        assert lent.data_ptr() == owned.data_ptr() and lent.numel() <= owned.numel() and lent.is_contiguous()
        assert len(lent) >= shape[0] and lent.shape[1:3] == shape[1:]
    assert launch.output.shape[3] == next_power_of_2(head_size)


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
