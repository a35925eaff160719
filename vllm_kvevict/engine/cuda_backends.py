"""On CUDA: our attention backends in place of those that the platform would choose. Not run on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvevict.engine.attention import EvictionBackend, backend_in_place_of
from vllm_kvevict.engine.flash_backend import EvictionFlashBackend
from vllm_kvevict.engine.triton_backend import EvictionTritonBackend

logger = logging.getLogger("vllm.kvevict")

XFORMERS = "vllm_kvevict.engine.xformers_backend.EvictionXformersBackend"  # imported only where it is asked for


class InPlaceOfFlashInfer(EvictionTritonBackend):
    """Triton attention where FlashInfer was chosen, whose plans know one page table for all heads of a request."""


@contextmanager
def cuda_backends() -> Iterator[None]:
    """Layers built inside this context use ours where the platform asks for FlashAttention, Triton or FlashInfer.

    Asked for ``CUSTOM``, it gets xformers, unless somebody else has registered a backend under that name.
    """
    with ExitStack() as stack:
        stack.enter_context(backend_in_place_of(AttentionBackendEnum.FLASH_ATTN, EvictionFlashBackend))
        stack.enter_context(backend_in_place_of(AttentionBackendEnum.TRITON_ATTN, EvictionTritonBackend))
        stack.enter_context(backend_in_place_of(AttentionBackendEnum.FLASHINFER, InPlaceOfFlashInfer))
        if not AttentionBackendEnum.CUSTOM.is_overridden():
            stack.enter_context(backend_in_place_of(AttentionBackendEnum.CUSTOM, XFORMERS))
        yield


def check_backends(layers: Iterable[Any]) -> None:
    """Say where another backend was taken than the platform chose.

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
    if any(issubclass(backend, InPlaceOfFlashInfer) for backend in backends):
        logger.warning("FlashInfer reads no page tables per KV head: Triton attention takes its place")
