"""Attention that a chunk of queries pays to each cached key, read through the page table and added to running sums."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvevict.kernels.native import function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import (
    DTYPE_CODES,
    LOG2_E,
    check_groups,
    check_keys_of,
    check_page_ids,
    check_page_table,
    check_query,
)

# Queries that the reference looks at in one go, so that its memory does not grow with the chunk.
REFERENCE_QUERIES = 256
# Sums that the CPU kernel adds to side by side, at least: what its threads have to share.
LEAST_PARTS = 16
# Of the Triton kernels: rows of queries and keys of a tile.
BLOCK_ROWS, BLOCK_TOKENS, NUM_WARPS = 64, 64, 8
# What differs from request to request and from chunk to chunk: a kernel is compiled for none of it.
VARYING = ("table_stride_head", "num_queries", "begin", "end", "kv_len", "sums_stride_head")
UNALIGNED = ("page_table", "sums")  # views into tables of all layers


@operator(
    "(Tensor query, Tensor keys, Tensor page_table, SymInt kv_len, float scale, Tensor(a!) sums) -> ()",
    fake=lambda *arguments: None,
)
def streaming_sums(
    query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, kv_len: int, scale: float, sums: torch.Tensor
) -> None:
    """In place: add to ``sums`` the softmax attention that every query of a chunk pays to every key up to itself.

    query:      [num_queries, num_heads, head_size] float32 | bfloat16 | float16, RoPE applied, last dimension
                contiguous. Query i is the token at cache index kv_len - num_queries + i
    keys:       [num_pages, block_size, head_size], dtype of the query or float8_e4m3fn | float8_e5m2, RoPE applied: a
                view of the whole pool of pages. The token or the head_size dimension is contiguous
    page_table: [num_kv_heads, max_pages] int64, page id of each logical page of each KV head. Entries past
                ceil(kv_len / block_size) and slots past kv_len are never read
    kv_len:     tokens in the cache, at least num_queries
    scale:      softmax scale; times what stored keys are to be multiplied by, if anything
    sums:       [num_kv_heads, kv_len] float32, rows contiguous; grows by the mean over the query heads of each group,
                num_queries in total for each KV head

    Nothing of the size [num_queries, kv_len] is made. CPU tensors use csrc/cpu/streaming_sums.cpp where it was built,
    which holds num_kv_heads + 15 floats or fewer for each token, and 2 MiB or less for each thread; CUDA tensors the
    Triton kernels, with one float for each query head and query. Everything else uses ``streaming_sums_reference``.
    Results do not depend on the number of threads.

    Raises ValueError for a wrong shape, dtype, device or stride, or a page id outside the pool; MemoryError if the
    scratch memory cannot be had.
    """
    check_arguments(query, keys, page_table, 0, kv_len)
    expected = (page_table.shape[0], kv_len)
    if sums.shape != expected or sums.dtype != torch.float32 or sums.stride(1) != 1 or sums.device != query.device:
        raise ValueError(
            f"`sums`: expected float32 {expected} with contiguous rows on {query.device}, "
            f"got {sums.dtype} {tuple(sums.shape)} on {sums.device}, strides {sums.stride()}."
        )
    if query.device.type == "cuda":
        return _launch(query, keys, page_table, kv_len, scale, sums)
    kernel = function("kvevict_streaming_sums", query.device)
    if kernel is None:
        return streaming_sums_reference(query, keys, page_table, kv_len, scale, sums)
    num_queries, num_heads, head_size = query.shape
    parts_per_head = -(-LEAST_PARTS // len(page_table))
    columns = torch.empty(len(page_table), parts_per_head, kv_len, dtype=torch.float32)
    status = kernel(
        query.data_ptr(), *query.stride()[:2],
        keys.data_ptr(), *keys.stride(),
        page_table.data_ptr(), page_table.stride(0),
        sums.data_ptr(), sums.stride(0), columns.data_ptr(), parts_per_head,
        DTYPE_CODES[query.dtype], DTYPE_CODES[keys.dtype],
        num_queries, num_heads, page_table.shape[0], head_size, keys.shape[1], kv_len, scale,
    )  # fmt: skip
    if status != 0:
        raise MemoryError(f"streaming_sums: no scratch memory for {num_heads} heads and {kv_len} tokens.")


def check_arguments(query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, first: int, kv_len: int) -> None:
    """Raise ValueError unless they are as ``streaming_sums`` documents them; ``first``: the first token read."""
    check_query(query, "num_queries", "num_heads", "head_size")
    check_keys_of(query, keys)
    check_page_table(page_table, query.device)
    num_queries, num_heads, _ = query.shape
    check_groups(num_heads, len(page_table))
    block_size = keys.shape[1]
    max_kv_len = page_table.shape[1] * block_size
    if first < 0 or not first + num_queries <= kv_len <= max_kv_len:
        raise ValueError(
            f"`query`: expected {num_queries} tokens among {max_kv_len} of the page table, got {first} to {kv_len}."
        )
    check_page_ids(page_table[:, first // block_size : -(-kv_len // block_size)], len(keys))


def _launch(
    query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, kv_len: int, scale: float, sums: torch.Tensor
) -> None:
    """Run the Triton kernels: the sums of the softmax row by row, then the columns, tile of keys by tile of keys."""
    log_sums = row_log_sums(query, keys, page_table, 0, kv_len, scale, causal=True)
    _column_sums_kernel[(triton.cdiv(kv_len, BLOCK_TOKENS), len(page_table))](
        *attention_arguments(query, keys, page_table), log_sums,
        sums, sums.stride(0),
        kv_len, scale * LOG2_E, **attention_constants(query, keys, page_table), num_warps=NUM_WARPS,
    )  # fmt: skip


def row_log_sums(
    query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, begin: int, end: int, scale: float, causal: bool
) -> torch.Tensor:
    """Return [num_kv_heads, num_queries * group] float32, log2 of the softmax sum of each query, by Triton.

    The queries are the last ones of tokens ``begin`` to ``end``, to which the softmax is confined; the heads of a group
    are side by side.
    """
    num_rows = query.shape[0] * query.shape[1] // len(page_table)
    log_sums = torch.empty(len(page_table), num_rows, dtype=torch.float32, device=query.device)
    _log_sums_kernel[(triton.cdiv(num_rows, BLOCK_ROWS), len(page_table))](
        *attention_arguments(query, keys, page_table), log_sums,
        begin, end, scale * LOG2_E, CAUSAL=causal, **attention_constants(query, keys, page_table), num_warps=NUM_WARPS,
    )  # fmt: skip
    return log_sums


def attention_arguments(query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor) -> tuple[Any, ...]:
    """Return what the kernels here and in chunk_attention.py begin with."""
    strides = (*query.stride()[:2], *keys.stride(), page_table.stride(0))
    return query, keys, page_table, *strides, query.shape[0], query.shape[2]


def attention_constants(query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor) -> dict[str, int]:
    """Return the constants that they share."""
    return {
        "GROUP": query.shape[1] // len(page_table),
        "BLOCK_SIZE": keys.shape[1],
        "HEAD_SIZE_PADDED": max(16, triton.next_power_of_2(query.shape[2])),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "UPCAST": query.device.type == "cpu",  # Triton's interpreter cannot multiply bfloat16
    }


@triton.jit
def load_keys(
    keys, page_table, key_stride_page, key_stride_token, key_stride_dim, table_stride_head, head_size,
    kv_head, index, live, dim,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Return [HEAD_SIZE_PADDED, BLOCK_TOKENS], the keys at cache indices ``index``, zeros where they are not live."""
    # int64 before any multiply: a big pool overflows int32 element offsets
    page = tl.load(page_table + kv_head * table_stride_head + index // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    place = page * key_stride_page + (index % BLOCK_SIZE) * key_stride_token
    mask = live[None, :] & (dim < head_size)[:, None]
    return tl.load(keys + place[None, :] + dim[:, None] * key_stride_dim, mask=mask, other=0.0)


@triton.jit
def load_queries(
    query, query_stride_token, query_stride_head, head_size, token, head, live, dim, UPCAST: tl.constexpr
):  # fmt: skip
    """Return [BLOCK_ROWS, HEAD_SIZE_PADDED], the queries of ``token`` and ``head``, zeros where they are not live."""
    place = token.to(tl.int64) * query_stride_token + head * query_stride_head
    mask = live[:, None] & (dim < head_size)[None, :]
    queries = tl.load(query + place[:, None] + dim[None, :], mask=mask, other=0.0)
    return queries.to(tl.float32) if UPCAST else queries


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _log_sums_kernel(
    query, keys, page_table,
    query_stride_token, query_stride_head, key_stride_page, key_stride_token, key_stride_dim, table_stride_head,
    num_queries, head_size,
    log_sums,
    begin, end, scale,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # one program: one block of rows of one KV head
    kv_head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    num_rows = num_queries * GROUP
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    queries = load_queries(
        query, query_stride_token, query_stride_head, head_size, token, head, row < num_rows, dim, UPCAST
    )
    last_seen = tl.where((row < num_rows) & CAUSAL, end - num_queries + token, end - 1)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    last = end
    if CAUSAL:
        last = tl.minimum(end, end - num_queries + (tl.program_id(0) * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP + 1)
    for first in range(begin, last, BLOCK_TOKENS):
        index = first + tl.arange(0, BLOCK_TOKENS)
        key = load_keys(
            keys, page_table, key_stride_page, key_stride_token, key_stride_dim, table_stride_head, head_size,
            kv_head, index, index < end, dim, BLOCK_SIZE,
        )  # fmt: skip
        logits = tl.dot(queries, key.to(queries.dtype), input_precision="ieee") * scale
        # every row sees the first key, so no maximum stays infinite
        logits = tl.where(index[None, :] <= last_seen[:, None], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), axis=1)
        row_max = new_max
    tl.store(log_sums + kv_head * num_rows + row, row_max + tl.log2(row_sum), mask=row < num_rows)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _column_sums_kernel(
    query, keys, page_table,
    query_stride_token, query_stride_head, key_stride_page, key_stride_token, key_stride_dim, table_stride_head,
    num_queries, head_size,
    log_sums,
    sums, sums_stride_head,
    kv_len, scale,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # one program: one tile of keys of one KV head, against the queries that see any of it
    kv_head = tl.program_id(1)
    index = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    key = load_keys(
        keys, page_table, key_stride_page, key_stride_token, key_stride_dim, table_stride_head, head_size,
        kv_head, index, index < kv_len, dim, BLOCK_SIZE,
    )  # fmt: skip
    num_rows = num_queries * GROUP
    first_query = kv_len - num_queries
    first_row = tl.maximum(tl.program_id(0) * BLOCK_TOKENS - first_query, 0) * GROUP
    received = tl.zeros([BLOCK_TOKENS], tl.float32)
    for start in range(first_row, num_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        token = row // GROUP
        live = row < num_rows
        head = kv_head * GROUP + row % GROUP
        queries = load_queries(
            query, query_stride_token, query_stride_head, head_size, token, head, live, dim, UPCAST
        )  # fmt: skip
        logits = tl.dot(queries, key.to(queries.dtype), input_precision="ieee") * scale
        log_sum = tl.load(log_sums + kv_head * num_rows + row, mask=live, other=0.0)
        seen = live[:, None] & (index[None, :] <= first_query + token[:, None])
        # masked before the subtraction: fused with the scale it would not round as the logits in log_sum did
        logits = tl.where(seen, logits, float("-inf"))
        received += tl.sum(tl.exp2(logits - log_sum[:, None]), axis=0)
    out = sums + kv_head * sums_stride_head + index
    tl.store(out, tl.load(out, mask=index < kv_len, other=0.0) + received / GROUP, mask=index < kv_len)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Return how the kernels are compiled for bfloat16, a head size of 128, groups of 4 and pages of 16 tokens."""
    constants = {
        "GROUP": 4, "BLOCK_SIZE": 16, "HEAD_SIZE_PADDED": 128, "UPCAST": False,
        "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_TOKENS": BLOCK_TOKENS,
    }  # fmt: skip
    types = dict.fromkeys(_column_sums_kernel.arg_names[:11], "i32")
    types |= {"query": "*bf16", "keys": "*bf16", "page_table": "*i64", "log_sums": "*fp32"}
    of_rows = {"begin": "i32", "end": "i32", "scale": "fp32"}
    of_columns = {"sums": "*fp32", "sums_stride_head": "i32", "kv_len": "i32", "scale": "fp32"}
    return [
        (_log_sums_kernel, types | of_rows, constants | {"CAUSAL": True}, NUM_WARPS),
        (_column_sums_kernel, types | of_columns, constants, NUM_WARPS),
    ]


def streaming_sums_reference(
    query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor, kv_len: int, scale: float, sums: torch.Tensor
) -> None:
    """In place: the definition of ``streaming_sums`` in plain torch, float32, same arguments."""
    num_kv_heads, num_queries = len(page_table), len(query)
    gathered = keys[page_table[:, : -(-kv_len // keys.shape[1])]].flatten(1, 2)[:, None, :kv_len].float()
    # [num_kv_heads, group, num_queries, head_size]
    grouped = query.float().transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    for start in range(0, num_queries, REFERENCE_QUERIES):
        piece = grouped[:, :, start : start + REFERENCE_QUERIES]
        last_seen = torch.arange(start, start + piece.shape[2], device=query.device) + kv_len - num_queries
        num_seen = kv_len - num_queries + start + piece.shape[2]
        logits = piece @ gathered[:, :, :num_seen].transpose(2, 3) * scale  # [num_kv_heads, group, piece, num_seen]
        hidden = torch.arange(num_seen, device=query.device) > last_seen[:, None]
        sums[:, :num_seen] += logits.masked_fill(hidden, float("-inf")).softmax(-1).sum(dim=2).mean(dim=1)
