"""Attention that chunks of queries pay to each cached key, read through the page table and added to running sums."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvevict.kernels.chunk_batch import ChunkBatch, check_batch, check_lengths, requests
from vllm_kvevict.kernels.native import function, pointers
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import DTYPE_CODES, LOG2_E, capped, softmax_with_sinks
from vllm_kvevict.kernels.paged_tiles import add_sink, cap_logits

# Queries that the reference looks at in one go, so that its memory does not grow with the chunk.
REFERENCE_QUERIES = 256
# Sums that the CPU kernel adds to side by side, at least: what its threads have to share.
LEAST_PARTS = 16
# Of the Triton kernels: rows of queries and keys of a tile.
BLOCK_ROWS, BLOCK_TOKENS, NUM_WARPS = 64, 64, 8
# What differs from batch to batch: a kernel is compiled for none of it.
VARYING = ("table_stride_req", "table_stride_head", "num_tokens", "num_tiles", "sums_stride_head")
UNALIGNED = ("page_table", "query_start_loc", "kv_start_loc", "chunks", "sums")  # views into larger tensors


@operator(
    "(Tensor query, Tensor keys, Tensor page_table, Tensor query_start_loc, Tensor kv_start_loc, SymInt max_query_len, "
    "SymInt max_kv_len, float scale, float softcap, Tensor? sinks, Tensor(a!) sums) -> ()",
    fake=lambda *arguments: None,
    groups={0: ChunkBatch},
)
def streaming_sums(batch: ChunkBatch, sums: torch.Tensor) -> None:
    """In place: add to ``sums`` the softmax attention that every query pays to every key of its request up to itself.

    sums: [num_kv_heads, kv_start_loc[-1]] float32, rows contiguous; grows by the mean over the query heads of each
          group, for each KV head of a request by num_queries in total. That of a request without queries stays as it is

    Nothing of the size [num_queries, kv_len] is made. CPU tensors use csrc/cpu/streaming_sums.cpp where it was built,
    else ``streaming_sums_reference``; CUDA tensors use Triton. The C++ holds num_kv_heads + 15 floats or fewer for each
    token of the longest request, and 2 MiB or less for each thread; Triton one float for each query head and query.
    The result of a request depends neither on the others nor on the number of threads.

    Raises ValueError for a wrong shape, dtype, device or stride and, on CPU, for a wrong length or a page id outside
    the pool, which would have to wait for a GPU; MemoryError if the scratch memory cannot be had.
    """
    query, keys, page_table = batch.query, batch.keys, batch.page_table
    check_batch(batch, sums)
    if query.device.type != "cpu":
        return _launch(batch, sums)
    check_lengths(batch, sums)
    kernel = function("kvevict_streaming_sums", query.device)
    if kernel is None:
        return streaming_sums_reference(batch, sums)
    _, num_heads, head_size = query.shape
    num_reqs, num_kv_heads, _ = page_table.shape
    parts_per_head = -(-LEAST_PARTS // num_kv_heads)
    columns = torch.empty(num_kv_heads, parts_per_head, batch.max_kv_len, dtype=torch.float32)
    status = kernel(
        query.data_ptr(), *query.stride()[:2],
        keys.data_ptr(), *keys.stride(),
        page_table.data_ptr(), *page_table.stride()[:2],
        batch.query_start_loc.data_ptr(), batch.kv_start_loc.data_ptr(),
        sums.data_ptr(), sums.stride(0), columns.data_ptr(), parts_per_head,
        DTYPE_CODES[query.dtype], DTYPE_CODES[keys.dtype],
        num_reqs, num_heads, num_kv_heads, head_size, keys.shape[1], batch.max_kv_len, batch.scale,
        batch.softcap, *pointers(batch.sinks),
    )  # fmt: skip
    if status != 0:
        raise MemoryError(f"streaming_sums: no scratch memory for {num_heads} heads and {batch.max_kv_len} tokens.")


def _launch(batch: ChunkBatch, sums: torch.Tensor) -> None:
    """Run the Triton kernels: the sums of the softmax row by row, then the columns, tile of keys by tile of keys."""
    query, keys, page_table = batch.query, batch.keys, batch.page_table
    num_reqs, num_kv_heads, _ = page_table.shape
    num_tiles = triton.cdiv(batch.max_kv_len, BLOCK_TOKENS)
    softcap = batch.softcap * LOG2_E
    log_sums = row_log_sums(
        query, keys, page_table, batch.query_start_loc, batch.kv_start_loc, num_reqs, batch.max_query_len, batch.scale,
        softcap, batch.sinks,
    )  # fmt: skip
    _column_sums_kernel[num_tiles * num_reqs, num_kv_heads](
        *attention_arguments(query, keys, page_table), log_sums,
        batch.query_start_loc, batch.kv_start_loc, num_tiles, batch.scale * LOG2_E,
        sums, sums.stride(0),
        SOFTCAP=softcap, **attention_constants(query, keys, page_table), num_warps=NUM_WARPS,
    )  # fmt: skip


def row_log_sums(
    query: torch.Tensor,
    keys: torch.Tensor,
    page_table: torch.Tensor,
    chunks: torch.Tensor,
    kv_start_loc: torch.Tensor | None,
    num_chunks: int,
    max_chunk: int,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [num_kv_heads, num_tokens * group] float32, log2 of the softmax sum of each query, by Triton.

    softcap: in units of log 2

    The heads of a group are side by side. ``chunks`` is either that of ``chunk_attention``, whose tokens see each
    other, or the ``query_start_loc`` of a ``ChunkBatch``, to which ``kv_start_loc`` belongs.
    """
    num_tokens, num_heads, _ = query.shape
    num_kv_heads = page_table.shape[1]
    group = num_heads // num_kv_heads
    num_tiles = triton.cdiv(max_chunk * group, BLOCK_ROWS)
    log_sums = torch.empty(num_kv_heads, num_tokens * group, dtype=torch.float32, device=query.device)
    _log_sums_kernel[num_tiles * num_chunks, num_kv_heads](
        *attention_arguments(query, keys, page_table), log_sums,
        chunks, kv_start_loc, sinks, num_tiles, scale * LOG2_E,
        SOFTCAP=softcap, **attention_constants(query, keys, page_table), num_warps=NUM_WARPS,
    )  # fmt: skip
    return log_sums


def attention_arguments(query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor) -> tuple[Any, ...]:
    """Return what the kernels here and in chunk_attention.py begin with."""
    strides = (*query.stride()[:2], *keys.stride(), *page_table.stride()[:2])
    return query, keys, page_table, *strides, query.shape[0], query.shape[2]


def attention_constants(query: torch.Tensor, keys: torch.Tensor, page_table: torch.Tensor) -> dict[str, int]:
    """Return the constants that they share."""
    return {
        "GROUP": query.shape[1] // page_table.shape[1],
        "BLOCK_SIZE": keys.shape[1],
        "HEAD_SIZE_PADDED": max(16, triton.next_power_of_2(query.shape[2])),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "UPCAST": query.device.type == "cpu",  # Triton's interpreter cannot multiply bfloat16
    }


@triton.jit
def _load_request(query_start_loc, kv_start_loc, req):
    """Return the first query of a request and their number, where its sums begin and its tokens in the cache."""
    first_query, first_sum = tl.load(query_start_loc + req), tl.load(kv_start_loc + req)
    num_queries = tl.load(query_start_loc + req + 1) - first_query
    kv_len = tl.load(kv_start_loc + req + 1) - first_sum
    return first_query, num_queries.to(tl.int32), first_sum, kv_len.to(tl.int32)


@triton.jit
def load_chunk(chunks, chunk):
    """Return the row of its page table, its first token, its first query and their number."""
    at = chunks + 4 * chunk
    return tl.load(at), tl.load(at + 1).to(tl.int32), tl.load(at + 2), tl.load(at + 3).to(tl.int32)


@triton.jit
def pages_of(page_table, table_stride_req, table_stride_head, req, kv_head):
    """Return the pages of a KV head of a request."""
    return page_table + req * table_stride_req + kv_head.to(tl.int64) * table_stride_head


@triton.jit
def load_keys(
    keys, pages, key_stride_page, key_stride_token, key_stride_dim, head_size, index, live, dim,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Return [HEAD_SIZE_PADDED, BLOCK_TOKENS], the keys at cache indices ``index``, zeros where they are not live."""
    # int64 before any multiply: a big pool overflows int32 element offsets
    page = tl.load(pages + index // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
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
    query_stride_token, query_stride_head, key_stride_page, key_stride_token, key_stride_dim,
    table_stride_req, table_stride_head, num_tokens, head_size,
    log_sums,
    chunks, kv_start_loc, sinks, num_tiles, scale,
    SOFTCAP: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # one program: one block of rows of one KV head and one chunk
    kv_head = tl.program_id(1)
    first_row, chunk = tl.program_id(0) % num_tiles * BLOCK_ROWS, (tl.program_id(0) // num_tiles).to(tl.int64)
    if kv_start_loc is None:
        req, begin, first_query, num_queries = load_chunk(chunks, chunk)
        end = begin + num_queries
        seen_by_all = end
    else:
        first_query, num_queries, _, end = _load_request(chunks, kv_start_loc, chunk)
        req, begin = chunk, 0
        seen_by_all = end - num_queries
    num_rows = num_queries * GROUP
    if first_row >= num_rows:
        return
    row = first_row + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    query += first_query * query_stride_token
    queries = load_queries(
        query, query_stride_token, query_stride_head, head_size, token, head, row < num_rows, dim, UPCAST
    )
    pages = pages_of(page_table, table_stride_req, table_stride_head, req, kv_head)
    last_seen = tl.minimum(seen_by_all + token, end - 1)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    last = tl.minimum(end, seen_by_all + (first_row + BLOCK_ROWS - 1) // GROUP + 1)
    for first in range(begin, last, BLOCK_TOKENS):
        index = first + tl.arange(0, BLOCK_TOKENS)
        key = load_keys(
            keys, pages, key_stride_page, key_stride_token, key_stride_dim, head_size, index, index < end, dim,
            BLOCK_SIZE,
        )  # fmt: skip
        logits = cap_logits(tl.dot(queries, key.to(queries.dtype), input_precision="ieee") * scale, SOFTCAP)
        # every row sees the first key, so no maximum stays infinite
        logits = tl.where(index[None, :] <= last_seen[:, None], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), axis=1)
        row_max = new_max
    if sinks is not None:
        row_max, row_sum = add_sink(row_max, row_sum, tl.load(sinks + head))
    log_sums += (kv_head.to(tl.int64) * num_tokens + first_query) * GROUP
    tl.store(log_sums + row, row_max + tl.log2(row_sum), mask=row < num_rows)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _column_sums_kernel(
    query, keys, page_table,
    query_stride_token, query_stride_head, key_stride_page, key_stride_token, key_stride_dim,
    table_stride_req, table_stride_head, num_tokens, head_size,
    log_sums,
    query_start_loc, kv_start_loc, num_tiles, scale,
    sums, sums_stride_head,
    SOFTCAP: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # one program: one tile of keys of one KV head of one request, against the queries that see any of it
    kv_head = tl.program_id(1)
    first_index, req = tl.program_id(0) % num_tiles * BLOCK_TOKENS, (tl.program_id(0) // num_tiles).to(tl.int64)
    first_query, num_queries, first_sum, kv_len = _load_request(query_start_loc, kv_start_loc, req)
    if (first_index >= kv_len) | (num_queries == 0):
        return
    index = first_index + tl.arange(0, BLOCK_TOKENS)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    pages = pages_of(page_table, table_stride_req, table_stride_head, req, kv_head)
    key = load_keys(
        keys, pages, key_stride_page, key_stride_token, key_stride_dim, head_size, index, index < kv_len, dim,
        BLOCK_SIZE,
    )  # fmt: skip
    query += first_query * query_stride_token
    log_sums += (kv_head.to(tl.int64) * num_tokens + first_query) * GROUP
    num_rows = num_queries * GROUP
    num_earlier = kv_len - num_queries
    first_row = tl.maximum(first_index - num_earlier, 0) * GROUP
    received = tl.zeros([BLOCK_TOKENS], tl.float32)
    for start in range(first_row, num_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        token = row // GROUP
        live = row < num_rows
        head = kv_head * GROUP + row % GROUP
        queries = load_queries(
            query, query_stride_token, query_stride_head, head_size, token, head, live, dim, UPCAST
        )  # fmt: skip
        logits = cap_logits(tl.dot(queries, key.to(queries.dtype), input_precision="ieee") * scale, SOFTCAP)
        log_sum = tl.load(log_sums + row, mask=live, other=0.0)
        seen = live[:, None] & (index[None, :] <= num_earlier + token[:, None])
        # masked before the subtraction: fused with the scale it would not round as the logits in log_sum did
        logits = tl.where(seen, logits, float("-inf"))
        received += tl.sum(tl.exp2(logits - log_sum[:, None]), axis=0)
    out = sums + kv_head.to(tl.int64) * sums_stride_head + first_sum + index
    tl.store(out, tl.load(out, mask=index < kv_len, other=0.0) + received / GROUP, mask=index < kv_len)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Return how the kernels are compiled for bfloat16, a head size of 128, groups of 4 and pages of 16 tokens."""
    constants = {
        "SOFTCAP": 0.0, "GROUP": 4, "BLOCK_SIZE": 16, "HEAD_SIZE_PADDED": 128, "UPCAST": False,
        "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_TOKENS": BLOCK_TOKENS,
    }  # fmt: skip
    types = dict.fromkeys([*_column_sums_kernel.arg_names[:12], "num_tiles", "sums_stride_head"], "i32")
    types |= {
        "query": "*bf16",
        "keys": "*bf16",
        "log_sums": "*fp32",
        "scale": "fp32",
        "sums": "*fp32",
        "sinks": "*fp32",
    }
    types |= dict.fromkeys(["page_table", "chunks", "query_start_loc", "kv_start_loc"], "*i64")
    return [(_log_sums_kernel, types, constants, NUM_WARPS), (_column_sums_kernel, types, constants, NUM_WARPS)]


def streaming_sums_reference(batch: ChunkBatch, sums: torch.Tensor) -> None:
    """In place: the definition of ``streaming_sums`` in plain torch, float32, same arguments."""
    for pages, queries, tokens in requests(batch):
        if queries:
            of_request = sums[:, tokens.start : tokens.stop]
            _add_attention(batch, batch.query[queries.start : queries.stop], pages, of_request)


def _add_attention(batch: ChunkBatch, query: torch.Tensor, pages: torch.Tensor, sums: torch.Tensor) -> None:
    """Add to ``sums`` [num_kv_heads, kv_len] what the queries of one request pay."""
    keys, sinks = batch.keys, None if batch.sinks is None else batch.sinks.view(len(pages), -1, 1)
    num_kv_heads, num_queries, kv_len = len(pages), len(query), sums.shape[1]
    gathered = keys[pages[:, : -(-kv_len // keys.shape[1])]].flatten(1, 2)[:, None, :kv_len].float()
    # [num_kv_heads, group, num_queries, head_size]
    grouped = query.float().transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    for start in range(0, num_queries, REFERENCE_QUERIES):
        piece = grouped[:, :, start : start + REFERENCE_QUERIES]
        last_seen = torch.arange(start, start + piece.shape[2], device=query.device) + kv_len - num_queries
        num_seen = kv_len - num_queries + start + piece.shape[2]
        logits = piece @ gathered[:, :, :num_seen].transpose(2, 3) * batch.scale
        logits = capped(logits, batch.softcap)  # [num_kv_heads, group, piece, num_seen]
        hidden = torch.arange(num_seen, device=query.device) > last_seen[:, None]
        paid = softmax_with_sinks(logits.masked_fill(hidden, float("-inf")), sinks)
        sums[:, :num_seen] += paid.sum(dim=2).mean(dim=1)
