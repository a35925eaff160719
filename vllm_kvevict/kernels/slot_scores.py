"""Scores of what heads hold, in no order, by the attention that the last queries of each request pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from vllm_kvevict.kernels.native import function, pointers
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import (
    DTYPE_CODES,
    LOG2_E,
    capped,
    check_contiguous,
    check_groups,
    check_keys,
    check_logits,
    check_page_ids,
    check_page_table,
    check_query,
    softmax_with_sinks,
)
from vllm_kvevict.kernels.paged_tiles import add_sink, cap_logits, load_query, load_tokens, product_rows

# The numbers are those of the enums in csrc/cpu/slot_scores.cpp.
GROUP_CODES = {"mean": 0, "max": 1}
FUSION_CODES = {"sum": 0, "max": 1, "none": 2}
MAX_SPLITS = 16  # partial softmaxes of a row
TILE = 64  # slots of a Triton program
MAX_ROWS, MAX_ROW_BYTES = 64, 2**14  # query rows of one of its products, and what they take of shared memory
NUM_WARPS = 8
# with lengths and numbers of requests, for which no kernel is compiled again
_VARYING = ("table_stride_req", "table_stride_head", "num_slots", "num_queries", "num_splits", "split_slots")
_UNALIGNED = ("table_ptr", "positions_ptr", "last_seen_ptr", "row_max_ptr", "row_sum_ptr", "scores_ptr")


@dataclass(frozen=True)
class SlotBatch:
    """Some queries of several requests, and what the heads of one layer hold. Read only.

    query:      [num_reqs, num_queries, num_heads, head_size] float32 | bfloat16 | float16, RoPE applied, last dimension
                contiguous
    keys:       [num_pages, block_size, head_size] floats, RoPE applied: a view of the whole pool of pages, a page being
                block_size tokens of one KV head. The token or the head_size dimension is contiguous.
    page_table: [num_reqs, num_kv_heads, max_pages] int64, pages of each KV head; any page of the pool where it has none
    positions:  [num_reqs, num_kv_heads, max_pages * block_size] int64, contiguous, below 2^31: which token is in each
                slot of these pages, -1 where that is none of the head's; any order
    last_seen:  [num_reqs, num_queries] int64, contiguous: a query sees the tokens up to this position, this one
                included; none if it is negative
    scale:      softmax scale, normally head_size ** -0.5; times what stored keys are to be multiplied by, if anything
    softcap:    as in ``WindowBatch``
    sinks:      [num_reqs, num_heads] likewise
    """

    query: torch.Tensor
    keys: torch.Tensor
    page_table: torch.Tensor
    positions: torch.Tensor
    last_seen: torch.Tensor
    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None


Group = Literal["mean", "max"]
Fusion = Literal["sum", "max", "none"]


def _empty_scores(batch: SlotBatch, fusion: Fusion) -> torch.Tensor:
    num_reqs, num_kv_heads, num_slots = batch.positions.shape
    of_queries = [batch.query.shape[1]] if fusion == "none" else []
    return batch.query.new_empty(num_reqs, num_kv_heads, *of_queries, num_slots, dtype=torch.float32)


@operator(
    "(Tensor query, Tensor keys, Tensor page_table, Tensor positions, Tensor last_seen, float scale, float softcap, "
    "Tensor? sinks, str group, str fusion) -> Tensor",
    fake=lambda batch, group, fusion: _empty_scores(batch, fusion),
    groups={0: SlotBatch},
)
def slot_scores(batch: SlotBatch, group: Group, fusion: Fusion) -> torch.Tensor:
    """Score the slots of several requests in one layer by the softmax attention of some queries to what they see.

    group:   over the query heads of one KV head, of each query by itself; query head h uses KV head
             h // (num_heads / num_kv_heads)
    fusion:  over the queries, then
    returns: [num_reqs, num_kv_heads, num_slots] float32; [num_reqs, num_kv_heads, num_queries, num_slots] if the
             queries are not fused. 0 where a head holds nothing; a query that sees nothing pays 0.

    CPU tensors use csrc/cpu/slot_scores.cpp where it was built, else ``slot_scores_reference``; CUDA tensors use
    Triton. The C++ holds the logits of 32 queries and one KV head per thread, or of fewer at once where they would take
    more than 16 MiB; Triton two numbers per query row and split. The result of the C++ does not depend on the number of
    threads.

    Raises ValueError for a wrong shape, dtype, device or stride and, on CPU, for a page id outside the pool, which
    would have to wait for a GPU; MemoryError if the scratch memory cannot be had.
    """
    check_arguments(batch, group, fusion)
    if batch.query.device.type != "cpu":
        return slot_scores_triton(batch, group, fusion)
    check_page_ids(batch.page_table, len(batch.keys))
    kernel = function("kvevict_slot_scores", batch.query.device)
    if kernel is None:
        return slot_scores_reference(batch, group, fusion)
    num_reqs, num_queries, num_heads, head_size = batch.query.shape
    num_kv_heads, num_slots = batch.positions.shape[1:]
    scores = _empty_scores(batch, fusion)
    status = kernel(
        batch.query.data_ptr(), *batch.query.stride()[:3],
        batch.keys.data_ptr(), *batch.keys.stride(),
        batch.page_table.data_ptr(), *batch.page_table.stride()[:2],
        batch.positions.data_ptr(), batch.last_seen.data_ptr(), scores.data_ptr(),
        DTYPE_CODES[batch.query.dtype], DTYPE_CODES[batch.keys.dtype],
        num_reqs, num_queries, num_heads, num_kv_heads, head_size, batch.keys.shape[1], num_slots,
        batch.scale, _head_weight(batch, group), batch.softcap, *pointers(batch.sinks),
        GROUP_CODES[group], FUSION_CODES[fusion],
    )  # fmt: skip
    if status != 0:
        raise MemoryError(f"slot_scores: no scratch memory for {num_heads} heads and {num_slots} slots.")
    return scores


def check_arguments(batch: SlotBatch, group: str, fusion: str) -> None:
    """Raise ValueError unless the arguments are as documented, as far as it shows without reading a tensor."""
    query, keys, page_table = batch.query, batch.keys, batch.page_table
    check_query(query, "num_reqs", "num_queries", "num_heads", "head_size")
    num_reqs, num_queries, num_heads, head_size = query.shape
    check_keys(keys)
    if keys.shape[2] != head_size or keys.device != query.device:
        raise ValueError(
            f"`keys`: expected a head size of {head_size} on {query.device}, got {keys.shape[2]} on {keys.device}."
        )
    check_page_table(page_table, query.device, num_reqs)
    num_kv_heads, max_pages = page_table.shape[1:]
    check_groups(num_heads, num_kv_heads)
    of_slots = num_reqs, num_kv_heads, max_pages * keys.shape[1]
    check_contiguous("positions", batch.positions, of_slots, torch.int64, query.device)
    check_contiguous("last_seen", batch.last_seen, (num_reqs, num_queries), torch.int64, query.device)
    check_logits(batch.softcap, batch.sinks, (num_reqs, num_heads), query.device)
    for name, value, codes in (("group", group, GROUP_CODES), ("fusion", fusion, FUSION_CODES)):
        if value not in codes:
            raise ValueError(f"`{name}`: expected {' or '.join(map(repr, codes))}, got {value!r}.")


def _head_weight(batch: SlotBatch, group: Group) -> float:
    """What the probability of one query head counts in the reduction over its group."""
    return batch.page_table.shape[1] / batch.query.shape[2] if group == "mean" else 1.0


def slot_scores_triton(batch: SlotBatch, group: Group, fusion: Fusion) -> torch.Tensor:
    """Launch the Triton kernels, one after the other for all heads of all requests. See ``slot_scores``."""
    query, keys, positions = batch.query, batch.keys, batch.positions
    num_reqs, num_queries, num_heads, head_size = query.shape
    num_kv_heads, num_slots = positions.shape[1:]
    members, num_items = num_heads // num_kv_heads, num_reqs * num_kv_heads
    num_tiles = triton.cdiv(num_slots, TILE)
    split_slots = triton.cdiv(num_tiles, MAX_SPLITS) * TILE
    num_splits = triton.cdiv(num_slots, split_slots)
    row_max, row_sum = query.new_empty(2, num_items, num_splits, members * num_queries, dtype=torch.float32)
    scores = _empty_scores(batch, fusion)
    slots = (batch.page_table, *batch.page_table.stride()[:2], keys.shape[1], positions, num_kv_heads, num_slots)
    inputs = (query, *query.stride()[:3], keys, *keys.stride(), batch.last_seen, num_queries, members, head_size)
    head, softcap = max(triton.next_power_of_2(head_size), 16), batch.softcap * LOG2_E
    most_rows = min(MAX_ROWS, MAX_ROW_BYTES // (head * query.element_size()))
    rows = product_rows(members * num_queries, most_rows)
    _slot_softmax_kernel[num_splits, triton.cdiv(members * num_queries, rows), num_items](
        *slots, *inputs, batch.scale * LOG2_E, row_max, row_sum, num_splits, split_slots,
        SOFTCAP=softcap, TILE=TILE, ROWS=rows, HEAD=head, num_warps=NUM_WARPS,
    )  # fmt: skip
    _slot_scores_kernel[num_tiles, num_items](
        *slots, *inputs, batch.scale * LOG2_E, row_max, row_sum, batch.sinks, num_splits, _head_weight(batch, group),
        scores, GROUP_MAX=group == "max", FUSION=FUSION_CODES[fusion], SOFTCAP=softcap,
        TILE=TILE, ROWS=product_rows(num_queries, most_rows), HEAD=head, num_warps=NUM_WARPS,
    )  # fmt: skip
    return scores


@triton.jit
def _load_slots(
    table_ptr, table_stride_req, table_stride_head, block_size, positions_ptr, num_kv_heads, num_slots,
    key_ptr, key_stride_page, key_stride_token, key_stride_dim, head_size, item, slot,
    HEAD: tl.constexpr,
):  # fmt: skip
    position = tl.load(positions_ptr + item.to(tl.int64) * num_slots + slot, mask=slot < num_slots, other=-1)
    keys = load_tokens(
        table_ptr, table_stride_req, table_stride_head, block_size, item, num_kv_heads,
        key_ptr, key_stride_page, key_stride_token, key_stride_dim, head_size, slot, position >= 0, HEAD,
    )  # fmt: skip
    return position.to(tl.int32), keys  # [TILE], [TILE, HEAD]


@triton.jit
def _compute_logits(query, last_seen, position, keys, scale, SOFTCAP: tl.constexpr):
    logits = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee") * scale
    logits = cap_logits(logits, SOFTCAP)
    is_visible = (position >= 0)[None, :] & (position[None, :] <= last_seen[:, None])
    return tl.where(is_visible, logits, float("-inf"))  # [ROWS, TILE]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _slot_softmax_kernel(
    table_ptr, table_stride_req, table_stride_head, block_size, positions_ptr, num_kv_heads, num_slots,
    query_ptr, query_stride_req, query_stride_token, query_stride_head,
    key_ptr, key_stride_page, key_stride_token, key_stride_dim,
    last_seen_ptr, num_queries, members, head_size, scale,
    row_max_ptr, row_sum_ptr, num_splits, split_slots,
    SOFTCAP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    # one program: the partial softmax of a block of query rows of one KV head over one split of its slots
    split, item = tl.program_id(0), tl.program_id(2)
    req, kv_head = (item // num_kv_heads).to(tl.int64), item % num_kv_heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live_row = row < members * num_queries
    query = load_query(
        query_ptr + req * query_stride_req, query_stride_token, query_stride_head,
        kv_head * members + row // num_queries, row % num_queries, live_row, head_size, HEAD,
    )  # fmt: skip
    last_seen = tl.load(last_seen_ptr + req * num_queries + row % num_queries, mask=live_row, other=-1)
    # lowest finite float rather than -infinity: a row that sees no slot of a tile must not compute inf - inf
    row_max = tl.full([ROWS], -3.4e38, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    first = split * split_slots
    for start in range(first, tl.minimum(first + split_slots, num_slots), TILE):
        position, keys = _load_slots(
            table_ptr, table_stride_req, table_stride_head, block_size, positions_ptr, num_kv_heads, num_slots,
            key_ptr, key_stride_page, key_stride_token, key_stride_dim, head_size, item, start + tl.arange(0, TILE),
            HEAD,
        )  # fmt: skip
        logits = _compute_logits(query, last_seen, position, keys, scale, SOFTCAP)
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), axis=1)
        row_max = new_max
    partial = (item * num_splits + split).to(tl.int64)
    tl.store(row_max_ptr + partial * members * num_queries + row, row_max, mask=live_row)
    tl.store(row_sum_ptr + partial * members * num_queries + row, row_sum, mask=live_row)


@triton.jit
def _merge_softmax(row_max_ptr, row_sum_ptr, item, row, live_row, num_rows, num_splits, ROWS: tl.constexpr):
    row_max = tl.full([ROWS], -3.4e38, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for split in range(num_splits):
        at = (item * num_splits + split).to(tl.int64) * num_rows + row
        of_split = tl.load(row_max_ptr + at, mask=live_row, other=-3.4e38)
        new_max = tl.maximum(row_max, of_split)
        row_sum *= tl.exp2(row_max - new_max)
        row_sum += tl.load(row_sum_ptr + at, mask=live_row, other=0.0) * tl.exp2(of_split - new_max)
        row_max = new_max
    return row_max, row_sum


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _slot_scores_kernel(
    table_ptr, table_stride_req, table_stride_head, block_size, positions_ptr, num_kv_heads, num_slots,
    query_ptr, query_stride_req, query_stride_token, query_stride_head,
    key_ptr, key_stride_page, key_stride_token, key_stride_dim,
    last_seen_ptr, num_queries, members, head_size, scale,
    row_max_ptr, row_sum_ptr, sinks_ptr, num_splits, head_weight, scores_ptr,
    GROUP_MAX: tl.constexpr, FUSION: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    # one program: the scores of a tile of slots of one KV head
    item = tl.program_id(1)
    req, kv_head = (item // num_kv_heads).to(tl.int64), item % num_kv_heads
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position, keys = _load_slots(
        table_ptr, table_stride_req, table_stride_head, block_size, positions_ptr, num_kv_heads, num_slots,
        key_ptr, key_stride_page, key_stride_token, key_stride_dim, head_size, item, slot, HEAD,
    )  # fmt: skip
    scores = tl.zeros([TILE], tl.float32)
    for first_query in range(0, num_queries, ROWS):
        token = first_query + tl.arange(0, ROWS)
        live_row = token < num_queries
        last_seen = tl.load(last_seen_ptr + req * num_queries + token, mask=live_row, other=-1)
        paid = tl.zeros([ROWS, TILE], tl.float32)
        for member in range(members):
            query = load_query(
                query_ptr + req * query_stride_req, query_stride_token, query_stride_head,
                kv_head * members + member + token * 0, token, live_row, head_size, HEAD,
            )  # fmt: skip
            logits = _compute_logits(query, last_seen, position, keys, scale, SOFTCAP)
            row_max, row_sum = _merge_softmax(
                row_max_ptr, row_sum_ptr, item, member * num_queries + token, live_row, members * num_queries,
                num_splits, ROWS,
            )  # fmt: skip
            if sinks_ptr is not None:
                sink = tl.load(sinks_ptr + item.to(tl.int64) * members + member)
                row_max, row_sum = add_sink(row_max, row_sum, sink)
            # the largest term is 1, unless the row sees nothing: all are 0 then; NaN is no less
            weight = head_weight / tl.where(row_sum < 0.5, 1.0, row_sum)
            of_head = tl.exp2(logits - row_max[:, None]) * weight[:, None]
            if GROUP_MAX:
                paid = tl.maximum(paid, of_head, propagate_nan=tl.PropagateNan.ALL)
            else:
                paid += of_head
        if FUSION == 0:
            scores += tl.sum(paid, axis=0)
        elif FUSION == 1:
            # NaN if any is: a maximum over an axis passes over it
            of_queries = tl.max(paid, axis=0) + tl.sum(paid - paid, axis=0)
            scores = tl.maximum(scores, of_queries, propagate_nan=tl.PropagateNan.ALL)
        else:
            out = (item.to(tl.int64) * num_queries + token[:, None]) * num_slots + slot[None, :]
            tl.store(scores_ptr + out, paid, mask=live_row[:, None] & (slot < num_slots)[None, :])
    if FUSION != 2:
        tl.store(scores_ptr + item.to(tl.int64) * num_slots + slot, scores, mask=slot < num_slots)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Kernels as they are launched by default: function, types, constants and warps, to compile without a GPU."""
    of_inputs = ("table_ptr", "positions_ptr", "last_seen_ptr", "query_ptr", "key_ptr")
    pointers = dict(zip(of_inputs, ("*i64", "*i64", "*i64", "*bf16", "*bf16"), strict=True))
    floats = dict.fromkeys(("scale", "head_weight"), "fp32")
    common = {"key_stride_dim": 1, "TILE": TILE, "HEAD": 128}  # strides as a launch specialises them
    constants = {
        _slot_softmax_kernel: {**common, "SOFTCAP": 0.0, "ROWS": MAX_ROWS},
        _slot_scores_kernel: {**common, "SOFTCAP": 0.0, "ROWS": 32, "GROUP_MAX": True, "FUSION": 0},
    }
    signatures = []
    for kernel, fixed in constants.items():
        free = [name for name in kernel.arg_names if name not in fixed]
        types = {n: pointers.get(n, "*fp32" if n.endswith("_ptr") else floats.get(n, "i32")) for n in free}
        signatures.append((kernel, types, fixed, NUM_WARPS))
    return signatures


def slot_scores_reference(batch: SlotBatch, group: Group, fusion: Fusion) -> torch.Tensor:
    """The definition of ``slot_scores`` in plain torch, float32: same arguments and result."""
    num_kv_heads = batch.page_table.shape[1]
    keys = batch.keys[batch.page_table].float().flatten(2, 3)  # [num_reqs, num_kv_heads, num_slots, head_size]
    query = batch.query.float().transpose(1, 2).unflatten(1, (num_kv_heads, -1))
    logits = query @ keys.transpose(2, 3)[:, :, None] * batch.scale  # [.., members, num_queries, num_slots]
    logits = capped(logits, batch.softcap)
    positions = batch.positions[:, :, None, None]
    is_visible = (positions >= 0) & (positions <= batch.last_seen[:, None, None, :, None])
    sinks = None if batch.sinks is None else batch.sinks.unflatten(1, (num_kv_heads, -1))[..., None]
    attention = softmax_with_sinks(logits.masked_fill(~is_visible, float("-inf")), sinks)
    attention = attention.masked_fill(~is_visible.any(-1, keepdim=True), 0.0)
    paid: torch.Tensor = attention.amax(dim=2) if group == "max" else attention.mean(dim=2)
    if fusion == "none":
        return paid
    return paid.amax(dim=2) if fusion == "max" else paid.sum(dim=2)
