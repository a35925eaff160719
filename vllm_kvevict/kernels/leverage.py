"""Leverage scores of keys before their rotation, sketched by a Gaussian matrix, read through the page table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vllm_kvevict.kernels.native import function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import DTYPE_CODES, QUERY_DTYPES, check_keys, check_page_ids, check_page_table
from vllm_kvevict.kernels.rotary import Rotary

REFERENCE_TOKENS = 1024
LEAST_SHARE = 1e-12  # of the trace of a Gram matrix, added to its eigenvalues: rounding takes them below 0
# Of the Triton kernels: programs that share the tokens in the first pass, its rows of moments, tokens and columns.
MOST_PARTS, BLOCK_DIMS, BLOCK_TOKENS, BLOCK_RANK, NUM_WARPS = 128, 16, 64, 32, 8
# What differs from request to request and from chunk to chunk: a kernel is compiled for none of it.
_VARYING = ("table_stride_head", "start", "end", "part_tokens")
_UNALIGNED = ("page_table",)  # a view into the table of all layers


@operator(
    "(Tensor keys, Tensor page_table, SymInt start, SymInt end, Tensor cos_sin, bool is_neox_style, Tensor sketch, "
    "float ridge, float key_scale=1.0) -> Tensor",
    fake=lambda keys, page_table, start, end, *arguments: keys.new_empty(
        len(page_table), end - start, dtype=torch.float32
    ),
    groups={4: Rotary},
)
def leverage(
    keys: torch.Tensor,
    page_table: torch.Tensor,
    start: int,
    end: int,
    rotary: Rotary,
    sketch: torch.Tensor,
    ridge: float,
    key_scale: float = 1.0,
) -> torch.Tensor:
    """Return x^T (X^T X + ridge I)^-1 x for each token, the rows x of X being its sketched keys, centred.

    keys:       [num_pages, block_size, head_size] float32 | bfloat16 | float16 | float8_e4m3fn | float8_e5m2, RoPE
                applied: a view of the whole pool of pages. The token or the head_size dimension is contiguous
    page_table: [num_kv_heads, max_pages] int64, page id of each logical page of each KV head. Slots outside of
                ``start`` to ``end`` are never read
    start, end: cache indices of the first token and past the last; they are also the positions of the tokens
    rotary:     how the keys were rotated
    sketch:     [head_size, rank] float64, what keys are multiplied by when they are turned back
    ridge:      added to the eigenvalues of X^T X, beside 1e-12 of their sum
    key_scale:  what stored keys are to be multiplied by
    returns:    [num_kv_heads, end - start] float32

    Keys are turned back in float32; sums, moments and the rest are float64, in which one pass over the keys is enough.
    The kernels add up k k^T rather than sketched rows, which takes the sketch out of the pass, and use the sketch and
    the factors of the inverse as one map in the second pass; the factorisation between them is torch's. CPU tensors use
    csrc/cpu/leverage.cpp where it was built, CUDA tensors the Triton kernels, everything else ``leverage_reference``.
    No scratch memory grows with the tokens. Results do not depend on the number of threads.

    Raises ValueError for a wrong shape, dtype, device or stride, or a page id outside the pool; MemoryError if the
    scratch memory cannot be had.
    """
    check_arguments(keys, page_table, start, end, rotary, sketch)
    if keys.device.type == "cuda":
        return _launch(keys, page_table, start, end, rotary, sketch, ridge, key_scale)
    moments = function("kvevict_key_moments", keys.device)
    norms = function("kvevict_mapped_norms", keys.device)
    if moments is None or norms is None:
        return leverage_reference(keys, page_table, start, end, rotary, sketch, ridge, key_scale)
    num_kv_heads, head_size = len(page_table), keys.shape[2]
    table = rotary.cos_sin
    shared = (
        keys.data_ptr(), *keys.stride(),
        page_table.data_ptr(), page_table.stride(0),
        DTYPE_CODES[keys.dtype], num_kv_heads, head_size, keys.shape[1], start, end - start, key_scale,
        table.data_ptr(), table.stride(0), DTYPE_CODES[table.dtype], table.shape[1], rotary.is_neox_style,
    )  # fmt: skip
    total = torch.empty(num_kv_heads, 1, head_size, dtype=torch.float64)
    moment = torch.empty(num_kv_heads, head_size, head_size, dtype=torch.float64)
    failed = moments(*shared, total.data_ptr(), moment.data_ptr())
    if not failed:
        mean, whitening = whiten(total, moment, end - start, sketch, ridge)
        linear = F.pad(sketch @ whitening, (0, -sketch.shape[1] % 16))  # rows of whole vectors
        leverages = torch.empty(num_kv_heads, end - start, dtype=torch.float32)
        failed = norms(*shared, mean.data_ptr(), linear.data_ptr(), linear.shape[2], leverages.data_ptr())
    if failed:
        raise MemoryError(f"leverage: no scratch memory for {num_kv_heads} heads of size {head_size}.")
    return leverages


def check_arguments(
    keys: torch.Tensor, page_table: torch.Tensor, start: int, end: int, rotary: Rotary, sketch: torch.Tensor
) -> None:
    """Raise ValueError unless the arguments are as ``leverage`` documents them."""
    check_keys(keys)
    check_page_table(page_table, keys.device)
    num_tokens, block_size = page_table.shape[1] * keys.shape[1], keys.shape[1]
    if not 0 <= start < end <= min(num_tokens, len(rotary.cos_sin)):
        raise ValueError(
            f"`start`, `end`: expected a range of the {num_tokens} tokens of the page table and the "
            f"{len(rotary.cos_sin)} positions of the rotary table, got {start} to {end}."
        )
    head_size, table = keys.shape[2], rotary.cos_sin
    if (
        table.shape[1] > head_size
        or table.stride(1) != 1
        or table.dtype not in QUERY_DTYPES
        or keys.device != table.device
    ):
        raise ValueError(
            f"`rotary`: expected floats of 16 or 32 bits for at most {head_size} dimensions on {keys.device}, rows "
            f"contiguous, got {table.dtype} {tuple(table.shape)} on {table.device}, strides {table.stride()}."
        )
    if sketch.dim() != 2 or len(sketch) != head_size or sketch.dtype != torch.float64 or sketch.device != keys.device:
        raise ValueError(
            f"`sketch`: expected float64 [{head_size}, rank] on {keys.device}, "
            f"got {sketch.dtype} {tuple(sketch.shape)} on {sketch.device}."
        )
    check_page_ids(page_table[:, start // block_size : -(-end // block_size)], len(keys))


def whiten(
    total: torch.Tensor, moment: torch.Tensor, count: int, sketch: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of rows and W with W W^T = (S^T C S + ridge I)^-1, C being their centred moment.

    total:   [num_kv_heads, 1, size] float64, sum of ``count`` rows
    moment:  [num_kv_heads, size, size] float64, sum of their outer products
    sketch:  [size, rank] float64, S
    returns: [num_kv_heads, 1, size], and [num_kv_heads, rank, rank] float64
    """
    mean = total / count
    gram = sketch.mT @ torch.nan_to_num(moment - mean.mT @ total, 0.0, 0.0, 0.0) @ sketch
    return mean, _inverse_root((gram + gram.mT) / 2, ridge)


def _inverse_root(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return W [num_kv_heads, rank, rank] float64 with W W^T = (G + (ridge + share) I)^-1.

    The share is one of the trace of G, by which G has an inverse even where few rows made it. So nobody has to look
    whether it could be factorised: on a GPU the host would wait for that.

    gram: [num_kv_heads, rank, rank] float64, symmetric, no eigenvalue below 0 but by rounding
    """
    size = gram.shape[-1]
    least = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) * LEAST_SHARE
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    lifted = gram + (least + ridge).clamp(min=torch.finfo(torch.float32).tiny)[..., None, None] * identity
    factor, _ = torch.linalg.cholesky_ex(lifted)
    root: torch.Tensor = torch.linalg.solve_triangular(factor, identity, upper=False).mT
    return root


def _launch(
    keys: torch.Tensor,
    page_table: torch.Tensor,
    start: int,
    end: int,
    rotary: Rotary,
    sketch: torch.Tensor,
    ridge: float,
    key_scale: float,
) -> torch.Tensor:
    """Run the Triton kernels around torch's factorisation."""
    num_kv_heads, head_size = len(page_table), keys.shape[2]
    parts = max(1, min(MOST_PARTS // num_kv_heads, triton.cdiv(end - start, BLOCK_TOKENS)))
    part_tokens = triton.cdiv(end - start, parts)
    rank = triton.cdiv(sketch.shape[1], BLOCK_RANK) * BLOCK_RANK
    shared = (
        keys, page_table, rotary.cos_sin, *keys.stride(), page_table.stride(0), rotary.cos_sin.stride(0),
        start, end, key_scale, head_size,
    )  # fmt: skip
    constants = {
        "BLOCK_SIZE": keys.shape[1], "HALF_ROTARY": rotary.cos_sin.shape[1] // 2, "IS_NEOX": rotary.is_neox_style,
    }  # fmt: skip
    moment = keys.new_empty(num_kv_heads, parts, head_size, head_size, dtype=torch.float64)
    total = keys.new_empty(num_kv_heads, parts, head_size, dtype=torch.float64)
    _moments_kernel[(parts, num_kv_heads, triton.cdiv(head_size, BLOCK_DIMS))](
        *shared, part_tokens, total, moment,
        BLOCK_DIMS=BLOCK_DIMS, HEAD_SIZE_PADDED=triton.next_power_of_2(head_size), **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    sums = total.sum(dim=1, keepdim=True), moment.sum(dim=1)
    mean, whitening = whiten(*sums, end - start, sketch, ridge)
    linear = F.pad(sketch @ whitening, (0, rank - sketch.shape[1]))
    leverages = keys.new_empty(num_kv_heads, end - start, dtype=torch.float32)
    _norms_kernel[(triton.cdiv(end - start, BLOCK_TOKENS), num_kv_heads)](
        *shared, mean, linear, rank, leverages,
        BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_RANK=BLOCK_RANK, **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    return leverages


@triton.jit
def unrotated(
    key, cos_sin, key_stride_dim, key_scale, dim, live,
    HALF_ROTARY: tl.constexpr, IS_NEOX: tl.constexpr,
):  # fmt: skip
    """Return element ``dim`` of keys before their rotation, float64; ``key`` and ``cos_sin`` point to their rows."""
    turned = dim < 2 * HALF_ROTARY
    if IS_NEOX:
        pair = dim % HALF_ROTARY
        is_second = dim >= HALF_ROTARY
        partner = tl.where(is_second, dim - HALF_ROTARY, dim + HALF_ROTARY)
    else:
        pair = dim // 2
        is_second = dim % 2 == 1
        partner = tl.where(is_second, dim - 1, dim + 1)
    own = tl.load(key + dim * key_stride_dim, mask=live, other=0.0).to(tl.float32) * key_scale
    other = tl.load(key + partner * key_stride_dim, mask=live & turned, other=0.0).to(tl.float32) * key_scale
    cos = tl.load(cos_sin + pair, mask=live & turned, other=1.0).to(tl.float32)
    sin = tl.load(cos_sin + HALF_ROTARY + pair, mask=live & turned, other=0.0).to(tl.float32)
    squared_magnitude = cos * cos + sin * sin
    # the turn back is by the same angle and divides by the magnitude
    sine = tl.where(is_second, sin, -sin) / squared_magnitude
    return (own * (cos / squared_magnitude) - other * sine).to(tl.float64)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _moments_kernel(
    keys, page_table, cos_sin, key_stride_page, key_stride_token, key_stride_dim, table_stride_head, cos_sin_stride,
    start, end, key_scale, head_size,
    part_tokens, total, moment,
    BLOCK_SIZE: tl.constexpr, HALF_ROTARY: tl.constexpr, IS_NEOX: tl.constexpr,
    BLOCK_DIMS: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    # one program: some rows of the moments of one part of the tokens of one KV head. Rank one by rank one: float64
    # products of blocks are not there for every GPU
    part, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)
    column = tl.arange(0, HEAD_SIZE_PADDED)
    moments = tl.zeros([BLOCK_DIMS, HEAD_SIZE_PADDED], tl.float64)
    totals = tl.zeros([BLOCK_DIMS], tl.float64)
    first = start + part * part_tokens
    for token in range(first, tl.minimum(first + part_tokens, end)):
        # int64 before any multiply: a big pool overflows int32 element offsets
        page = tl.load(page_table + kv_head * table_stride_head + token // BLOCK_SIZE).to(tl.int64)
        key = keys + page * key_stride_page + (token % BLOCK_SIZE) * key_stride_token
        turn = cos_sin + token * cos_sin_stride
        left = unrotated(key, turn, key_stride_dim, key_scale, row, row < head_size, HALF_ROTARY, IS_NEOX)
        right = unrotated(key, turn, key_stride_dim, key_scale, column, column < head_size, HALF_ROTARY, IS_NEOX)
        moments += left[:, None] * right[None, :]
        totals += left
    out = (kv_head * tl.num_programs(0) + part) * head_size
    tl.store(total + out + row, totals, mask=row < head_size)
    tl.store(
        moment + (out + row[:, None]) * head_size + column[None, :], moments,
        mask=(row < head_size)[:, None] & (column < head_size)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _norms_kernel(
    keys, page_table, cos_sin, key_stride_page, key_stride_token, key_stride_dim, table_stride_head, cos_sin_stride,
    start, end, key_scale, head_size,
    mean, linear, rank, norms,
    BLOCK_SIZE: tl.constexpr, HALF_ROTARY: tl.constexpr, IS_NEOX: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    # one program: the squared lengths of one tile of keys after the map, some columns of it at a time
    kv_head = tl.program_id(1)
    token = start + tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < end
    page = tl.load(page_table + kv_head * table_stride_head + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    key = keys + page * key_stride_page + (token % BLOCK_SIZE) * key_stride_token
    turn = cos_sin + token * cos_sin_stride
    lengths = tl.zeros([BLOCK_TOKENS], tl.float64)
    for first in range(0, rank, BLOCK_RANK):
        column = first + tl.arange(0, BLOCK_RANK)
        mapped = tl.zeros([BLOCK_TOKENS, BLOCK_RANK], tl.float64)
        for dim in range(head_size):
            centre = tl.load(mean + kv_head * head_size + dim)
            value = unrotated(key, turn, key_stride_dim, key_scale, dim, live, HALF_ROTARY, IS_NEOX) - centre
            mapped += value[:, None] * tl.load(linear + (kv_head * head_size + dim) * rank + column)[None, :]
        lengths += tl.sum(mapped * mapped, axis=1)
    tl.store(norms + kv_head * (end - start) + token - start, lengths.to(tl.float32), mask=live)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Return how the kernels are compiled for bfloat16, a head size of 128, NeoX rotation and pages of 16 tokens."""
    types = dict.fromkeys(_norms_kernel.arg_names[:12], "i32")
    types |= {"keys": "*bf16", "page_table": "*i64", "cos_sin": "*bf16", "key_scale": "fp32"}
    of_moments = {"part_tokens": "i32", "total": "*fp64", "moment": "*fp64"}
    of_norms = {"mean": "*fp64", "linear": "*fp64", "rank": "i32", "norms": "*fp32"}
    constants = {"BLOCK_SIZE": 16, "HALF_ROTARY": 64, "IS_NEOX": True}
    blocks = (
        {"BLOCK_DIMS": BLOCK_DIMS, "HEAD_SIZE_PADDED": 128},
        {"BLOCK_TOKENS": BLOCK_TOKENS, "BLOCK_RANK": BLOCK_RANK},
    )
    return [
        (_moments_kernel, types | of_moments, constants | blocks[0], NUM_WARPS),
        (_norms_kernel, types | of_norms, constants | blocks[1], NUM_WARPS),
    ]


def leverage_reference(
    keys: torch.Tensor,
    page_table: torch.Tensor,
    start: int,
    end: int,
    rotary: Rotary,
    sketch: torch.Tensor,
    ridge: float,
    key_scale: float = 1.0,
) -> torch.Tensor:
    """The definition of ``leverage`` in plain torch, tile by tile: same arguments and result."""
    tiles = [(first, min(first + REFERENCE_TOKENS, end)) for first in range(start, end, REFERENCE_TOKENS)]

    def sketched(first: int, last: int) -> torch.Tensor:
        index = torch.arange(first, last, device=keys.device)
        gathered = keys[page_table[:, index // keys.shape[1]], index % keys.shape[1]].float() * key_scale
        return rotary.unrotate(gathered, index).double() @ sketch  # [num_kv_heads, last - first, rank]

    total, moment = torch.zeros((), device=keys.device), torch.zeros((), device=keys.device)
    for tile in tiles:
        rows = sketched(*tile)
        total, moment = total + rows.sum(dim=1, keepdim=True), moment + rows.mT @ rows
    identity = torch.eye(sketch.shape[1], dtype=torch.float64, device=keys.device)
    mean, whitening = whiten(total, moment, end - start, identity, ridge)
    parts = [((sketched(*tile) - mean) @ whitening).square().sum(dim=-1).float() for tile in tiles]
    return torch.cat(parts, dim=1)
