"""What Triton kernels share that read keys and values through page tables: their tiles, and what becomes of logits."""

from __future__ import annotations

from vllm_kvevict.kernels.optional_triton import tl, triton


def product_rows(count: int, most: int) -> int:
    """Return the rows of products for ``count`` query rows: no fewer than tensor cores take, and at most ``most``."""
    return int(max(min(triton.next_power_of_2(count), most), 16))


@triton.jit
def load_tokens(
    table_ptr, table_stride_req, table_stride_head, block_size, item, num_kv_heads,
    pool_ptr, stride_page, stride_token, stride_dim, size, token, live,
    SIZE: tl.constexpr,
):  # fmt: skip
    # int64 before any multiply: a big cache overflows int32 element offsets
    req, kv_head = (item // num_kv_heads).to(tl.int64), (item % num_kv_heads).to(tl.int64)
    pages = table_ptr + req * table_stride_req + kv_head * table_stride_head
    page, slot = tl.load(pages + token // block_size, mask=live, other=0), (token % block_size).to(tl.int64)
    dim = tl.arange(0, SIZE)
    return tl.load(
        pool_ptr + (page * stride_page + slot * stride_token)[:, None] + dim * stride_dim,
        mask=live[:, None] & (dim < size),
        other=0.0,
    )  # [TILE, SIZE]


@triton.jit
def load_query(
    query_ptr, query_stride_token, query_stride_head, head, row, live_row, size,
    SIZE: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, SIZE)
    query_row = row.to(tl.int64) * query_stride_token + head.to(tl.int64) * query_stride_head
    return tl.load(query_ptr + query_row[:, None] + dim, mask=live_row[:, None] & (dim < size), other=0.0)


@triton.jit
def cap_logits(logits, SOFTCAP: tl.constexpr):
    """Return SOFTCAP * tanh(logits / SOFTCAP); the logits if it is 0."""
    if SOFTCAP > 0:
        # 2 * log2(e): an exponential that overflows or vanishes makes a tanh of 1 or -1
        logits = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.8853900817779268 / SOFTCAP))))
    return logits


@triton.jit
def add_sink(row_max, row_sum, sink):
    """Return the maximum and the sum of softmax rows with a sink in them, whose logits are ``sink``."""
    sink = sink.to(tl.float32) * 1.4426950408889634  # log2(e)
    new_max = tl.maximum(row_max, sink)
    return new_max, row_sum * tl.exp2(row_max - new_max) + tl.exp2(sink - new_max)
