"""page_table_update against a walk over rows and blocks in plain Python, for every implementation that can run here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu import HAS_GPU, on_gpu
from vllm_kvevict.kernels import page_table_update as module
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.page_table_update import (
    BatchBlocks,
    page_table_update,
    page_table_update_reference,
    page_table_update_triton,
)

REFERENCE = pytest.param(page_table_update_reference, id="reference")
NATIVE = pytest.param(
    page_table_update,
    id="native",
    marks=pytest.mark.skipif(
        library() is None, reason="the CPU kernels are not built: run `python setup.py build_ext --inplace`"
    ),
)
launch = on_gpu(page_table_update_triton) if HAS_GPU else page_table_update_triton
TRITON = pytest.param(
    launch,
    id="triton",
    marks=pytest.mark.skipif(module.tl is None, reason="Triton is not installed"),
)
GARBAGE = 2**40  # in blocks that nobody enters


def make_table(generator, num_layers, max_num_reqs, num_heads, max_pages):
    """Pages of random ids, of which num_pages are in use at the eviction; half of the columns are left to decode."""
    shape = (num_layers, max_num_reqs, num_heads)
    pages = torch.randint(1, 2**31 - 1, (*shape, max_pages), generator=generator, dtype=torch.int32)
    num_pages = torch.randint(1, max_pages // 2 + 1, shape, generator=generator)
    kv_lens = torch.randint(1, 999, shape, generator=generator, dtype=torch.int32)
    layer_offset = torch.randperm(num_layers, generator=generator) * 1000
    return pages, num_pages, kv_lens, layer_offset


def make_batch(generator, max_num_reqs, num_reqs, most_blocks):
    """Requests in scrambled slots, each of which enters up to ``most_blocks`` blocks."""
    num_blocks = torch.randint(1, 20, (num_reqs,), generator=generator)
    entered = torch.randint(most_blocks + 1, (num_reqs,), generator=generator)
    # those that are entered again begin before the first that is new
    first = num_blocks + torch.randint(-1, 2, (num_reqs,), generator=generator)
    # wider than it has to be: vLLM's block table is a slice of a larger one
    block_table = torch.full((num_reqs, 20 + most_blocks + 5), GARBAGE)[:, :-3]
    for req in range(num_reqs):
        ids = torch.randint(1, 10**6, (int(entered[req]),), generator=generator)
        block_table[req, first[req] : first[req] + entered[req]] = ids
    slots = torch.randperm(max_num_reqs, generator=generator)[:num_reqs]
    new_tokens = torch.randint(1, 99, (num_reqs,), generator=generator)
    return BatchBlocks(slots, num_blocks, first, first + entered, new_tokens, block_table)


def walk(pages, num_pages, kv_lens, layer_offset, block_stride, batch):
    """What the documentation says, one page at a time: the table afterwards, and the rows and lengths of the batch."""
    pages = pages.clone()
    for layer in range(pages.shape[0]):
        for head in range(pages.shape[2]):
            for req, slot in enumerate(batch.slots.tolist()):
                for block in range(int(batch.first_block[req]), int(batch.end_block[req])):
                    column = int(num_pages[layer, slot, head]) + block - int(batch.num_blocks[req])
                    page = int(layer_offset[layer]) + head + block_stride * int(batch.block_table[req, block])
                    pages[layer, slot, head, column] = page
    rows = torch.stack([pages[:, slot] for slot in batch.slots.tolist()], 1)
    lens = [kv_lens[:, slot] + int(new) for slot, new in zip(batch.slots, batch.new_tokens, strict=True)]
    return pages, rows, torch.stack(lens, 1)


def check(update, seed, num_layers, max_num_reqs, num_reqs, num_heads, max_pages, most_blocks, block_stride):
    generator = torch.Generator().manual_seed(seed)
    table = make_table(generator, num_layers, max_num_reqs, num_heads, max_pages)
    batch = make_batch(generator, max_num_reqs, num_reqs, most_blocks)
    expected = walk(*table, block_stride, batch)
    num_columns = max_pages - seed % 8
    rows, lens = update(*table, block_stride, batch, num_columns)
    expected = expected[0], expected[1][..., :num_columns], expected[2]
    for actual, wanted in zip((table[0], rows, lens), expected, strict=True):
        assert actual.dtype == torch.int32
        assert actual.equal(wanted)


@pytest.mark.parametrize("update", [REFERENCE, NATIVE])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_layers=st.integers(1, 5),
    max_num_reqs=st.integers(1, 7),
    num_heads=st.integers(1, 4),
    max_pages=st.sampled_from([16, 64, 129]),
    most_blocks=st.integers(0, 5),
    block_stride=st.sampled_from([1, 3, 90]),
)
def test_every_new_page_is_written_and_every_row_returned(
    update, seed, num_layers, max_num_reqs, num_heads, max_pages, most_blocks, block_stride
):
    num_reqs = 1 + seed % max_num_reqs
    check(update, seed, num_layers, max_num_reqs, num_reqs, num_heads, max_pages, most_blocks, block_stride)


@pytest.mark.parametrize("max_pages", [16, 129, 300])
@pytest.mark.parametrize("most_blocks", [0, 1, 5])
def test_triton_does_the_same(max_pages, most_blocks):
    if module.tl is None:
        pytest.skip("Triton is not installed")
    check(launch, most_blocks, 2, 5, 3, 3, max_pages, most_blocks, 7)


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not built")
def test_many_rows_by_several_threads():
    check(page_table_update, 0, 30, 40, 33, 3, 64, 2, 90)


@pytest.mark.parametrize("update", [REFERENCE, NATIVE, TRITON])
def test_page_ids_up_to_the_largest_int32(update):
    table = make_table(torch.Generator().manual_seed(0), 1, 2, 2, 8)
    table[1][:] = 2
    one = torch.tensor([1])
    batch = BatchBlocks(one, one * 4, one * 5, one * 6, one, torch.full((1, 8), 2**31 // 90 - 1))
    update(*table, 90, batch, 8)
    assert table[0][0, 1, :, 3].tolist() == [90 * (2**31 // 90 - 1), 90 * (2**31 // 90 - 1) + 1]


@pytest.mark.parametrize("update", [REFERENCE, NATIVE, TRITON])
def test_an_empty_batch(update):
    table = make_table(torch.Generator().manual_seed(0), 2, 3, 2, 8)
    before = table[0].clone()
    none = torch.empty(0, dtype=torch.int64)
    rows, lens = update(*table, 1, BatchBlocks(none, none, none, none, none, none.view(0, 1)), 8)
    assert rows.shape == (2, 0, 2, 8)
    assert lens.shape == (2, 0, 2)
    assert table[0].equal(before)


OUTSIDE = [
    pytest.param({"slots": 3}, id="slot past the table"),
    pytest.param({"slots": -1}, id="a whole row's slot"),
    pytest.param({"end_block": 9}, id="block past the block table"),
    pytest.param({"first_block": -1}, id="block before it"),
    pytest.param({"num_blocks": 1, "end_block": 8}, id="column past the table"),
    pytest.param({"num_blocks": 8}, id="column before it"),
]


@pytest.mark.parametrize("update", [REFERENCE, NATIVE])
@pytest.mark.parametrize("change", OUTSIDE)
def test_what_is_outside_is_an_error_before_anything_changes(update, change):
    pages, num_pages, kv_lens, layer_offset = make_table(torch.Generator().manual_seed(0), 2, 3, 2, 8)
    num_pages[:] = 2
    before = pages.clone()
    fields = {"slots": 1, "num_blocks": 4, "first_block": 5, "end_block": 7, "new_tokens": 1} | change
    tensors = {name: torch.tensor([0 if name == "slots" else fields[name], value]) for name, value in fields.items()}
    batch = BatchBlocks(**tensors, block_table=torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="`batch`: expected slots, blocks and columns within their tables"):
        update(pages, num_pages, kv_lens, layer_offset, 1, batch, 8)
    assert pages.equal(before)


def arguments(num_columns=8, **changes):
    pages, num_pages, kv_lens, layer_offset = make_table(torch.Generator().manual_seed(0), 2, 3, 2, 8)
    ones = torch.ones(2, dtype=torch.int64)
    batch = BatchBlocks(torch.tensor([0, 2]), ones, ones, ones, ones, torch.ones(2, 8, dtype=torch.int64))
    named = {"pages": pages, "num_pages": num_pages, "kv_lens": kv_lens, "layer_offset": layer_offset}
    named |= {name: value for name, value in changes.items() if name in named}
    batch = batch._replace(**{name: value for name, value in changes.items() if name not in named})
    return *named.values(), 1, batch, num_columns


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pages": torch.ones(2, 3, 2)}, "`pages`: expected .num_layers, max_num_reqs, num_kv_heads, max_pages."),
        ({"pages": torch.ones(2, 3, 2, 8)}, "`pages`: expected contiguous torch.int32"),
        ({"num_columns": 9}, "`num_columns`: expected 1 to 8, got 9"),
        ({"num_pages": torch.ones(2, 3, 2)}, "`num_pages`: expected contiguous torch.int64 .2, 3, 2. on cpu"),
        ({"kv_lens": torch.ones(2, 3, 3).int()}, "`kv_lens`: expected contiguous torch.int32 .2, 3, 2."),
        ({"layer_offset": torch.arange(4)[::2]}, "`layer_offset`: expected contiguous torch.int64 .2."),
        ({"end_block": torch.arange(3)}, "`end_block`: expected contiguous torch.int64 .2. on cpu, got .* .3."),
        ({"block_table": torch.ones(3, 8).long()}, "`block_table`: expected .2, max_blocks., got shape .3, 8."),
        ({"block_table": torch.ones(2, 8).int()}, "`block_table`: expected int64 on cpu .* got torch.int32"),
        ({"block_table": torch.ones(8, 2).long().T}, "`block_table`: expected .* contiguous rows"),
    ],
)
def test_wrong_arguments(changes, message):
    page_table_update(*arguments())
    with pytest.raises(ValueError, match=message):
        page_table_update(*arguments(**changes))
