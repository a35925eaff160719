"""Scores of cached tokens by the attention of each request's last queries: reduced over a group, pooled, weighted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vllm_kvevict.kernels.native import function, pointers
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import DTYPE_CODES, LOG2_E, capped, softmax_with_sinks
from vllm_kvevict.kernels.paged_tiles import add_sink, cap_logits, load_query, load_tokens, product_rows
from vllm_kvevict.kernels.window_batch import (
    GROUP_CODES,
    POOL_CODES,
    WEIGHT_CODES,
    Reduction,
    WindowBatch,
    check_arguments,
    check_lengths,
)

MAX_SPLITS = 32  # partial softmaxes of a row
TILE = 64  # tokens of a Triton program
MAX_ROWS = 128  # query rows of one of its products
MAX_ROW_BYTES = 2**15  # what they take of shared memory
NUM_WARPS = 8  # 4 are faster on an H100 in the pass over the columns, but spill registers on sm_100
# What differs from request to request and from batch to batch: a kernel is compiled for none of it.
_VARYING = (
    "table_stride_req", "table_stride_head", "num_kv_heads", "max_kv_len", "window", "num_rows", "num_splits",
    "split_tokens", "num_unscored",
)  # fmt: skip
_UNALIGNED = ("table_ptr", "kv_lens_ptr", "row_sum_ptr", "weights_ptr")  # views into larger tensors


@operator(
    "(Tensor query, Tensor keys, Tensor values, Tensor page_table, Tensor kv_lens, SymInt max_kv_len, float scale, "
    "float value_scale, float softcap, Tensor? sinks, str group, str pool, int pool_kernel, str weight, "
    "bool own_columns) -> Tensor",
    fake=lambda batch, reduction: batch.query.new_empty(
        batch.query.shape[0], batch.page_table.shape[1], batch.max_kv_len, dtype=torch.float32
    ),
    groups={0: WindowBatch, 1: Reduction},
)
def window_scores(batch: WindowBatch, reduction: Reduction) -> torch.Tensor:
    """Score the tokens of several requests in one layer by the softmax attention of each request's last queries.

    returns: [num_reqs, num_kv_heads, max_kv_len] float32; query head h uses KV head h // (num_heads / num_kv_heads).
             What is not scored is 0: the window, unless its columns count, and all past kv_len.

    CPU tensors use csrc/cpu/window_scores.cpp where it was built, else ``window_scores_reference``; CUDA tensors use
    Triton. Scratch memory holds a number per token and KV head, and two per query row and 256 tokens; never
    [window, kv_len], nor a row per query head. The result of the C++ does not depend on the number of threads.

    Raises ValueError for a wrong shape, dtype, device or stride and, on CPU, for a wrong length or a page id outside
    the pool, which would have to wait for a GPU; MemoryError if the scratch memory cannot be had.
    """
    check_arguments(batch, reduction)
    if batch.query.device.type != "cpu":
        return window_scores_triton(batch, reduction)
    check_lengths(batch)
    kernel = function("kvevict_window_scores", batch.query.device)
    if kernel is None:
        return window_scores_reference(batch, reduction)
    num_reqs, window, num_heads, head_size = batch.query.shape
    num_kv_heads, max_kv_len = batch.page_table.shape[1], batch.max_kv_len
    scores = torch.empty(num_reqs, num_kv_heads, max_kv_len, dtype=torch.float32)
    status = kernel(
        batch.query.data_ptr(), *batch.query.stride()[:3],
        batch.keys.data_ptr(), *batch.keys.stride(),
        batch.values.data_ptr(), *batch.values.stride(),
        batch.page_table.data_ptr(), *batch.page_table.stride()[:2],
        batch.kv_lens.data_ptr(), scores.data_ptr(),
        DTYPE_CODES[batch.query.dtype], DTYPE_CODES[batch.keys.dtype],
        num_reqs, window, num_heads, num_kv_heads, head_size, batch.values.shape[2], batch.keys.shape[1], max_kv_len,
        reduction.num_unscored(window),
        batch.scale, reduction.query_weight(window, num_heads // num_kv_heads), batch.value_scale,
        batch.softcap, *pointers(batch.sinks),
        GROUP_CODES[reduction.group], POOL_CODES[reduction.pool], WEIGHT_CODES[reduction.weight], reduction.pool_kernel,
    )  # fmt: skip
    if status != 0:
        raise MemoryError(f"window_scores: no scratch memory for {num_heads} heads and {max_kv_len} tokens.")
    return scores


def window_scores_triton(batch: WindowBatch, reduction: Reduction) -> torch.Tensor:
    """Launch the Triton kernels, one after the other for all heads of all requests. See ``window_scores``."""
    query, keys, values, max_kv_len = batch.query, batch.keys, batch.values, batch.max_kv_len
    num_reqs, window, num_heads, head_size = query.shape
    num_kv_heads, value_head_size = batch.page_table.shape[1], values.shape[2]
    group, num_items = num_heads // num_kv_heads, num_reqs * num_kv_heads
    num_tiles = triton.cdiv(max_kv_len, TILE)
    split_tokens = triton.cdiv(num_tiles, MAX_SPLITS) * TILE
    num_splits = triton.cdiv(max_kv_len, split_tokens)
    row_max, row_sum = query.new_empty(2, num_items, num_splits, group * window, dtype=torch.float32)
    maxima, weights = query.new_empty(2, num_items, group * window, dtype=torch.float32)
    largest_norms = query.new_empty(num_items, num_splits, dtype=torch.float32)
    scores = query.new_empty(num_reqs, num_kv_heads, max_kv_len, dtype=torch.float32)
    columns = torch.empty_like(scores)

    num_unscored, query_weight = reduction.num_unscored(window), reduction.query_weight(window, group)
    tokens = (batch.page_table, *batch.page_table.stride()[:2], keys.shape[1], batch.kv_lens, num_kv_heads, max_kv_len)
    inputs = (query, *query.stride()[:3], keys, *keys.stride(), window, group, head_size, batch.scale * LOG2_E)
    value_pages, softcap = (values, *values.stride(), value_head_size), batch.softcap * LOG2_E
    head, value_head = max(triton.next_power_of_2(head_size), 16), triton.next_power_of_2(value_head_size)
    most_rows = min(MAX_ROWS, MAX_ROW_BYTES // (head * query.element_size()))
    rows = product_rows(group * window, most_rows)
    _softmax_kernel[num_splits, triton.cdiv(group * window, rows), num_items](
        *tokens, *inputs, *value_pages, row_max, row_sum, largest_norms, num_splits, split_tokens, num_unscored,
        FIND_NORM=reduction.weight == "largest_value_norm", SOFTCAP=softcap, TILE=TILE, ROWS=rows, HEAD=head,
        VALUE_HEAD=value_head, num_warps=NUM_WARPS,
    )  # fmt: skip
    _merge_kernel[triton.cdiv(group * window, rows), num_items](
        row_max, row_sum, maxima, weights, batch.sinks, window, group * window, num_splits, query_weight,
        ROWS=rows, SPLITS=MAX_SPLITS, num_warps=NUM_WARPS,
    )  # fmt: skip
    _columns_kernel[num_tiles, num_items](
        *tokens, *inputs, maxima, weights, columns, num_unscored,
        GROUP_MAX=reduction.group == "max", SOFTCAP=softcap, TILE=TILE, ROWS=product_rows(window, most_rows),
        HEAD=head, num_warps=NUM_WARPS,
    )  # fmt: skip
    _finish_kernel[num_tiles, num_items](
        *tokens, *value_pages, columns, largest_norms, scores, num_splits, num_unscored, batch.value_scale,
        POOL_MAX=reduction.pool == "max", POOL_KERNEL=reduction.pool_kernel, WEIGHT=WEIGHT_CODES[reduction.weight],
        TILE=TILE, VALUE_HEAD=value_head, SPLITS=MAX_SPLITS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return scores


@triton.jit
def _compute_logits(query, last_seen, keys, token, scale, SOFTCAP: tl.constexpr):
    logits = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee") * scale
    logits = cap_logits(logits, SOFTCAP)
    return tl.where(token[None, :] <= last_seen[:, None], logits, float("-inf"))  # [ROWS, TILE]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _softmax_kernel(
    table_ptr, table_stride_req, table_stride_head, block_size, kv_lens_ptr, num_kv_heads, max_kv_len,
    query_ptr, query_stride_req, query_stride_token, query_stride_head,
    key_ptr, key_stride_page, key_stride_token, key_stride_dim,
    window, group, head_size, scale,
    value_ptr, value_stride_page, value_stride_token, value_stride_dim, value_head_size,
    row_max_ptr, row_sum_ptr, norms_ptr,
    num_splits, split_tokens, num_unscored,
    FIND_NORM: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
):  # fmt: skip
    # one program: the partial softmax of a block of query rows of one KV head over one split of its tokens
    split, item = tl.program_id(0), tl.program_id(2)
    req, kv_head = (item // num_kv_heads).to(tl.int64), item % num_kv_heads
    kv_len = tl.load(kv_lens_ptr + req).to(tl.int32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live_row = row < group * window
    query = load_query(
        query_ptr + req * query_stride_req, query_stride_token, query_stride_head,
        kv_head * group + row // window, row % window, live_row, head_size, HEAD,
    )  # fmt: skip
    # lowest finite float rather than -infinity: a row that sees no key of a tile must not compute inf - inf
    row_max = tl.full([ROWS], -3.4e38, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    first = split * split_tokens
    for start in range(first, tl.minimum(first + split_tokens, kv_len), TILE):
        token = start + tl.arange(0, TILE)
        keys = load_tokens(
            table_ptr, table_stride_req, table_stride_head, block_size, item, num_kv_heads,
            key_ptr, key_stride_page, key_stride_token, key_stride_dim, head_size, token, token < kv_len, HEAD,
        )  # fmt: skip
        logits = _compute_logits(query, kv_len - window + row % window, keys, token, scale, SOFTCAP)
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), axis=1)
        row_max = new_max
    partial = (item * num_splits + split).to(tl.int64)
    tl.store(row_max_ptr + partial * group * window + row, row_max, mask=live_row)
    tl.store(row_sum_ptr + partial * group * window + row, row_sum, mask=live_row)
    if FIND_NORM and tl.program_id(1) == 0:
        largest_norm = tl.zeros([TILE], tl.float32)
        num_scored = kv_len - num_unscored
        for start in range(first, tl.minimum(first + split_tokens, num_scored), TILE):
            token = start + tl.arange(0, TILE)
            values = load_tokens(
                table_ptr, table_stride_req, table_stride_head, block_size, item, num_kv_heads,
                value_ptr, value_stride_page, value_stride_token, value_stride_dim, value_head_size,
                token, token < num_scored, VALUE_HEAD,
            )  # fmt: skip
            largest_norm = tl.maximum(largest_norm, tl.sum(tl.abs(values.to(tl.float32)), axis=1))
        tl.store(norms_ptr + partial, tl.max(largest_norm, axis=0))


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _merge_kernel(
    row_max_ptr, row_sum_ptr, maxima_ptr, weights_ptr, sinks_ptr, window, num_rows, num_splits, query_weight,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # one program: the softmax of a block of query rows of one KV head, from its partial ones
    item = tl.program_id(1).to(tl.int64)
    row, split = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SPLITS)
    at = (item * num_splits + split)[:, None] * num_rows + row
    live = (split < num_splits)[:, None] & (row < num_rows)
    maxima = tl.load(row_max_ptr + at, mask=live, other=-3.4e38)  # [SPLITS, ROWS]
    row_max = tl.max(maxima, axis=0)
    row_sum = tl.sum(tl.load(row_sum_ptr + at, mask=live, other=0.0) * tl.exp2(maxima - row_max[None, :]), axis=0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + item * (num_rows // window) + row // window, mask=row < num_rows, other=0.0)
        row_max, row_sum = add_sink(row_max, row_sum, sink)
    tl.store(maxima_ptr + item * num_rows + row, row_max, mask=row < num_rows)
    tl.store(weights_ptr + item * num_rows + row, query_weight / row_sum, mask=row < num_rows)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _columns_kernel(
    table_ptr, table_stride_req, table_stride_head, block_size, kv_lens_ptr, num_kv_heads, max_kv_len,
    query_ptr, query_stride_req, query_stride_token, query_stride_head,
    key_ptr, key_stride_page, key_stride_token, key_stride_dim,
    window, group, head_size, scale,
    maxima_ptr, weights_ptr, columns_ptr,
    num_unscored,
    GROUP_MAX: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    # one program: the sums of a tile of columns of one KV head, reduced over its query heads
    item = tl.program_id(1)
    req, kv_head = (item // num_kv_heads).to(tl.int64), item % num_kv_heads
    kv_len = tl.load(kv_lens_ptr + req).to(tl.int32)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    keys = load_tokens(
        table_ptr, table_stride_req, table_stride_head, block_size, item, num_kv_heads,
        key_ptr, key_stride_page, key_stride_token, key_stride_dim, head_size, token, token < kv_len, HEAD,
    )  # fmt: skip
    columns = tl.zeros([TILE], tl.float32)
    for in_group in range(group):
        of_head = tl.zeros([TILE], tl.float32)
        for first_row in range(0, window, ROWS):
            row = first_row + tl.arange(0, ROWS)
            live_row = row < window
            query = load_query(
                query_ptr + req * query_stride_req, query_stride_token, query_stride_head,
                kv_head * group + in_group + row * 0, row, live_row, head_size, HEAD,
            )  # fmt: skip
            logits = _compute_logits(query, kv_len - window + row, keys, token, scale, SOFTCAP)
            at = (item.to(tl.int64) * group + in_group) * window + row
            row_max = tl.load(maxima_ptr + at, mask=live_row, other=0.0)
            weight = tl.load(weights_ptr + at, mask=live_row, other=0.0)
            logits = tl.where(live_row[:, None], logits - row_max[:, None], 0.0)
            of_head += tl.sum(tl.exp2(logits) * weight[:, None], axis=0)
        if GROUP_MAX:
            columns = tl.maximum(columns, of_head, propagate_nan=tl.PropagateNan.ALL)
        else:
            columns += of_head
    columns = tl.where(token < kv_len - num_unscored, columns, 0.0)
    tl.store(columns_ptr + item.to(tl.int64) * max_kv_len + token, columns, mask=token < max_kv_len)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _finish_kernel(
    table_ptr, table_stride_req, table_stride_head, block_size, kv_lens_ptr, num_kv_heads, max_kv_len,
    value_ptr, value_stride_page, value_stride_token, value_stride_dim, value_head_size,
    columns_ptr, norms_ptr, scores_ptr,
    num_splits, num_unscored, value_scale,
    POOL_MAX: tl.constexpr, POOL_KERNEL: tl.constexpr, WEIGHT: tl.constexpr,
    TILE: tl.constexpr, VALUE_HEAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # one program: a tile of columns of one KV head, pooled and weighted
    item = tl.program_id(1)
    num_scored = tl.load(kv_lens_ptr + item // num_kv_heads).to(tl.int32) - num_unscored
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = item.to(tl.int64) * max_kv_len
    scores = tl.zeros([TILE], tl.float32)
    for near in range(POOL_KERNEL):
        # columns are at least 0, which is what lies around them and in those that are not scored
        at = token + near - POOL_KERNEL // 2
        column = tl.load(columns_ptr + row + at, mask=(at >= 0) & (at < max_kv_len), other=0.0)
        if POOL_MAX:
            scores = tl.maximum(scores, column, propagate_nan=tl.PropagateNan.ALL)
        else:
            scores += column / POOL_KERNEL
    if WEIGHT == 1:
        values = load_tokens(
            table_ptr, table_stride_req, table_stride_head, block_size, item, num_kv_heads,
            value_ptr, value_stride_page, value_stride_token, value_stride_dim, value_head_size,
            token, token < num_scored, VALUE_HEAD,
        )  # fmt: skip
        scores *= tl.sum(tl.abs(values.to(tl.float32)), axis=1) * value_scale
    if WEIGHT == 2:
        split = tl.arange(0, SPLITS)
        norms = tl.load(norms_ptr + item.to(tl.int64) * num_splits + split, mask=split < num_splits, other=0.0)
        scores *= tl.max(norms, axis=0) * value_scale
    tl.store(scores_ptr + row + token, tl.where(token < num_scored, scores, 0.0), mask=token < max_kv_len)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Kernels as they are launched by default: function, types, constants and warps, to compile without a GPU."""
    of_inputs = ("table_ptr", "kv_lens_ptr", "query_ptr", "key_ptr", "value_ptr")
    pointers = dict(zip(of_inputs, ("*i64", "*i64", "*bf16", "*bf16", "*bf16"), strict=True))
    floats = dict.fromkeys(("scale", "query_weight", "value_scale"), "fp32")
    strides = {"key_stride_dim": 1, "value_stride_dim": 1}  # as a launch specialises them
    constants: dict[Any, dict[str, Any]] = {
        _softmax_kernel: {"FIND_NORM": True, "SOFTCAP": 0.0, "ROWS": MAX_ROWS, "HEAD": 128, "VALUE_HEAD": 128},
        _merge_kernel: {"ROWS": MAX_ROWS, "SPLITS": MAX_SPLITS},
        _columns_kernel: {"GROUP_MAX": False, "SOFTCAP": 0.0, "ROWS": 32, "HEAD": 128},
        _finish_kernel: {"POOL_MAX": True, "POOL_KERNEL": 7, "WEIGHT": 1, "VALUE_HEAD": 128, "SPLITS": MAX_SPLITS},
    }
    signatures = []
    for kernel, values in constants.items():
        fixed = {name: value for name, value in {**strides, "TILE": TILE, **values}.items() if name in kernel.arg_names}
        free = [name for name in kernel.arg_names if name not in fixed]
        types = {n: pointers.get(n, "*fp32" if n.endswith("_ptr") else floats.get(n, "i32")) for n in free}
        signatures.append((kernel, types, fixed, NUM_WARPS))
    return signatures


def window_scores_reference(batch: WindowBatch, reduction: Reduction) -> torch.Tensor:
    """The definition of ``window_scores`` in plain torch, float32: same arguments and result."""
    window, block_size = batch.query.shape[1], batch.keys.shape[1]
    scores = batch.query.new_zeros(*batch.page_table.shape[:2], batch.max_kv_len, dtype=torch.float32)
    for req, kv_len in enumerate(batch.kv_lens.tolist()):
        num_scored = kv_len - reduction.num_unscored(window)
        if num_scored == 0:
            continue
        pages = batch.page_table[req, :, : -(-kv_len // block_size)]
        keys = batch.keys[pages].flatten(1, 2)[:, :kv_len].float()
        sinks = None if batch.sinks is None else batch.sinks[req]
        attention = _attention(batch.query[req], keys, batch.scale, batch.softcap, sinks)[..., :num_scored]
        attention *= reduction.query_weight(window, attention.shape[1])
        reduced = attention.amax(dim=1) if reduction.group == "max" else attention.sum(dim=1)
        pool1d = F.max_pool1d if reduction.pool == "max" else F.avg_pool1d
        pooled = pool1d(reduced, reduction.pool_kernel, stride=1, padding=reduction.pool_kernel // 2)
        if reduction.weight != "none":
            values = batch.values[pages].flatten(1, 2)[:, :num_scored].float()
            norms = values.abs().sum(dim=-1) * batch.value_scale
            pooled *= norms.amax(dim=1, keepdim=True) if reduction.weight == "largest_value_norm" else norms
        scores[req, :, :num_scored] = pooled
    return scores


def _attention(
    query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Return [num_kv_heads, group, kv_len], the sum over ``query`` [window, num_heads, head_size].

    sinks: [num_heads]
    """
    window, _, head_size = query.shape
    num_kv_heads, kv_len, _ = keys.shape
    grouped = query.float().transpose(0, 1).reshape(num_kv_heads, -1, window, head_size)
    logits = grouped @ keys.transpose(1, 2)[:, None] * scale  # [num_kv_heads, group, window, kv_len]
    logits = capped(logits, softcap)
    cache_index = torch.arange(kv_len, device=query.device)
    hidden = cache_index > cache_index[-window:, None]  # [window, kv_len]
    of_rows = None if sinks is None else sinks.view(num_kv_heads, -1, 1)
    return softmax_with_sinks(logits.masked_fill(hidden, float("-inf")), of_rows).sum(2)
