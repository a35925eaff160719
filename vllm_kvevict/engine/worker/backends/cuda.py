"""On CUDA and ROCm: our attention backends in place of those that the platform would choose. Not run on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvevict.engine.worker.backends.base import EvictionBackend, backend_in_place_of
from vllm_kvevict.engine.worker.backends.flash import EvictionFlashBackend, flash_attention_fits
from vllm_kvevict.engine.worker.backends.triton import EvictionTritonBackend

logger = logging.getLogger("vllm.kvevict")

_OF_ROCM = (
    AttentionBackendEnum.ROCM_ATTN,
    AttentionBackendEnum.ROCM_AITER_FA,
    AttentionBackendEnum.ROCM_AITER_UNIFIED_ATTN,
)
XFORMERS = "vllm_kvevict.engine.worker.backends.xformers.EvictionXformersBackend"  # imported only where it is asked for


class InPlaceOfAnother(EvictionTritonBackend):
    """Triton attention where a backend was chosen that cannot attend over evicted rows.

    reason: why it cannot, for the log
    """

    reason: ClassVar[str]


class InPlaceOfFlashInfer(InPlaceOfAnother):
    """In place of FlashInfer, whose plans know one page table for all heads of a request."""

    reason = "FlashInfer reads no page tables per KV head"


class InPlaceOfComposite(InPlaceOfAnother):
    """In place of the pairs of backends that vLLM prefers for models in which the tokens of an image see each other."""

    reason = "vLLM's pairs of attention backends for images read no page tables per KV head"


class InPlaceOfFlashAttention(InPlaceOfAnother):
    """In place of FlashAttention where ``flash_attention_fits`` says no. Valid where FlashAttention itself is."""

    reason = "FlashAttention attends over evicted rows in its versions 2 and 3, and not with a KV cache in fp8"

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        # without --block-size, vLLM would fit the size of blocks to FlashAttention; ours fits Triton
        reasons = FlashAttentionBackend.validate_configuration(*args, **{**kwargs, "block_size": None})
        return reasons or super().validate_configuration(*args, **kwargs)


class InPlaceOfROCm(InPlaceOfAnother):
    """In place of the backends that vLLM has for ROCm alone, those of AITER among them."""

    reason = "vLLM's attention backends for ROCm read no page tables per KV head"


@contextmanager
def cuda_backends(vllm_config: VllmConfig) -> Iterator[None]:
    """Layers built inside this context use ours where the platform asks for FlashAttention, Triton, FlashInfer or those
    of ROCm.

    Whatever cannot attend over evicted rows is replaced by Triton attention, for all layers of the engine alike: those
    of one cache group must share a backend. Asked for ``CUSTOM``, it gets xformers, unless somebody else has registered
    a backend under that name.
    """
    flash_attention = EvictionFlashBackend if flash_attention_fits(vllm_config) else InPlaceOfFlashAttention
    ours: dict[AttentionBackendEnum, type[EvictionBackend] | str] = {
        AttentionBackendEnum.FLASH_ATTN: flash_attention,
        AttentionBackendEnum.TRITON_ATTN: EvictionTritonBackend,
        AttentionBackendEnum.FLASHINFER: InPlaceOfFlashInfer,
        AttentionBackendEnum.TRITON_FLASH_ATTN: InPlaceOfComposite,
        AttentionBackendEnum.TRITON_FLASHINFER: InPlaceOfComposite,
        **dict.fromkeys(_OF_ROCM, InPlaceOfROCm),
    }
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        ours[AttentionBackendEnum.CUSTOM] = XFORMERS
    with ExitStack() as stack:
        for name, backend in ours.items():
            stack.enter_context(backend_in_place_of(name, backend))
        yield


def check_backends(layers: Iterable[Any]) -> None:
    """Say, once for all workers, where Triton attention has taken the place of what was chosen.

    layers: a model's attention layers

    Raises ValueError if a decoder layer has a backend that is none of ours.
    """
    backends = [layer.get_attn_backend() for layer in layers if layer.impl.attn_type == AttentionType.DECODER]
    for backend in backends:
        if not issubclass(backend, EvictionBackend):
            raise ValueError(
                f"--kv-eviction does not work with the attention backend {backend.get_name()}; use --attention-backend "
                f"FLASH_ATTN or TRITON_ATTN or leave --kv-eviction out"
            )
    reasons = sorted({backend.reason for backend in backends if issubclass(backend, InPlaceOfAnother)})
    if reasons and is_global_first_rank():
        logger.warning("%s: Triton attention takes its place", " and ".join(reasons))
