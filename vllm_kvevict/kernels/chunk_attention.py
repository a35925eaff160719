"""Attention that the tokens of chunks receive from each other, uncausal, read through the page table."""

from __future__ import annotations

from typing import Any, Literal

import torch

from vllm_kvevict.kernels.chunk_batch import check_arguments, check_chunk
from vllm_kvevict.kernels.native import function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import DTYPE_CODES, LOG2_E, check_contiguous
from vllm_kvevict.kernels.streaming_sums import (
    BLOCK_TOKENS,
    NUM_WARPS,
    UNALIGNED,
    VARYING,
    attention_arguments,
    attention_constants,
    load_chunk,
    load_keys,
    load_queries,
    pages_of,
    row_log_sums,
)
from vllm_kvevict.kernels.streaming_sums import triton_signatures as attention_signatures

_COLUMN_ROWS = 32  # rows of a tile in the pass over the columns; twice as many spill registers on sm_80


def _empty_received(query: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    return query.new_empty(page_table.shape[1], len(query), dtype=torch.float32)


@operator(
    "(Tensor query, Tensor keys, Tensor page_table, Tensor chunks, SymInt max_chunk, float scale, str reduction) "
    "-> Tensor",
    fake=lambda query, keys, page_table, *arguments: _empty_received(query, page_table),
)
def chunk_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    page_table: torch.Tensor,
    chunks: torch.Tensor,
    max_chunk: int,
    scale: float,
    reduction: Literal["mean", "max"],
) -> torch.Tensor:
    """Return the softmax attention that every token of a chunk receives from all tokens of it, later ones included.

    query:      [num_tokens, num_heads, head_size] float32 | bfloat16 | float16, RoPE applied, last dimension
                contiguous: tokens of several requests
    keys:       [num_pages, block_size, head_size], dtype of the query or float8_e4m3fn | float8_e5m2, RoPE applied: a
                view of the whole pool of pages. The token or the head_size dimension is contiguous
    page_table: [num_reqs, num_kv_heads, max_pages] int64, page id of each logical page of each KV head, rows
                contiguous. Slots outside of the chunks are never read
    chunks:     [num_chunks, 4] int64, contiguous; of each chunk the row of the page table, the cache index of its first
                token, its first row in ``query`` and how many tokens it has, in rows one behind another. No row is in
                two chunks. There may be no chunk
    max_chunk:  tokens of the longest chunk, or more
    scale:      of the logits; times what stored keys are to be multiplied by, if anything
    reduction:  over the query heads of a KV head, of the attention summed over the queries
    returns:    [num_kv_heads, num_tokens] float32; a head's "mean" sums to the length of a chunk. What is not in a
                chunk is anything

    CPU tensors use csrc/cpu/chunk_attention.cpp where it was built, else ``chunk_attention_reference``; CUDA tensors
    use Triton. The C++ holds 2 MiB for each thread or less, and 4 floats for each query head and token of the longest
    chunk; Triton one float for each query head and token. The result of a chunk depends neither on the others nor on
    the number of threads.

    Raises ValueError for a wrong shape, dtype, device, stride or reduction and, on CPU, for a wrong chunk or a page id
    outside the pool, which would have to wait for a GPU; MemoryError if the scratch memory cannot be had.
    """
    check_arguments(query, keys, page_table)
    check_contiguous("chunks", chunks, (len(chunks), 4), torch.int64, query.device)
    if reduction not in ("mean", "max"):
        raise ValueError(f"`reduction`: expected 'mean' or 'max', got {reduction!r}.")
    if query.device.type != "cpu":
        return _launch(query, keys, page_table, chunks, max_chunk, scale, reduction)
    check_lengths(query, keys, page_table, chunks, max_chunk)
    kernel = function("kvevict_chunk_attention", query.device)
    if kernel is None:
        return chunk_attention_reference(query, keys, page_table, chunks, max_chunk, scale, reduction)
    num_tokens, num_heads, head_size = query.shape
    received = _empty_received(query, page_table)
    status = kernel(
        query.data_ptr(), *query.stride()[:2],
        keys.data_ptr(), *keys.stride(),
        page_table.data_ptr(), *page_table.stride()[:2],
        chunks.data_ptr(), received.data_ptr(),
        DTYPE_CODES[query.dtype], DTYPE_CODES[keys.dtype],
        len(chunks), max_chunk, num_tokens, num_heads, page_table.shape[1], head_size, keys.shape[1],
        scale, reduction == "max",
    )  # fmt: skip
    if status != 0:
        raise MemoryError(f"chunk_attention: no scratch memory for {num_heads} heads and {max_chunk} tokens.")
    return received


def check_lengths(
    query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, chunks: torch.Tensor, max_chunk: int
) -> None:
    """Raise ValueError unless every chunk and every page id that is read is as documented."""
    for req, start, row, length in chunks.tolist():
        if not 0 <= req < len(page_table):
            raise ValueError(f"`chunks`: expected rows 0 to {len(page_table) - 1} of the page table, got {req}.")
        if length > max_chunk:
            raise ValueError(f"`max_chunk`: expected at least {length}, got {max_chunk}.")
        check_chunk(query, keys, page_table[req], range(row, row + length), range(start, start + length))


def _launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    page_table: torch.Tensor,
    chunks: torch.Tensor,
    max_chunk: int,
    scale: float,
    reduction: Literal["mean", "max"],
) -> torch.Tensor:
    """Run the Triton kernels: the sums of the softmax row by row, then the columns, tile of keys by tile of keys."""
    num_tiles = triton.cdiv(max_chunk, BLOCK_TOKENS)
    log_sums = row_log_sums(query, keys, page_table, chunks, None, len(chunks), max_chunk, scale)
    received = _empty_received(query, page_table)
    constants = attention_constants(query, keys, page_table) | {"BLOCK_ROWS": _COLUMN_ROWS}
    _received_kernel[num_tiles * len(chunks), page_table.shape[1]](
        *attention_arguments(query, keys, page_table), log_sums,
        chunks, num_tiles, scale * LOG2_E,
        received,
        TAKE_MAX=reduction == "max", **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return received


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _received_kernel(
    query, keys, page_table,
    query_stride_token, query_stride_head, key_stride_page, key_stride_token, key_stride_dim,
    table_stride_req, table_stride_head, num_tokens, head_size,
    log_sums,
    chunks, num_tiles, scale,
    received,
    TAKE_MAX: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # one program: one tile of keys of one KV head, against the queries of all its query heads, one after the other
    kv_head = tl.program_id(1)
    first_column, chunk = tl.program_id(0) % num_tiles * BLOCK_TOKENS, (tl.program_id(0) // num_tiles).to(tl.int64)
    req, begin, first_query, num_queries = load_chunk(chunks, chunk)
    if first_column >= num_queries:
        return
    column = first_column + tl.arange(0, BLOCK_TOKENS)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    pages = pages_of(page_table, table_stride_req, table_stride_head, req, kv_head)
    key = load_keys(
        keys, pages, key_stride_page, key_stride_token, key_stride_dim, head_size, begin + column,
        column < num_queries, dim, BLOCK_SIZE,
    )  # fmt: skip
    query += first_query * query_stride_token
    first_place = kv_head.to(tl.int64) * num_tokens + first_query
    log_sums += first_place * GROUP
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
            log_sum = tl.load(log_sums + token * GROUP + in_group, mask=live, other=0.0)
            # masked before the subtraction: fused with the scale it would not round as the logits in log_sum did
            logits = tl.where(live[:, None], logits, float("-inf"))
            total += tl.sum(tl.exp2(logits - log_sum[:, None]), axis=0)
        if TAKE_MAX:
            reduced = tl.maximum(reduced, total, propagate_nan=tl.PropagateNan.ALL)
        else:
            reduced += total / GROUP
    tl.store(received + first_place + column, reduced, mask=column < num_queries)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Return how the kernels are compiled for bfloat16, a head size of 128, groups of 4 and pages of 16 tokens."""
    (log_sums_kernel, types, constants, num_warps), (*_, shared, _) = attention_signatures()
    of_columns, shared = types | {"received": "*fp32"}, shared | {"BLOCK_ROWS": _COLUMN_ROWS}
    del shared["SOFTCAP"]  # these chunks are no attention of the model's
    return [
        (log_sums_kernel, types, constants | {"kv_start_loc": None, "sinks": None}, num_warps),
        (_received_kernel, of_columns, shared | {"TAKE_MAX": False}, num_warps),
        (_received_kernel, of_columns, shared | {"TAKE_MAX": True}, num_warps),
    ]


def chunk_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    page_table: torch.Tensor,
    chunks: torch.Tensor,
    max_chunk: int,
    scale: float,
    reduction: Literal["mean", "max"],
) -> torch.Tensor:
    """The definition of ``chunk_attention`` in plain torch, float32: same arguments and result."""
    received = _empty_received(query, page_table)
    for req, start, row, length in chunks.tolist():
        if length:
            total = _sum_attention(query[row : row + length], keys, page_table[req], start, scale)
            received[:, row : row + length] = total.amax(dim=1) if reduction == "max" else total.mean(dim=1)
    return received


def _sum_attention(
    query: torch.Tensor, keys: torch.Tensor, pages: torch.Tensor, start: int, scale: float
) -> torch.Tensor:
    """Return [num_kv_heads, group, chunk], what the tokens of one chunk receive from each query head."""
    chunk, block_size, first = len(query), keys.shape[1], start // keys.shape[1]
    read = pages[:, first : -(-(start + chunk) // block_size)]
    begin = start - first * block_size
    gathered = keys[read].flatten(1, 2)[:, begin : begin + chunk].float()  # [num_kv_heads, chunk, head_size]
    # [num_kv_heads, group * chunk, head_size]
    grouped = query.float().transpose(0, 1).unflatten(0, (len(pages), -1)).flatten(1, 2)
    logits = grouped @ gathered.transpose(1, 2) * scale  # [num_kv_heads, group * chunk, chunk]
    received: torch.Tensor = logits.softmax(-1).unflatten(1, (-1, chunk)).sum(dim=2)
    return received
