"""What tests of kernels that read keys through the page table share: scrambled pages, and each way to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.gpu import HAS_GPU, on_gpu
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.optional_triton import tl

# of a cap and of sinks: both, and one of either
LOGITS = [(1.5, False), (0.0, True), (1.5, True)]
ROUNDING = 1e-5
"""How far a row of probabilities may be from 1, relatively: a few float32 roundings."""
IMPLEMENTATIONS = ["reference", "native-16", "native-8", "native-4", "triton"]


@contextmanager
def implementation(
    name: str, launcher: Callable[..., Any], reference: Callable[..., Any], launch: Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """Yield the function to test; native-16 is AVX-512, native-8 AVX2, native-4 SSE or NEON.

    Triton's runs on the GPU where there is one, else in the interpreter.
    """
    if name == "reference":
        yield reference
        return
    if name == "triton":
        if tl is None:
            pytest.skip("Triton is not installed")
        yield on_gpu(launch) if HAS_GPU else launch
        return
    kernels = library()
    if kernels is None:
        pytest.skip("the CPU kernels are not built: run `python setup.py build_ext --inplace`")
    lanes = int(name.removeprefix("native-"))
    try:
        if kernels.kvevict_limit_lanes(lanes) != lanes:
            pytest.skip(f"this machine has no vectors of {lanes} floats")
        yield launcher
    finally:
        kernels.kvevict_limit_lanes(16)


def probabilities(logits: torch.Tensor, softcap: float, sink: float | torch.Tensor | None) -> torch.Tensor:
    """Return the softmax of logits [*, kv_len], capped, with a sink beside them: the formula, written down.

    sink: of each row, or of all
    """
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    terms = logits.exp()
    beside = 0.0 if sink is None else torch.as_tensor(sink).to(logits.dtype).exp()
    return terms / (terms.sum(-1, keepdim=True) + beside)


def hard_sinks(*shape: int) -> torch.Tensor:
    """Return sinks that differ from head to head, up to those that take most of the attention to a hundred keys."""
    return torch.linspace(-2.0, 7.0, shape[-1]).expand(shape).contiguous()


def scrambled_keys(
    num_kv_heads: int,
    tokens: range,
    block_size: int,
    head_size: int,
    dtype: torch.dtype = torch.float32,
    packing: str = "plain",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys, page table and the dense keys [num_kv_heads, len(tokens), head_size] of ``tokens``.

    Whatever does not belong to them is NaN, and so are the values beside the keys; ids of other pages are out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    first, last = tokens.start // block_size, -(-tokens.stop // block_size)
    num_pages = (last - first) * num_kv_heads + 5
    page_elements = block_size * head_size
    storage = torch.full((num_pages, 2 * page_elements), float("nan"), dtype=dtype)
    if packing == "transposed":
        keys = storage[:, :page_elements].view(num_pages, head_size, block_size).transpose(1, 2)
    else:
        keys = storage.view(num_pages, block_size, 2 * head_size)[:, :, :head_size]
    page_table = torch.full((num_kv_heads, last + 2), 2**60)
    owned = torch.randperm(num_pages, generator=generator)[: (last - first) * num_kv_heads]
    page_table[:, first:last] = owned.view(num_kv_heads, -1)
    dense = torch.randn(num_kv_heads, len(tokens), head_size, generator=generator).to(dtype)
    for index, token in enumerate(tokens):
        keys[page_table[:, token // block_size], token % block_size] = dense[:, index]
    return keys, page_table, dense


def rounding_of_interpreter(query: torch.Tensor, keys: torch.Tensor, scale: float) -> float:
    """Return how far a row of probabilities may be from 1, relatively, in Triton's interpreter: as anywhere, a few
    float32 roundings, and that of a logit.

    A kernel computes a logit twice, in tiles of other shapes. There these are products of NumPy, which rounds them as
    the machine's BLAS does for a shape.

    query: [..., head_size]
    keys:  [..., head_size], numbers only
    """
    most = float(query.norm(dim=-1).max() * keys.norm(dim=-1).max()) * scale
    return ROUNDING + torch.finfo(torch.float32).eps * most
