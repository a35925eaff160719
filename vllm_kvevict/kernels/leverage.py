"""Leverage scores of keys before their rotation, sketched by a Gaussian matrix, read through the page table."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvevict.kernels.native import function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import (
    DTYPE_CODES,
    QUERY_DTYPES,
    check_contiguous,
    check_keys,
    check_page_ids,
    check_page_table,
)
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.kernels.whitening import mean_and_map, whiten

REFERENCE_TOKENS = 1024
# Of the Triton kernels: programs that share the tokens of a block in the first pass, over its KV heads, and the fewest
# tokens that each of them has; rows of moments, tokens and columns of a program, and numbers of one that adds up parts.
MOST_PARTS, LEAST_PART_TOKENS = 128, 256
BLOCK_DIMS, BLOCK_TOKENS, BLOCK_RANK, BLOCK_SUMS, NUM_WARPS = 16, 64, 32, 1024, 8
# What differs from call to call: a kernel is compiled for none of it.
_VARYING = ("table_stride_req", "table_stride_head", "num_kv_heads", "parts", "most_parts", "max_tokens")
_UNALIGNED = ("page_table", "blocks")  # views into the table of all layers, and into the blocks of all pieces


@operator(
    "(Tensor keys, Tensor page_table, Tensor blocks, SymInt max_tokens, Tensor cos_sin, bool is_neox_style, "
    "Tensor sketch, float ridge, float key_scale=1.0) -> Tensor",
    fake=lambda keys, page_table, blocks, max_tokens, *arguments: keys.new_empty(
        len(blocks), page_table.shape[1], max_tokens, dtype=torch.float32
    ),
    groups={4: Rotary},
)
def leverage(
    keys: torch.Tensor,
    page_table: torch.Tensor,
    blocks: torch.Tensor,
    max_tokens: int,
    rotary: Rotary,
    sketch: torch.Tensor,
    ridge: float,
    key_scale: float = 1.0,
) -> torch.Tensor:
    """Return x^T (X^T X + ridge I)^-1 x for each token of some blocks, the rows x of X being the sketched keys of its
    block, centred.

    keys:       [num_pages, block_size, head_size] float32 | bfloat16 | float16 | float8_e4m3fn | float8_e5m2, RoPE
                applied: a view of the whole pool of pages. The token or the head_size dimension is contiguous
    page_table: [num_reqs, num_kv_heads, max_pages] int64, page id of each logical page of each KV head, rows
                contiguous. Slots outside of the blocks are never read
    blocks:     [num_blocks, 3] int64, contiguous: of each the row of the page table, the cache index of its first token
                and that past its last; these are also their positions. At least one token each; they may overlap
    max_tokens: tokens of the longest block, or more
    rotary:     how the keys were rotated
    sketch:     [head_size, rank] float64, what keys are multiplied by when they are turned back
    ridge:      added to the eigenvalues of X^T X, beside 1e-12 of their sum
    key_scale:  what stored keys are to be multiplied by
    returns:    [num_blocks, num_kv_heads, max_tokens] float32; anything behind the tokens of a block

    Keys are turned back in float32; sums, moments and the rest are float64, in which one pass over the keys is enough.
    The kernels add up k k^T rather than sketched rows, which takes the sketch out of the pass, and use the sketch and
    the factors of the inverse as one map in the second pass; between them torch factorises (``whiten``). CPU tensors
    use csrc/cpu/leverage.cpp where it was built, CUDA tensors the Triton kernels, everything else the reference. No
    scratch memory grows with the tokens; ``block_bytes`` says what a block takes. The kernels compute a block the
    same whatever the others are, and whatever ``max_tokens`` is; so does torch on one thread of a CPU. The result of
    the C++ does not depend on the number of threads.

    Raises ValueError for a wrong shape, dtype, device or stride and, on CPU, for a wrong block or a page id outside the
    pool, which would have to wait for a GPU; MemoryError if the scratch memory cannot be had.
    """
    check_arguments(keys, page_table, blocks, rotary, sketch)
    if keys.device.type == "cuda":
        return _launch(keys, page_table, blocks, max_tokens, rotary, sketch, ridge, key_scale)
    check_blocks(keys, page_table, blocks, max_tokens, rotary)
    moments = function("kvevict_key_moments", keys.device)
    norms = function("kvevict_mapped_norms", keys.device)
    if moments is None or norms is None:
        return leverage_reference(keys, page_table, blocks, max_tokens, rotary, sketch, ridge, key_scale)
    num_blocks, num_kv_heads, head_size = len(blocks), page_table.shape[1], keys.shape[2]
    table = rotary.cos_sin
    shared = (
        keys.data_ptr(), *keys.stride(),
        page_table.data_ptr(), *page_table.stride()[:2], blocks.data_ptr(),
        DTYPE_CODES[keys.dtype], num_blocks, num_kv_heads, head_size, keys.shape[1], key_scale,
        table.data_ptr(), table.stride(0), DTYPE_CODES[table.dtype], table.shape[1], rotary.is_neox_style,
    )  # fmt: skip
    total = torch.empty(num_blocks, num_kv_heads, 1, head_size, dtype=torch.float64)
    moment = torch.empty(num_blocks, num_kv_heads, head_size, head_size, dtype=torch.float64)
    failed = moments(*shared, total.data_ptr(), moment.data_ptr())
    if not failed:
        # rows of whole vectors
        mean, linear = mean_and_map(total, moment, blocks[:, 2] - blocks[:, 1], sketch, ridge, 16)
        leverages = torch.empty(num_blocks, num_kv_heads, max_tokens, dtype=torch.float32)
        failed = norms(*shared, mean.data_ptr(), linear.data_ptr(), linear.shape[2], leverages.data_ptr(), max_tokens)
    if failed:
        raise MemoryError(f"leverage: no scratch memory for {num_kv_heads} heads of size {head_size}.")
    return leverages


def block_bytes(num_kv_heads: int, head_size: int, rank: int, max_tokens: int) -> int:
    """Return what ``leverage`` holds at most for each of its blocks, beside the result.

    Triton holds that. The C++ holds less, as it holds the parts of one block at a time.
    """
    sums = _num_parts(num_kv_heads, max_tokens) * (head_size + 1) * head_size
    columns = -(-rank // BLOCK_RANK) * BLOCK_RANK
    # centred moments and their product with the sketch, then the matrices of the factorisation
    between = max(head_size * (head_size + columns), 5 * columns**2, (head_size + columns) * columns)
    return 8 * num_kv_heads * (sums + head_size + between)


def _num_parts(num_kv_heads: int, max_tokens: int) -> int:
    """Return the most programs that share the tokens of one KV head of a block."""
    return min(_most_parts(num_kv_heads), -(-max_tokens // LEAST_PART_TOKENS))


def _most_parts(num_kv_heads: int) -> int:
    return max(1, MOST_PARTS // num_kv_heads)


def check_arguments(
    keys: torch.Tensor, page_table: torch.Tensor, blocks: torch.Tensor, rotary: Rotary, sketch: torch.Tensor
) -> None:
    """Raise ValueError unless the arguments are as documented, as far as it shows without reading a tensor."""
    check_keys(keys)
    check_page_table(page_table, keys.device, len(page_table))
    check_contiguous("blocks", blocks, (max(len(blocks), 1), 3), torch.int64, keys.device)
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


def check_blocks(
    keys: torch.Tensor, page_table: torch.Tensor, blocks: torch.Tensor, max_tokens: int, rotary: Rotary
) -> None:
    """Raise ValueError unless every block and every page id that is read is as documented."""
    num_pages, block_size = keys.shape[:2]
    num_reqs, _, max_pages = page_table.shape
    num_tokens, num_positions = max_pages * block_size, len(rotary.cos_sin)
    for row, start, end in blocks.tolist():
        within = 0 <= start < end <= min(num_tokens, num_positions)
        if not (0 <= row < num_reqs and within and end - start <= max_tokens):
            raise ValueError(
                f"`blocks`: expected a row below {num_reqs} and a range of 1 to {max_tokens} of the {num_tokens} "
                f"tokens of the page table and the {num_positions} positions of the rotary table, got {start} to "
                f"{end} of row {row}."
            )
        check_page_ids(page_table[row, :, start // block_size : -(-end // block_size)], num_pages)


def _launch(
    keys: torch.Tensor,
    page_table: torch.Tensor,
    blocks: torch.Tensor,
    max_tokens: int,
    rotary: Rotary,
    sketch: torch.Tensor,
    ridge: float,
    key_scale: float = 1.0,
) -> torch.Tensor:
    """Run the Triton kernels around torch's factorisation, each once for all blocks."""
    num_blocks, num_kv_heads, head_size = len(blocks), page_table.shape[1], keys.shape[2]
    num_items = num_blocks * num_kv_heads
    parts, most_parts = _num_parts(num_kv_heads, max_tokens), _most_parts(num_kv_heads)
    shared = (
        keys, page_table, blocks, rotary.cos_sin, *keys.stride(), *page_table.stride()[:2], rotary.cos_sin.stride(0),
        num_kv_heads, key_scale, head_size,
    )  # fmt: skip
    constants = {
        "BLOCK_SIZE": keys.shape[1], "HALF_ROTARY": rotary.cos_sin.shape[1] // 2, "IS_NEOX": rotary.is_neox_style,
    }  # fmt: skip
    # of each part its moments, and in the row behind them the sum of its keys
    sums = keys.new_empty(num_blocks, num_kv_heads, parts, head_size + 1, head_size, dtype=torch.float64)
    _moments_kernel[(num_items, parts, triton.cdiv(head_size, BLOCK_DIMS))](
        *shared, most_parts, sums,
        BLOCK_DIMS=BLOCK_DIMS, HEAD_SIZE_PADDED=triton.next_power_of_2(head_size), LEAST_PART_TOKENS=LEAST_PART_TOKENS,
        **constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    _join_kernel[(num_items, triton.cdiv((head_size + 1) * head_size, BLOCK_SUMS))](
        blocks, num_kv_heads, head_size, parts, most_parts, sums,
        BLOCK_SUMS=BLOCK_SUMS, LEAST_PART_TOKENS=LEAST_PART_TOKENS, num_warps=NUM_WARPS,
    )  # fmt: skip
    moment, total = sums[:, :, 0].split((head_size, 1), dim=2)
    mean, linear = mean_and_map(total, moment, blocks[:, 2] - blocks[:, 1], sketch, ridge, BLOCK_RANK)
    leverages = keys.new_empty(num_blocks, num_kv_heads, max_tokens, dtype=torch.float32)
    _norms_kernel[(num_items, triton.cdiv(max_tokens, BLOCK_TOKENS))](
        *shared, mean, linear, linear.shape[2], leverages, max_tokens,
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


@triton.jit
def _locate(page_table, table_stride_req, table_stride_head, blocks, num_kv_heads, item):
    # the pages of one KV head in one block, its first token and the one past its last. All int64: a big pool overflows
    # int32 element offsets
    block = blocks + item // num_kv_heads * 3
    pages = page_table + tl.load(block) * table_stride_req + item % num_kv_heads * table_stride_head
    return pages, tl.load(block + 1), tl.load(block + 2)


@triton.jit
def _part_tokens(length, most_parts, LEAST_PART_TOKENS: tl.constexpr):
    # a block is cut as if it were alone: no bit of it depends on the others
    return tl.maximum(tl.cdiv(length, most_parts), LEAST_PART_TOKENS)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _moments_kernel(
    keys, page_table, blocks, cos_sin, key_stride_page, key_stride_token, key_stride_dim,
    table_stride_req, table_stride_head, cos_sin_stride, num_kv_heads, key_scale, head_size,
    most_parts, sums,
    BLOCK_SIZE: tl.constexpr, HALF_ROTARY: tl.constexpr, IS_NEOX: tl.constexpr,
    BLOCK_DIMS: tl.constexpr, HEAD_SIZE_PADDED: tl.constexpr, LEAST_PART_TOKENS: tl.constexpr,
):  # fmt: skip
    # one program: some rows of the moments of one part of the tokens of one KV head. Rank one by rank one: float64
    # products of blocks are not there for every GPU
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pages, start, end = _locate(page_table, table_stride_req, table_stride_head, blocks, num_kv_heads, item)
    part_tokens = _part_tokens(end - start, most_parts, LEAST_PART_TOKENS)
    first = start + part * part_tokens
    if first >= end:
        return
    row = tl.program_id(2) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)
    column = tl.arange(0, HEAD_SIZE_PADDED)
    moments = tl.zeros([BLOCK_DIMS, HEAD_SIZE_PADDED], tl.float64)
    totals = tl.zeros([BLOCK_DIMS], tl.float64)
    for token in range(first, tl.minimum(first + part_tokens, end)):
        key = keys + tl.load(pages + token // BLOCK_SIZE) * key_stride_page + (token % BLOCK_SIZE) * key_stride_token
        turn = cos_sin + token * cos_sin_stride
        left = unrotated(key, turn, key_stride_dim, key_scale, row, row < head_size, HALF_ROTARY, IS_NEOX)
        right = unrotated(key, turn, key_stride_dim, key_scale, column, column < head_size, HALF_ROTARY, IS_NEOX)
        moments += left[:, None] * right[None, :]
        totals += left
    out = sums + (item * tl.num_programs(1) + part) * (head_size + 1) * head_size
    tl.store(out + head_size * head_size + row, totals, mask=row < head_size)
    tl.store(
        out + row[:, None] * head_size + column[None, :], moments,
        mask=(row < head_size)[:, None] & (column < head_size)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _join_kernel(
    blocks, num_kv_heads, head_size, parts, most_parts, sums,
    BLOCK_SUMS: tl.constexpr, LEAST_PART_TOKENS: tl.constexpr,
):  # fmt: skip
    # one program: adds some sums of all parts of the tokens of one KV head to those of the first, in order
    item = tl.program_id(0).to(tl.int64)
    block = blocks + item // num_kv_heads * 3
    length = tl.load(block + 2) - tl.load(block + 1)
    size = (head_size + 1) * head_size
    at = tl.program_id(1) * BLOCK_SUMS + tl.arange(0, BLOCK_SUMS)
    out = sums + item * parts * size + at
    joined = tl.load(out, mask=at < size, other=0.0)
    for part in range(1, tl.cdiv(length, _part_tokens(length, most_parts, LEAST_PART_TOKENS))):
        joined += tl.load(out + part * size, mask=at < size, other=0.0)
    tl.store(out, joined, mask=at < size)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _norms_kernel(
    keys, page_table, blocks, cos_sin, key_stride_page, key_stride_token, key_stride_dim,
    table_stride_req, table_stride_head, cos_sin_stride, num_kv_heads, key_scale, head_size,
    mean, linear, rank, norms, max_tokens,
    BLOCK_SIZE: tl.constexpr, HALF_ROTARY: tl.constexpr, IS_NEOX: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    # one program: the squared lengths of one tile of keys after the map, some columns of it at a time
    item = tl.program_id(0).to(tl.int64)
    pages, start, end = _locate(page_table, table_stride_req, table_stride_head, blocks, num_kv_heads, item)
    first_token = tl.program_id(1) * BLOCK_TOKENS
    if start + first_token >= end:
        return
    in_block = first_token + tl.arange(0, BLOCK_TOKENS)
    token = tl.minimum(start + in_block, end - 1)  # the last one again behind it: nothing that is read needs a mask
    page = tl.load(pages + token // BLOCK_SIZE)
    key = keys + page * key_stride_page + (token % BLOCK_SIZE) * key_stride_token
    turn = cos_sin + token * cos_sin_stride
    centres, rows = mean + item * head_size, linear + item * head_size * rank
    lengths = tl.zeros([BLOCK_TOKENS], tl.float64)
    for first in range(0, rank, BLOCK_RANK):
        column = first + tl.arange(0, BLOCK_RANK)
        mapped = tl.zeros([BLOCK_TOKENS, BLOCK_RANK], tl.float64)
        for dim in range(head_size):
            value = unrotated(key, turn, key_stride_dim, key_scale, dim, True, HALF_ROTARY, IS_NEOX)
            mapped += (value - tl.load(centres + dim))[:, None] * tl.load(rows + dim * rank + column)[None, :]
        lengths += tl.sum(mapped * mapped, axis=1)
    tl.store(norms + item * max_tokens + in_block, lengths.to(tl.float32), mask=start + in_block < end)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Return how the kernels are compiled for bfloat16, a head size of 128, NeoX rotation and pages of 16 tokens."""
    pointers = {"keys": "*bf16", "page_table": "*i64", "blocks": "*i64", "cos_sin": "*bf16", "norms": "*fp32"}
    pointers |= dict.fromkeys(("sums", "mean", "linear"), "*fp64")
    of_keys = {"BLOCK_SIZE": 16, "HALF_ROTARY": 64, "IS_NEOX": True}
    of_parts = {"LEAST_PART_TOKENS": LEAST_PART_TOKENS}
    constants = {
        _moments_kernel: of_keys | {"BLOCK_DIMS": BLOCK_DIMS, "HEAD_SIZE_PADDED": 128} | of_parts,
        _join_kernel: {"BLOCK_SUMS": BLOCK_SUMS} | of_parts,
        _norms_kernel: of_keys | {"BLOCK_TOKENS": BLOCK_TOKENS, "BLOCK_RANK": BLOCK_RANK},
    }
    signatures = []
    for kernel, fixed in constants.items():
        free = [name for name in kernel.arg_names if name not in fixed]
        types = {name: pointers.get(name, "fp32" if name == "key_scale" else "i32") for name in free}
        signatures.append((kernel, types, fixed, NUM_WARPS))
    return signatures


def leverage_reference(
    keys: torch.Tensor,
    page_table: torch.Tensor,
    blocks: torch.Tensor,
    max_tokens: int,
    rotary: Rotary,
    sketch: torch.Tensor,
    ridge: float,
    key_scale: float = 1.0,
) -> torch.Tensor:
    """The definition of ``leverage`` in plain torch, block by block, tile by tile: same arguments and result."""
    leverages = keys.new_empty(len(blocks), page_table.shape[1], max_tokens, dtype=torch.float32)
    identity = torch.eye(sketch.shape[1], dtype=torch.float64, device=keys.device)

    def sketched(pages: torch.Tensor, first: int, last: int) -> torch.Tensor:
        index = torch.arange(first, last, device=keys.device)
        gathered = keys[pages[:, index // keys.shape[1]], index % keys.shape[1]].float() * key_scale
        return rotary.unrotate(gathered, index).double() @ sketch  # [num_kv_heads, last - first, rank]

    for of_block, (row, start, end) in zip(leverages, blocks.tolist(), strict=True):
        pages = page_table[row]
        tiles = [(first, min(first + REFERENCE_TOKENS, end)) for first in range(start, end, REFERENCE_TOKENS)]
        total, moment = torch.zeros((), device=keys.device), torch.zeros((), device=keys.device)
        for tile in tiles:
            rows = sketched(pages, *tile)
            total, moment = total + rows.sum(dim=1, keepdim=True), moment + rows.mT @ rows
        count = torch.full((1,), end - start, device=keys.device)
        mean, whitening = whiten(total[None], moment[None], count, identity, ridge)
        for first, last in tiles:
            mapped = (sketched(pages, first, last) - mean[0]) @ whitening
            of_block[:, first - start : last - start] = mapped.square().sum(dim=-1)
    return leverages
