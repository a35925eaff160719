"""Attention that the tokens of a chunk receive from each other, uncausal, read through the page table."""

from __future__ import annotations

from typing import Any, Literal

import torch

from vllm_kvevict.kernels.native import function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import DTYPE_CODES, LOG2_E
from vllm_kvevict.kernels.streaming_sums import (
    BLOCK_TOKENS,
    NUM_WARPS,
    UNALIGNED,
    VARYING,
    attention_arguments,
    attention_constants,
    check_arguments,
    load_keys,
    load_queries,
    row_log_sums,
)
from vllm_kvevict.kernels.streaming_sums import triton_signatures as attention_signatures

_COLUMN_ROWS = 32  # rows of a tile in the pass over the columns; twice as many spill registers on sm_80


@operator(
    "(Tensor query, Tensor keys, Tensor page_table, SymInt start, float scale, str reduction) -> Tensor",
    fake=lambda query, keys, page_table, *arguments: query.new_empty(
        len(page_table), query.shape[0], dtype=torch.float32
    ),
)
def chunk_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    page_table: torch.Tensor,
    start: int,
    scale: float,
    reduction: Literal["mean", "max"],
) -> torch.Tensor:
    """Return the softmax attention that every token of a chunk receives from all tokens of it, later ones included.

    query:      [chunk, num_heads, head_size] float32 | bfloat16 | float16, RoPE applied, last dimension contiguous.
                Query i is the token at cache index start + i
    keys:       [num_pages, block_size, head_size], dtype of the query or float8_e4m3fn | float8_e5m2, RoPE applied: a
                view of the whole pool of pages. The token or the head_size dimension is contiguous
    page_table: [num_kv_heads, max_pages] int64, page id of each logical page of each KV head. Slots outside of the
                chunk are never read
    start:      cache index of the chunk's first token
    scale:      of the logits; times what stored keys are to be multiplied by, if anything
    reduction:  over the query heads of a KV head, of the attention summed over the queries
    returns:    [num_kv_heads, chunk] float32; a head's "mean" sums to chunk

    CPU tensors use csrc/cpu/chunk_attention.cpp where it was built, whose scratch memory is 2 MiB for each thread or
    less, and 4 floats for each query head and token; CUDA tensors the Triton kernels, with 2 floats for each query head
    and token. Everything else uses ``chunk_attention_reference``.

    Raises ValueError for a wrong shape, dtype, device, stride or reduction, or a page id outside the pool; MemoryError
    if the scratch memory cannot be had.
    """
    check_arguments(query, keys, page_table, start, start + len(query))
    if reduction not in ("mean", "max"):
        raise ValueError(f"`reduction`: expected 'mean' or 'max', got {reduction!r}.")
    if query.device.type == "cuda":
        return _launch(query, keys, page_table, start, scale, reduction)
    kernel = function("kvevict_chunk_attention", query.device)
    if kernel is None:
        return chunk_attention_reference(query, keys, page_table, start, scale, reduction)
    chunk, num_heads, head_size = query.shape
    received = torch.empty(len(page_table), chunk, dtype=torch.float32)
    status = kernel(
        query.data_ptr(), *query.stride()[:2],
        keys.data_ptr(), *keys.stride(),
        page_table.data_ptr(), page_table.stride(0),
        received.data_ptr(),
        DTYPE_CODES[query.dtype], DTYPE_CODES[keys.dtype],
        chunk, num_heads, page_table.shape[0], head_size, keys.shape[1], start, scale, reduction == "max",
    )  # fmt: skip
    if status != 0:
        raise MemoryError(f"chunk_attention: no scratch memory for {num_heads} heads and {chunk} tokens.")
    return received


def _launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    page_table: torch.Tensor,
    start: int,
    scale: float,
    reduction: Literal["mean", "max"],
) -> torch.Tensor:
    """Run the Triton kernels: the sums of the softmax row by row, then the columns, tile of keys by tile of keys."""
    chunk = len(query)
    log_sums = row_log_sums(query, keys, page_table, start, start + chunk, scale, causal=False)
    received = torch.empty(len(page_table), chunk, dtype=torch.float32, device=query.device)
    constants = attention_constants(query, keys, page_table) | {"BLOCK_ROWS": _COLUMN_ROWS}
    _received_kernel[(triton.cdiv(chunk, BLOCK_TOKENS), len(page_table))](
        *attention_arguments(query, keys, page_table), log_sums,
        received,
        start, scale * LOG2_E,
        TAKE_MAX=reduction == "max", **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return received


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _received_kernel(
    query, keys, page_table,
    query_stride_token, query_stride_head, key_stride_page, key_stride_token, key_stride_dim, table_stride_head,
    num_queries, head_size,
    log_sums,
    received,
    begin, scale,
    TAKE_MAX: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # one program: one tile of keys of one KV head, against the queries of all its query heads, one after the other
    kv_head = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    key = load_keys(
        keys, page_table, key_stride_page, key_stride_token, key_stride_dim, table_stride_head, head_size,
        kv_head, begin + column, column < num_queries, dim, BLOCK_SIZE,
    )  # fmt: skip
    reduced = tl.zeros([BLOCK_TOKENS], tl.float32)
    for in_group in range(GROUP):
        total = tl.zeros([BLOCK_TOKENS], tl.float32)
        for first in range(0, num_queries, BLOCK_ROWS):
            token = first + tl.arange(0, BLOCK_ROWS)
            live = token < num_queries
            head = kv_head * GROUP + in_group
            queries = load_queries(
                query, query_stride_token, query_stride_head, head_size, token, head, live, dim, UPCAST
            )  # fmt: skip
            logits = tl.dot(queries, key.to(queries.dtype), input_precision="ieee") * scale
            log_sum = tl.load(log_sums + (kv_head * num_queries + token) * GROUP + in_group, mask=live, other=0.0)
            # masked before the subtraction: fused with the scale it would not round as the logits in log_sum did
            logits = tl.where(live[:, None], logits, float("-inf"))
            total += tl.sum(tl.exp2(logits - log_sum[:, None]), axis=0)
        if TAKE_MAX:
            reduced = tl.maximum(reduced, total, propagate_nan=tl.PropagateNan.ALL)
        else:
            reduced += total / GROUP
    tl.store(received + kv_head * num_queries + column, reduced, mask=column < num_queries)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Return how the kernels are compiled for bfloat16, a head size of 128, groups of 4 and pages of 16 tokens."""
    (log_sums_kernel, types, constants, num_warps), (*_, shared, _) = attention_signatures()
    of_columns, shared = types | {"received": "*fp32"}, shared | {"BLOCK_ROWS": _COLUMN_ROWS}
    return [
        (log_sums_kernel, types, constants | {"CAUSAL": False}, num_warps),
        (_received_kernel, of_columns, shared | {"TAKE_MAX": False}, num_warps),
        (_received_kernel, of_columns, shared | {"TAKE_MAX": True}, num_warps),
    ]


def chunk_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    page_table: torch.Tensor,
    start: int,
    scale: float,
    reduction: Literal["mean", "max"],
) -> torch.Tensor:
    """The definition of ``chunk_attention`` in plain torch, float32: same arguments and result."""
    chunk, block_size, first = len(query), keys.shape[1], start // keys.shape[1]
    pages = page_table[:, first : -(-(start + chunk) // block_size)]
    begin = start - first * block_size
    gathered = keys[pages].flatten(1, 2)[:, begin : begin + chunk].float()  # [num_kv_heads, chunk, head_size]
    # [num_kv_heads, group * chunk, head_size]
    grouped = query.float().transpose(0, 1).unflatten(0, (len(page_table), -1)).flatten(1, 2)
    logits = grouped @ gathered.transpose(1, 2) * scale  # [num_kv_heads, group * chunk, chunk]
    received = logits.softmax(-1).unflatten(1, (-1, chunk)).sum(dim=2)
    reduced: torch.Tensor = received.amax(dim=1) if reduction == "max" else received.mean(dim=1)
    return reduced
