"""expand_page_table against a walk over rows and pages in plain Python, for every implementation that can run here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu import HAS_GPU, on_gpu
from vllm_kvevict.kernels import expand_page_table as module
from vllm_kvevict.kernels.expand_page_table import (
    NEVER,
    BatchRows,
    LayerPages,
    PageLists,
    expand_page_table,
    expand_page_table_reference,
    expand_page_table_triton,
)
from vllm_kvevict.kernels.native import library

REFERENCE = pytest.param(expand_page_table_reference, id="reference")
NATIVE = pytest.param(
    expand_page_table,
    id="native",
    marks=pytest.mark.skipif(
        library() is None, reason="the CPU kernels are not built: run `python setup.py build_ext --inplace`"
    ),
)
launch = on_gpu(expand_page_table_triton) if HAS_GPU else expand_page_table_triton
TRITON = pytest.param(
    launch,
    id="triton",
    marks=pytest.mark.skipif(module.tl is None, reason="Triton is not installed"),
)
GARBAGE = -(2**31)  # in what nobody may read or write
BLOCKS = 60


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def draw(generator, high, size=(), low=0):
    return torch.randint(low, high, size, generator=generator)


def make_lists(generator, max_num_reqs, num_layers, num_heads, most_pages, block_size):
    """Lists of random pages in the entries of random blocks, and as plain Python [slot][layer][head][pages]."""
    num_lists = num_layers * num_heads
    shape = (max_num_reqs, num_layers, num_heads)
    counts = draw(generator, most_pages + 1, shape)
    starts = (counts.flatten(1).cumsum(1) - counts.flatten(1)).view(shape)
    list_blocks = -(-most_pages * num_lists // num_lists) + 1
    arena = torch.full((max_num_reqs * list_blocks * num_lists,), GARBAGE, dtype=torch.int32)
    owned = torch.randperm(max_num_reqs * list_blocks, generator=generator).view(max_num_reqs, list_blocks)
    block_ids = torch.full_like(owned, GARBAGE)
    own_from = draw(generator, 30, (max_num_reqs,)) * block_size
    own_from[draw(generator, 4, (max_num_reqs,)) == 0] = NEVER
    pages = []
    for slot in range(max_num_reqs):
        total = int(counts[slot].sum())
        used = -(-total // num_lists)
        block_ids[slot, :used] = owned[slot, :used]
        entries = draw(generator, 2**31 - 1, (total,), low=1).tolist()
        for place, page in enumerate(entries):
            arena[int(owned[slot, place // num_lists]) * num_lists + place % num_lists] = page
        rows = iter(entries)
        pages.append([[[next(rows) for _ in range(int(n))] for n in of_layer] for of_layer in counts[slot]])
    return PageLists(arena, *(each.int() for each in (block_ids, starts, counts, own_from))), pages


def make_batch(generator, lists, num_reqs, block_size, has_idle):
    """Some rows of a batch, evicted, whole and idle ones; blocks that nobody needs are garbage."""
    max_num_reqs = len(lists.own_from)
    slots = torch.randperm(max_num_reqs, generator=generator)[:num_reqs]
    slots[draw(generator, 3, (len(slots),)) == 0] = -1
    rows = torch.randperm(num_reqs, generator=generator)[: len(slots)]
    own_from = torch.where(slots < 0, 0, lists.own_from.long()[slots.clamp(min=0)])
    lens = torch.where(own_from == NEVER, 0, own_from) + draw(generator, 5 * block_size, (len(slots),), low=1)
    seq_lens = torch.zeros(num_reqs, dtype=torch.int64)
    seq_lens[rows] = lens
    if has_idle:
        slots[0] = -1
        seq_lens[rows[0]] = 0
    block_table = torch.full((num_reqs, 70), GARBAGE)[:, :-3]  # vLLM's is a slice of a larger one
    for row, first in zip(rows.tolist(), own_from.tolist(), strict=True):
        last = -(-int(seq_lens[row]) // block_size)
        if first != NEVER and last:
            block_table[row, first // block_size : last] = draw(generator, 10**6, (last - first // block_size,))
    block_table = torch.nn.functional.pad(block_table, (0, 3), value=GARBAGE).int()[:, :-3]
    return BatchRows(rows.int(), slots.int(), seq_lens.int(), block_table)


def walk(pages, lists, batch, at, layer, num_heads):
    """What the documentation says, one page at a time: page ids and length of every sequence of a layer."""
    found, lens = [], []
    first_page = int(at.first_pages[layer])
    for row, slot in zip(batch.rows.tolist(), batch.slots.tolist(), strict=True):
        seq_len = int(batch.seq_lens[row])
        own_from = 0 if slot < 0 else int(lists.own_from[slot])
        for head in range(num_heads):
            kept = [] if slot < 0 else pages[slot][at.first_layer + layer][head]
            num_new = max(seq_len - own_from, 0)
            blocks = batch.block_table[row, own_from // at.block_size :][: -(-num_new // at.block_size)].tolist()
            own = [first_page + head + block * at.block_stride for block in blocks if num_new]
            kv_len = len(kept) * at.block_size + num_new
            found.append(kept + own if kv_len else [0])
            lens.append(max(kv_len, 1))
    return found, lens


def check(expand, seed, max_num_reqs, num_reqs, num_layers, num_heads, most_pages, block_size, has_idle):
    generator = torch.Generator().manual_seed(seed)
    lists, pages = make_lists(generator, max_num_reqs, num_layers, num_heads, most_pages, block_size)
    batch = make_batch(generator, lists, min(num_reqs, max_num_reqs), block_size, has_idle)
    first_layer = int(draw(generator, num_layers))
    first_pages = draw(generator, 1000, (int(draw(generator, num_layers - first_layer + 1, low=1)),))
    at = LayerPages(first_layer, first_pages, int(draw(generator, 1000, low=1)), block_size)
    expected = [walk(pages, lists, batch, at, layer, num_heads) for layer in range(len(first_pages))]
    width = max((len(row) for rows, _ in expected for row in rows), default=1) + seed % 3
    shape = (len(first_pages), len(batch.rows) * num_heads, width)
    table = torch.full(shape, GARBAGE, dtype=torch.int32)
    kv_lens = torch.full(shape[:2], GARBAGE, dtype=torch.int32)
    before = [tensor.clone() for tensor in (*lists, *batch)]
    expand(lists, batch, at, table, kv_lens)
    assert kv_lens.tolist() == [lens for _, lens in expected]
    assert table.tolist() == [[row + [GARBAGE] * (width - len(row)) for row in rows] for rows, _ in expected]
    for tensor, old in zip((*lists, *batch), before, strict=True):
        assert tensor.equal(old)


SIZES = {
    "seed": st.integers(0, 2**32 - 1),
    "max_num_reqs": st.integers(1, 6),
    "num_reqs": st.integers(1, 6),
    "num_layers": st.integers(1, 4),
    "num_heads": st.integers(1, 3),
    "most_pages": st.sampled_from([0, 1, 9]),
    "block_size": st.sampled_from([2, 16, 48]),
    "has_idle": st.booleans(),
}


@pytest.mark.parametrize("expand", [REFERENCE, NATIVE])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(**SIZES)
def test_equals_walk(expand, **sizes):
    check(expand, **sizes)


@pytest.mark.parametrize("expand", [TRITON])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(**SIZES)
def test_equals_walk_in_triton(expand, **sizes):
    check(expand, **sizes)


@pytest.mark.parametrize("expand", [REFERENCE, NATIVE, TRITON])
def test_a_list_longer_than_a_program_s_part(expand):
    check(expand, 3, 3, 3, 2, 2, 700, 16, has_idle=False)


def small(num_rows=2, **changes):
    """Two requests of two layers and heads that kept two pages each, in a table of eight blocks and columns."""
    counts = torch.full((3, 2, 2), 2, dtype=torch.int32)
    starts = (counts.flatten(1).cumsum(1) - counts.flatten(1)).view(3, 2, 2).int()
    lists = PageLists(
        torch.ones(80, dtype=torch.int32), int32([[1, 2], [3, 4], [5, 6]]), starts, counts, int32([4] * 3)
    )
    batch = BatchRows(int32([0, 1])[:num_rows], int32([0, 2])[:num_rows], int32([5, 7]), int32([[1] * 8] * 2))
    first_pages = changes.get("first_pages", torch.tensor([0]))
    named = {
        "pages": torch.full((1, 2 * num_rows, 8), -7, dtype=torch.int32),
        "kv_lens": torch.full((1, 2 * num_rows), -7, dtype=torch.int32),
    }
    named |= {name: value for name, value in changes.items() if name in named}
    lists = lists._replace(**{name: value for name, value in changes.items() if name in PageLists._fields})
    batch = batch._replace(**{name: value for name, value in changes.items() if name in BatchRows._fields})
    return lists, batch, LayerPages(changes.get("first_layer", 1), first_pages, 4, 2), *named.values()


@pytest.mark.parametrize("expand", [REFERENCE, NATIVE, TRITON])
def test_an_empty_batch(expand):
    arguments = small(num_rows=0)
    expand(*arguments)
    assert (arguments[-1] == -7).all()


OUTSIDE = [
    pytest.param({"slots": int32([0, 3])}, id="slot past the lists"),
    pytest.param({"rows": int32([0, 2])}, id="row past the batch"),
    pytest.param({"rows": int32([-1, 0])}, id="row before it"),
    pytest.param({"seq_lens": int32([5, 4 + 2 * 8])}, id="block past the block table"),
    pytest.param({"pages": int32([[[-7] * 3] * 4])}, id="column past the page table"),
    pytest.param({"block_ids": int32([[1, 2], [3, 4], [5, 20]])}, id="kept block past the arena"),
    pytest.param({"block_ids": int32([[1, 2], [3, 4], [5, -1]])}, id="kept block before it"),
    pytest.param({"counts": torch.full((3, 2, 2), 4, dtype=torch.int32)}, id="list past the kept blocks"),
]


@pytest.mark.parametrize("expand", [REFERENCE, NATIVE])
@pytest.mark.parametrize("change", OUTSIDE)
def test_what_is_outside_is_an_error_before_anything_changes(expand, change):
    expand(*small())
    *arguments, pages, kv_lens = small(**change)
    with pytest.raises(ValueError, match="`batch`: expected slots, rows, blocks and columns within their tables"):
        expand(*arguments, pages, kv_lens)
    assert (pages == -7).all()
    assert (kv_lens == -7).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"starts": int32([1, 2])}, "`starts`: expected .max_num_reqs, num_layers, num_kv_heads., got shape .2,."),
        ({"starts": torch.ones(3, 2, 2)}, "`starts`: expected contiguous torch.int32"),
        ({"counts": int32([[[1, 2]]])}, "`counts`: expected contiguous torch.int32 .3, 2, 2."),
        ({"own_from": torch.ones(3).long()}, "`own_from`: expected contiguous torch.int32 .3."),
        ({"arena": torch.ones(80, dtype=torch.int32)[::2]}, "`arena`: expected contiguous torch.int32"),
        ({"block_ids": int32([1, 2, 3])}, "`block_ids`: expected .3, max_blocks., got shape .3,."),
        ({"slots": int32([1, 2, 3])}, "`slots`: expected contiguous torch.int32 .2. on cpu, got .* .3."),
        ({"rows": torch.tensor([0, 1])}, "`rows`: expected contiguous torch.int32 .2."),
        ({"seq_lens": int32([1])}, "`seq_lens`: expected contiguous torch.int32 .2."),
        ({"block_table": torch.ones(2, 8).long()}, "`block_table`: expected int32 on cpu .* got torch.int64"),
        ({"block_table": int32([[1] * 2] * 8).T}, "`block_table`: expected .* contiguous rows"),
        ({"first_layer": 2}, "`first_layer`: expected 0 to 1, got 2"),
        ({"first_pages": int32([0])}, "`first_pages`: expected contiguous torch.int64 .1."),
        ({"pages": int32([[1] * 8] * 4)}, "`pages`: expected .1, 4, width., got shape .4, 8."),
        ({"pages": int32([[[1] * 8] * 3])}, "`pages`: expected contiguous torch.int32 .1, 4, 8."),
        ({"kv_lens": int32([[1] * 3])}, "`kv_lens`: expected contiguous torch.int32 .1, 4."),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        expand_page_table(*small(**changes))
