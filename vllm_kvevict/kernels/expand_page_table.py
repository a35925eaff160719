"""The page tables of some layers for one step: kept pages from their lists, later ones from vLLM's block table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vllm_kvevict.kernels.native import function
from vllm_kvevict.kernels.operators import operator
from vllm_kvevict.kernels.optional_triton import tl, triton
from vllm_kvevict.kernels.paged import check_contiguous, check_rows

NEVER = torch.iinfo(torch.int32).max  # own_from of a request whose own blocks hold none of its tokens
# what a program of the Triton kernel handles at a time, and how many share a long list
_COLUMNS, _MAX_SPLITS, _NUM_WARPS = 256, 32, 2


class PageLists(NamedTuple):
    """The pages that evicted requests have kept: one list for each layer and KV head of a request.

    The lists of a request stand one after the other, layer by layer, in entries that its kept blocks own: block b owns
    those from b * num_layers * num_kv_heads on, as many as it has pages.

    arena:     [num_entries] int32, page ids
    block_ids: [max_num_reqs, max_blocks] int32, the kept blocks of each slot
    starts:    [max_num_reqs, num_layers, num_kv_heads] int32, where each list begins among the entries of its request
    counts:    [max_num_reqs, num_layers, num_kv_heads] int32, pages of each list, all of them full
    own_from:  [max_num_reqs] int32, a multiple of the block size: tokens of the text from this one on are where vLLM's
               block table says, and behind the list; ``NEVER`` if there are none
    """

    arena: torch.Tensor
    block_ids: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    own_from: torch.Tensor


class BatchRows(NamedTuple):
    """Some rows of a batch.

    rows:        [num_rows] int32, their numbers in the batch
    slots:       [num_rows] int32, where the lists have their requests; -1 for one that keeps all of its tokens
    seq_lens:    [num_reqs] int32, tokens of the text of each row of the batch, the new ones included; 0: an idle row
    block_table: [num_reqs, max_blocks] int32, vLLM's, rows contiguous
    """

    rows: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class LayerPages(NamedTuple):
    """Where the pages of some layers lie, which follow each other.

    first_layer:  place of the first of them in the lists
    first_pages:  [num_layers] int64, page id of (layer, block 0, head 0); heads of one block are neighbours
    block_stride: page ids from one block to the next
    block_size:   tokens of a page
    """

    first_layer: int
    first_pages: torch.Tensor
    block_stride: int
    block_size: int


@operator(
    "(Tensor arena, Tensor block_ids, Tensor starts, Tensor counts, Tensor own_from, Tensor rows, Tensor slots, "
    "Tensor seq_lens, Tensor block_table, int first_layer, Tensor first_pages, int block_stride, int block_size, "
    "Tensor(a!) pages, Tensor(b!) kv_lens) -> ()",
    fake=lambda lists, batch, at, pages, kv_lens: None,
    groups={0: PageLists, 1: BatchRows, 2: LayerPages},
)
def expand_page_table(
    lists: PageLists, batch: BatchRows, at: LayerPages, pages: torch.Tensor, kv_lens: torch.Tensor
) -> None:
    """In place: write what attention over the rows of a batch reads, each KV head of a row being a sequence.

    pages:   [num_layers, num_sequences, width] int32, contiguous: page ids, up to the last one that the sequence uses.
             What stands behind it stays
    kv_lens: [num_layers, num_sequences] int32, contiguous: tokens of the sequence. An idle row has length 1, on page 0

    A layer has num_rows * num_kv_heads sequences, row by row.

    CPU tensors use csrc/cpu/expand_page_table.cpp where it was built, else ``expand_page_table_reference``; CUDA
    tensors use the Triton kernel, which no size is compiled for: one launch may be captured and replayed with other
    rows and lengths. The result of none depends on the number of threads.

    Raises ValueError for a wrong shape, dtype, device or stride, and on the CPU for a slot, row, block or column
    outside its table, before anything is changed. A GPU would have to be waited for to tell: it leaves such columns
    out.
    """
    check_arguments(lists, batch, at, pages, kv_lens)
    if pages.device.type == "cuda":
        expand_page_table_triton(lists, batch, at, pages, kv_lens)
        return
    kernel = function("kvevict_expand_page_table", pages.device)
    if kernel is None:
        expand_page_table_reference(lists, batch, at, pages, kv_lens)
        return
    table = batch.block_table
    status = kernel(
        *(tensor.data_ptr() for tensor in lists), len(lists.arena), *lists.block_ids.shape, *lists.starts.shape[1:],
        *(tensor.data_ptr() for tensor in batch), len(batch.rows), len(table), table.stride(0), table.shape[1],
        at.first_layer, at.first_pages.data_ptr(), len(at.first_pages), at.block_stride, at.block_size,
        pages.data_ptr(), kv_lens.data_ptr(), pages.shape[2],
    )  # fmt: skip
    if status != 0:
        raise _outside()


def check_arguments(
    lists: PageLists, batch: BatchRows, at: LayerPages, pages: torch.Tensor, kv_lens: torch.Tensor
) -> None:
    """Raise ValueError unless the arguments are as ``expand_page_table`` documents them, whatever they hold."""
    device, shape = pages.device, lists.starts.shape
    if lists.starts.dim() != 3 or 0 in shape:
        raise ValueError(f"`starts`: expected [max_num_reqs, num_layers, num_kv_heads], got shape {tuple(shape)}.")
    if lists.block_ids.dim() != 2:
        raise ValueError(f"`block_ids`: expected [{shape[0]}, max_blocks], got shape {tuple(lists.block_ids.shape)}.")
    check_contiguous("arena", lists.arena, (lists.arena.numel(),), torch.int32, device)
    check_contiguous("block_ids", lists.block_ids, (shape[0], lists.block_ids.shape[1]), torch.int32, device)
    check_contiguous("starts", lists.starts, shape, torch.int32, device)
    check_contiguous("counts", lists.counts, shape, torch.int32, device)
    check_contiguous("own_from", lists.own_from, shape[:1], torch.int32, device)
    check_contiguous("rows", batch.rows, (batch.rows.numel(),), torch.int32, device)
    check_contiguous("slots", batch.slots, batch.rows.shape, torch.int32, device)
    if batch.block_table.dim() != 2:
        raise ValueError(f"`block_table`: expected [num_reqs, max_blocks], got shape {tuple(batch.block_table.shape)}.")
    check_rows("block_table", batch.block_table, device, torch.int32)
    check_contiguous("seq_lens", batch.seq_lens, batch.block_table.shape[:1], torch.int32, device)
    num_layers, num_sequences = at.first_pages.numel(), len(batch.rows) * shape[2]
    if not 0 <= at.first_layer <= shape[1] - num_layers:
        raise ValueError(f"`first_layer`: expected 0 to {shape[1] - num_layers}, got {at.first_layer}.")
    check_contiguous("first_pages", at.first_pages, (num_layers,), torch.int64, device)
    if pages.dim() != 3:
        raise ValueError(f"`pages`: expected [{num_layers}, {num_sequences}, width], got shape {tuple(pages.shape)}.")
    check_contiguous("pages", pages, (num_layers, num_sequences, pages.shape[2]), torch.int32, device)
    check_contiguous("kv_lens", kv_lens, (num_layers, num_sequences), torch.int32, device)


def _outside() -> ValueError:
    return ValueError("`batch`: expected slots, rows, blocks and columns within their tables, got some outside.")


def expand_page_table_triton(
    lists: PageLists, batch: BatchRows, at: LayerPages, pages: torch.Tensor, kv_lens: torch.Tensor
) -> None:
    """In place: launch the Triton kernel; arguments of ``expand_page_table``."""
    num_layers, num_kv_heads = lists.starts.shape[1:]
    if not len(batch.rows):
        return
    width, count = pages.shape[2], len(at.first_pages)
    num_splits = min(triton.cdiv(width, _COLUMNS), _MAX_SPLITS)
    _expand_page_table_kernel[len(batch.rows), count * num_kv_heads, num_splits](
        *lists, lists.block_ids.shape[1], num_layers, num_kv_heads,
        *batch, len(batch.rows), batch.block_table.stride(0), batch.block_table.shape[1],
        *at, pages, kv_lens, width, num_splits,
        COLUMNS=_COLUMNS, num_warps=_NUM_WARPS,
    )  # fmt: skip


_SIZES = (
    "list_blocks", "num_layers", "num_kv_heads", "num_rows", "block_table_stride", "max_blocks", "first_layer",
    "block_stride", "block_size", "width", "num_splits",
)  # fmt: skip


_VIEWS = ("first_pages_ptr", "pages_ptr", "kv_lens_ptr")  # of larger tensors


@triton.jit(do_not_specialize=list(_SIZES), do_not_specialize_on_alignment=list(_VIEWS))
def _expand_page_table_kernel(
    arena_ptr, block_ids_ptr, starts_ptr, counts_ptr, own_from_ptr, list_blocks, num_layers, num_kv_heads,
    rows_ptr, slots_ptr, seq_lens_ptr, block_table_ptr, num_rows, block_table_stride, max_blocks,
    first_layer, first_pages_ptr, block_stride, block_size, pages_ptr, kv_lens_ptr, width, num_splits,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    # one program: every so many columns of one row, layer and KV head; int64 before any multiply by a number of pages
    index, layer, head = tl.program_id(0), tl.program_id(1) // num_kv_heads, tl.program_id(1) % num_kv_heads
    split = tl.program_id(2)
    row, slot = tl.load(rows_ptr + index).to(tl.int64), tl.load(slots_ptr + index).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + row)
    is_evicted = slot >= 0
    item = (slot * num_layers + first_layer + layer) * num_kv_heads + head
    start = tl.load(starts_ptr + item, mask=is_evicted, other=0)
    count = tl.load(counts_ptr + item, mask=is_evicted, other=0)
    own_from = tl.load(own_from_ptr + slot, mask=is_evicted, other=0)
    kv_len = count * block_size + tl.maximum(seq_len - own_from, 0)
    num_columns = tl.minimum((tl.maximum(kv_len, 1) + block_size - 1) // block_size, width)
    sequence = (layer.to(tl.int64) * num_rows + index) * num_kv_heads + head
    first_page = tl.load(first_pages_ptr + layer) + head
    num_lists = num_layers * num_kv_heads
    for first in range(split * COLUMNS, num_columns, num_splits * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_kept, is_used = column < count, column < num_columns
        place = start + column
        kept_block = tl.load(
            block_ids_ptr + slot * list_blocks + place // num_lists,
            mask=is_kept & (place // num_lists < list_blocks), other=0,
        ).to(tl.int64)  # fmt: skip
        kept_page = tl.load(arena_ptr + kept_block * num_lists + place % num_lists, mask=is_kept, other=0)
        block = column - count + own_from // block_size
        # a row without tokens has page 0
        is_own = is_used & (column >= count) & (block < max_blocks) & (kv_len > 0)
        block_id = tl.load(block_table_ptr + row * block_table_stride + block, mask=is_own, other=0).to(tl.int64)
        own_page = tl.where(is_own, first_page + block_id * block_stride, 0).to(tl.int32)
        tl.store(pages_ptr + sequence * width + column, tl.where(is_kept, kept_page, own_page), mask=is_used)
    tl.store(kv_lens_ptr + sequence, tl.maximum(kv_len, 1), mask=split == 0)


def triton_signatures() -> list[tuple[Any, dict[str, str], dict[str, int], int]]:
    """Return the kernel, the types of its arguments, its constants and its warps, to compile it without a GPU."""
    names = [name for name in _expand_page_table_kernel.arg_names if name != "COLUMNS"]
    types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names} | {"first_pages_ptr": "*i64"}
    return [(_expand_page_table_kernel, types, {"COLUMNS": _COLUMNS}, _NUM_WARPS)]


def expand_page_table_reference(
    lists: PageLists, batch: BatchRows, at: LayerPages, pages: torch.Tensor, kv_lens: torch.Tensor
) -> None:
    """In place: the definition of ``expand_page_table`` in plain torch, same arguments."""
    (max_num_reqs, num_layers, num_heads), width = lists.starts.shape, pages.shape[2]
    num_reqs, max_blocks = batch.block_table.shape
    rows, slots = batch.rows.long(), batch.slots.long()
    if ((slots >= max_num_reqs) | (rows < 0) | (rows >= num_reqs)).any():
        raise _outside()
    layers = slice(at.first_layer, at.first_layer + len(at.first_pages))
    is_evicted, slots = (slots >= 0)[:, None], slots.clamp(min=0)
    # [num_layers, num_rows, num_heads], and so below
    start, count = (each[slots, layers].long().transpose(0, 1) * is_evicted for each in (lists.starts, lists.counts))
    own_from = (lists.own_from[slots].long() * is_evicted[:, 0])[:, None]
    lens = count * at.block_size + (batch.seq_lens[rows].long()[:, None] - own_from).clamp(min=0)
    num_columns = (lens + at.block_size - 1) // at.block_size

    column = torch.arange(width, device=pages.device)
    is_kept = column < count[..., None]
    is_own = (column < num_columns[..., None]) & ~is_kept
    place = (start[..., None] + column) * is_kept
    list_index = place // (num_layers * num_heads)
    block = (column - count[..., None] + own_from[..., None] // at.block_size) * is_own
    if (num_columns > width).any() or (block >= max_blocks).any() or (list_index >= lists.block_ids.shape[1]).any():
        raise _outside()
    kept_block = lists.block_ids[slots[:, None, None], list_index].long() * is_kept
    entry = kept_block * (num_layers * num_heads) + place % (num_layers * num_heads)
    if (kept_block < 0).any() or ((kept_block + 1) * (num_layers * num_heads) > len(lists.arena)).any():
        raise _outside()
    first_page = at.first_pages[:, None, None] + torch.arange(num_heads, device=pages.device)
    own_page = first_page[..., None] + batch.block_table[rows[:, None, None], block].long() * at.block_stride
    table = torch.where(is_kept, lists.arena[entry].long(), own_page).to(torch.int32)
    is_idle = (lens == 0)[..., None] & (column == 0)
    used = torch.where(is_idle, 0, torch.where(is_kept | is_own, table, pages.view(table.shape)))
    pages.copy_(used.reshape(pages.shape))
    kv_lens.copy_(lens.clamp(min=1).to(torch.int32).reshape(kv_lens.shape))
