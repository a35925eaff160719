"""A decode step of the page table in one pass: rows take the pages of new blocks, the batch's are copied."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vllm_kvevict.kernels.native import function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import check_contiguous, check_rows

# what a warp of the Triton kernel handles at a time: 16 bytes of page ids per thread
_COLUMNS, _NUM_WARPS = 128, 1


class BatchBlocks(NamedTuple):
    """Which blocks the requests of a batch enter. Block ``b`` of a request has column ``num_pages + b - num_blocks``.

    slots:       [num_reqs] int64, where the table has each request; none occurs twice, which is not checked
    num_blocks:  [num_reqs] int64, blocks that a request had when its rows got ``num_pages`` pages
    first_block: [num_reqs] int64, the first block that a request enters
    end_block:   [num_reqs] int64, the one after the last; ``first_block`` if it enters none
    new_tokens:  [num_reqs] int64, tokens to add to the lengths of its rows
    block_table: [num_reqs, max_blocks] int64, rows contiguous; blocks that no request enters are never read
    """

    slots: torch.Tensor
    num_blocks: torch.Tensor
    first_block: torch.Tensor
    end_block: torch.Tensor
    new_tokens: torch.Tensor
    block_table: torch.Tensor


def _empty_rows(pages: torch.Tensor, batch: BatchBlocks, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = pages.new_empty(pages.shape[0], len(batch.slots), pages.shape[2], num_columns)
    return rows, pages.new_empty(rows.shape[:3])


@operator(
    "(Tensor(a!) pages, Tensor num_pages, Tensor kv_lens, Tensor layer_offset, int block_stride, Tensor slots, "
    "Tensor num_blocks, Tensor first_block, Tensor end_block, Tensor new_tokens, Tensor block_table, "
    "SymInt num_columns) -> (Tensor, Tensor)",
    fake=lambda pages, num_pages, kv_lens, layer_offset, block_stride, batch, num_columns: _empty_rows(
        pages, batch, num_columns
    ),
    groups={5: BatchBlocks},
)
def page_table_update(
    pages: torch.Tensor,
    num_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    layer_offset: torch.Tensor,
    block_stride: int,
    batch: BatchBlocks,
    num_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: write the pages of the blocks that each request enters into its rows; return the rows of the batch.

    pages:        [num_layers, max_num_reqs, num_kv_heads, max_pages] int32, contiguous, changed in place
    num_pages:    [num_layers, max_num_reqs, num_kv_heads] int64, contiguous, see ``BatchBlocks``
    kv_lens:      [num_layers, max_num_reqs, num_kv_heads] int32, contiguous, tokens of each row
    layer_offset: [num_layers] int64, page id of (layer, block 0, head 0)
    block_stride: page ids from one block to the next; heads of one block are neighbours
    num_columns:  columns to return, at most max_pages
    returns:      copies of the rows of the batch: page ids [num_layers, num_reqs, num_kv_heads, num_columns] int32, the
                  new ones included, and lengths [num_layers, num_reqs, num_kv_heads] int32, the new tokens included

    CPU tensors use csrc/cpu/page_table_update.cpp where it was built, else ``page_table_update_reference``; CUDA
    tensors use the Triton kernel. The result of none depends on the number of threads.

    Raises ValueError for a wrong shape, dtype, device or stride, and on the CPU for a slot, block or column outside its
    table, before anything is changed. A GPU would have to be waited for to tell: there such a column is left out, and
    slots are not checked.
    """
    check_arguments(pages, num_pages, kv_lens, layer_offset, batch, num_columns)
    if pages.device.type == "cuda":
        return page_table_update_triton(pages, num_pages, kv_lens, layer_offset, block_stride, batch, num_columns)
    kernel = function("kvevict_page_table_update", pages.device)
    if kernel is None:
        return page_table_update_reference(pages, num_pages, kv_lens, layer_offset, block_stride, batch, num_columns)
    rows, lens = _empty_rows(pages, batch, num_columns)
    status = kernel(
        *(tensor.data_ptr() for tensor in (pages, num_pages, kv_lens, layer_offset)),
        *(tensor.data_ptr() for tensor in batch),
        batch.block_table.stride(0), batch.block_table.shape[1],
        rows.data_ptr(), lens.data_ptr(),
        *pages.shape, len(batch.slots), block_stride, num_columns,
    )  # fmt: skip
    if status != 0:
        raise _outside()
    return rows, lens


def check_arguments(
    pages: torch.Tensor,
    num_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    layer_offset: torch.Tensor,
    batch: BatchBlocks,
    num_columns: int,
) -> None:
    """Raise ValueError unless the arguments are as ``page_table_update`` documents them, whatever they hold."""
    if pages.dim() != 4 or 0 in pages.shape:
        raise ValueError(
            f"`pages`: expected [num_layers, max_num_reqs, num_kv_heads, max_pages], got shape {tuple(pages.shape)}."
        )
    if not 0 < num_columns <= pages.shape[3]:
        raise ValueError(f"`num_columns`: expected 1 to {pages.shape[3]}, got {num_columns}.")
    rows, reqs = pages.shape[:3], batch.slots.shape[:1]
    check_contiguous("pages", pages, pages.shape, torch.int32, pages.device)
    check_contiguous("num_pages", num_pages, rows, torch.int64, pages.device)
    check_contiguous("kv_lens", kv_lens, rows, torch.int32, pages.device)
    check_contiguous("layer_offset", layer_offset, rows[:1], torch.int64, pages.device)
    for name in ("slots", "num_blocks", "first_block", "end_block", "new_tokens"):
        check_contiguous(name, getattr(batch, name), reqs, torch.int64, pages.device)
    table = batch.block_table
    if table.dim() != 2 or len(table) != len(batch.slots):
        raise ValueError(f"`block_table`: expected [{len(batch.slots)}, max_blocks], got shape {tuple(table.shape)}.")
    check_rows("block_table", table, pages.device)


def _outside() -> ValueError:
    return ValueError("`batch`: expected slots, blocks and columns within their tables, got some outside.")


def page_table_update_triton(
    pages: torch.Tensor,
    num_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    layer_offset: torch.Tensor,
    block_stride: int,
    batch: BatchBlocks,
    num_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: launch the Triton kernel; arguments and result of ``page_table_update``."""
    num_layers, max_num_reqs, num_kv_heads, max_pages = pages.shape
    rows, lens = _empty_rows(pages, batch, num_columns)
    if len(batch.slots):
        _page_table_update_kernel[(len(batch.slots), num_layers * num_kv_heads)](
            pages, num_pages, kv_lens, layer_offset,
            *batch, batch.block_table.stride(0), batch.block_table.shape[1],
            rows, lens,
            len(batch.slots), max_num_reqs, num_kv_heads, max_pages, block_stride, num_columns,
            COLUMNS=_COLUMNS, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return rows, lens


@triton.jit
def _page_table_update_kernel(
    pages_ptr, num_pages_ptr, kv_lens_ptr, layer_offset_ptr,
    slots_ptr, num_blocks_ptr, first_block_ptr, end_block_ptr, new_tokens_ptr,
    block_table_ptr, block_table_stride_req, max_blocks,
    out_pages_ptr, out_lens_ptr,
    num_reqs, max_num_reqs, num_kv_heads, max_pages, block_stride, num_columns,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    # one program: one request in one layer and KV head; int64 before any multiply by a number of pages
    req = tl.program_id(0).to(tl.int64)
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    row = (layer * max_num_reqs + tl.load(slots_ptr + req)) * num_kv_heads + head
    out_row = (layer * num_reqs + req) * num_kv_heads + head
    first, end = tl.load(first_block_ptr + req), tl.load(end_block_ptr + req)
    first_column = tl.load(num_pages_ptr + row) - tl.load(num_blocks_ptr + req)
    first_page = tl.load(layer_offset_ptr + layer) + head
    for start in range(0, max_pages, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        block = column - first_column
        inside = column < max_pages
        is_new = inside & (block >= first) & (block < end) & (block >= 0) & (block < max_blocks)
        block_id = tl.load(block_table_ptr + req * block_table_stride_req + block, mask=is_new, other=0)
        page = tl.load(pages_ptr + row * max_pages + column, mask=inside & ~is_new, other=0)
        # in registers, not by reading back what another thread may have written
        page = tl.where(is_new, (first_page + block_id * block_stride).to(tl.int32), page)
        tl.store(pages_ptr + row * max_pages + column, page, mask=is_new)
        tl.store(out_pages_ptr + out_row * num_columns + column, page, mask=column < num_columns)
    tl.store(out_lens_ptr + out_row, tl.load(kv_lens_ptr + row) + tl.load(new_tokens_ptr + req).to(tl.int32))


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, int], int]]:
    """Return the kernel, the types of its arguments, its constants and its warps, to compile it without a GPU."""
    int32_pointers = dict.fromkeys(("pages_ptr", "kv_lens_ptr", "out_pages_ptr", "out_lens_ptr"), "*i32")
    sizes = ("max_blocks", "num_reqs", "max_num_reqs", "num_kv_heads", "max_pages", "block_stride", "num_columns")
    names = [name for name in _page_table_update_kernel.arg_names if name != "COLUMNS"]
    types = {name: "*i64" if name.endswith("_ptr") else "i64" for name in names}
    types |= int32_pointers | dict.fromkeys(sizes, "i32")
    return [(_page_table_update_kernel, types, {"COLUMNS": _COLUMNS}, _NUM_WARPS)]


def page_table_update_reference(
    pages: torch.Tensor,
    num_pages: torch.Tensor,
    kv_lens: torch.Tensor,
    layer_offset: torch.Tensor,
    block_stride: int,
    batch: BatchBlocks,
    num_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: the definition of ``page_table_update`` in plain torch, same arguments and result."""
    num_heads, max_pages = pages.shape[2:]
    num_reqs, max_blocks = batch.block_table.shape
    per_row = (num_reqs, 1, 1)  # what a request says, for [num_layers, num_reqs, num_kv_heads, max_pages]
    first, end = batch.first_block.view(per_row), batch.end_block.view(per_row)
    if ((batch.slots < 0) | (batch.slots >= pages.shape[1])).any():
        raise _outside()
    first_column = num_pages[:, batch.slots, :, None] - batch.num_blocks.view(per_row)
    fits = (first >= 0) & (end <= max_blocks) & (first_column + first >= 0) & (first_column + end <= max_pages)
    if not (fits | (first >= end)).all():
        raise _outside()
    block = torch.arange(max_pages, device=pages.device) - first_column
    is_new = (block >= first) & (block < end)
    block_id = batch.block_table[torch.arange(num_reqs, device=pages.device).view(per_row), block * is_new]
    heads = torch.arange(num_heads, device=pages.device)[:, None]
    new_pages = layer_offset.view(-1, 1, 1, 1) + heads + block_id * block_stride
    rows = torch.where(is_new, new_pages.to(torch.int32), pages[:, batch.slots])
    pages[:, batch.slots] = rows
    return rows[..., :num_columns].contiguous(), kv_lens[:, batch.slots] + batch.new_tokens[:, None].to(torch.int32)
