"""Attention of single queries over rows of pages, by xformers: for GPUs where FlashAttention is missing."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_kvevict.kernels.optional_xformers import PagedBlockDiagonalPaddedKeysMask, SplitK, fmha

DTYPES = (torch.float16, torch.bfloat16)
HEAD_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class PagedRows:
    """What xformers has to know of a batch of rows beside their pages and lengths: their number and their width.

    mask: with lengths of 1
    """

    mask: Any

    @classmethod
    def of(cls, num_rows: int, max_pages: int, block_size: int, device: torch.device) -> PagedRows:
        """Takes time that grows with the rows: to be made once for a batch, not in every layer."""
        table = torch.empty(num_rows, max_pages, dtype=torch.int32, device=device)
        ones = [1] * num_rows
        return cls(PagedBlockDiagonalPaddedKeysMask.from_seqlens(ones, ones, table, block_size, device=device))

    def mask_of(self, page_table: torch.Tensor, kv_lens: torch.Tensor) -> Any:
        lens = replace(self.mask.k_seqinfo, seqlen=kv_lens, max_seqlen=self.mask.k_seqinfo.padding)
        return replace(self.mask, block_tables=page_table, k_seqinfo=lens)


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    rows: PagedRows,
) -> torch.Tensor:
    """Return the attention of the queries of each row over the tokens in its pages.

    query:      [num_rows, num_heads, head_size] float16 | bfloat16, the query heads of one KV head
    keys:       [num_pages, block_size, head_size], dtype of the query, tokens at one distance from each other in all of
                the pool, last dimension contiguous
    values:     likewise
    page_table: [num_rows, max_pages] int32; entries past ceil(kv_len / block_size) are never read
    kv_lens:    [num_rows] int32, at least 1
    rows:       ``PagedRows.of`` as many rows and pages
    returns:    [num_rows, num_heads, head_size], dtype of the query

    xformers' split-K kernel, which is Triton, on a GPU of compute capability 8.0 or newer.

    Raises ImportError if xformers is not installed, ValueError for what its kernel does not take.
    """
    if query.dtype not in DTYPES or query.shape[2] not in HEAD_SIZES:
        raise ValueError(
            f"`query`: expected {' or '.join(map(str, DTYPES))} and a head size of "
            f"{', '.join(map(str, HEAD_SIZES))}, got {query.dtype} and {query.shape[2]}."
        )
    num_heads, block_size = query.shape[1], keys.shape[1]
    # [1, num_slots, 1 (KV head), num_heads, head_size]: the query heads of a KV head read the same memory
    flat = [kv.flatten(0, 1)[None, :, None, None].expand(-1, -1, -1, num_heads, -1) for kv in (keys, values)]
    inputs = fmha.Inputs(query[None, :, None], *flat, attn_bias=rows.mask_of(page_table, kv_lens), scale=scale)
    # not through xformers' dispatcher: it asks for compiled code of this very torch, which the Triton kernel is not of
    attended: torch.Tensor = _operator(block_size).apply(inputs, needs_gradient=False)[0]
    return attended.reshape(query.shape)


@functools.cache
def _operator(block_size: int) -> Any:
    """xformers' operator with a tile of keys that divides a page."""
    return type(f"SplitK{block_size}", (SplitK,), {"BLOCK_N": math.gcd(SplitK.BLOCK_N, block_size)})


def paged_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    rows: PagedRows | None = None,
) -> torch.Tensor:
    """The definition of ``paged_attention`` in plain torch, float32: same arguments, of any dtype, and result."""
    attended = torch.empty_like(query)
    for row, kv_len in enumerate(kv_lens.tolist()):
        pages = page_table[row, : -(-kv_len // keys.shape[1])].long()
        k, v = (kv[pages].flatten(0, 1)[:kv_len].float() for kv in (keys, values))
        attended[row] = ((query[row].float() @ k.T * scale).softmax(-1) @ v).to(query.dtype)
    return attended
