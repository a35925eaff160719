"""chunk_attention against a dense float64 formula, for every implementation that can run here."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch

from tests.implementations import IMPLEMENTATIONS, ROUNDING, rounding_of_interpreter, scrambled_keys
from tests.implementations import implementation as one_of
from vllm_kvevict.kernels import chunk_attention as module
from vllm_kvevict.kernels.chunk_attention import chunk_attention, chunk_attention_reference

# start, chunk, block_size, num_kv_heads, group, head_size
CASES = [
    (0, 1, 16, 1, 1, 16),
    (5, 63, 16, 2, 3, 20),
    (96, 65, 32, 2, 1, 64),
    (33, 130, 64, 1, 4, 16),
]
NAMES = "start, chunk, block_size, num_kv_heads, group, head_size"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [
    *zip(FLOATS, FLOATS, strict=True),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float8_e5m2),
]

# Every implementation converts its inputs to float32 exactly, so one tolerance serves all dtypes. A logit here is a sum
# of up to 64 products of size about 1 and is off by about 1e-6, which is the relative error of its exponential; the
# sums over keys and queries have positive terms and add nothing worse.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[object]:
    with one_of(request.param, chunk_attention, chunk_attention_reference, module._launch) as function:
        yield function


class Inputs(NamedTuple):
    """All arguments but the reduction."""

    query: torch.Tensor
    keys: torch.Tensor
    page_table: torch.Tensor
    chunks: torch.Tensor
    max_chunk: int
    scale: float


def make_chunks(
    chunks: Sequence[tuple[int, int, int]],
    block_size,
    num_kv_heads,
    group,
    head_size,
    dtype=torch.float32,
    key_dtype=None,
    packing="plain",
):
    """Chunks of (request, start, length), and of each the dense keys [num_kv_heads, length, head_size].

    The queries of the last chunk come first; those between them are NaN, and so are all keys that are in no chunk. Ids
    of pages without any are out of range.
    """
    num_reqs, longest = max(req for req, *_ in chunks) + 1, max(start + length for _, start, length in chunks)
    keys, page_table, dense = scrambled_keys(
        num_reqs * num_kv_heads, range(longest), block_size, head_size, key_dtype or dtype, packing
    )
    page_table, dense = (of_all.unflatten(0, (-1, num_kv_heads)) for of_all in (page_table, dense))
    owned = torch.zeros(num_reqs, page_table.shape[2] * block_size, dtype=torch.bool)
    for req, start, length in chunks:
        owned[req, start : start + length] = True
    for req, token in (~owned[:, :longest]).nonzero().tolist():
        keys[page_table[req, :, token // block_size], token % block_size] = float("nan")
    unread = ~owned.unflatten(1, (-1, block_size)).any(2)
    page_table = page_table.masked_fill(unread[:, None], 2**60)
    generator = torch.Generator().manual_seed(1)
    num_rows = sum(length for *_, length in chunks) + 2 * len(chunks)
    numbers = torch.randn(num_rows, num_kv_heads * group + 2, head_size + 8, generator=generator)
    query, rows, row = torch.full_like(numbers, float("nan")), [], 2
    for *_, length in reversed(chunks):
        query[row : row + length] = numbers[row : row + length]
        rows.insert(0, row)
        row += length + 2
    table = torch.tensor([[req, start, at, length] for (req, start, length), at in zip(chunks, rows, strict=True)])
    inputs = Inputs(
        query.to(dtype)[:, 1:-1, :head_size], keys, page_table, table, int(table[:, 3].max()), head_size**-0.5
    )
    return inputs, [dense[req, :, start : start + length] for req, start, length in chunks]


def make_inputs(start, chunk, *sizes_and_dtypes, **packing):
    """One chunk."""
    inputs, (dense,) = make_chunks([(0, start, chunk)], *sizes_and_dtypes, **packing)
    return inputs, dense


def rows_of(inputs, chunk=0):
    return slice(inputs.chunks[chunk, 2], inputs.chunks[chunk, 2:].sum())


def queries_of(inputs, chunk=0):
    return inputs.query[rows_of(inputs, chunk)]


def run(function, inputs, reduction):
    """Of a single chunk."""
    received = function(*inputs, reduction)
    assert received.dtype == torch.float32 and received.shape == (inputs.page_table.shape[1], len(inputs.query))
    return received[:, rows_of(inputs)]


def dense_formula(query, dense, scale, reduction):
    """Head by head in float64."""
    group = query.shape[1] // len(dense)
    heads = [
        (query[:, head].double() @ dense[head // group].double().T * scale).softmax(1).sum(0)
        for head in range(query.shape[1])
    ]
    received = torch.stack(heads).unflatten(0, (-1, group))
    return (received.amax(1) if reduction == "max" else received.mean(1)).float()


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize(NAMES, CASES)
def test_equals_dense_formula(
    implementation, start, chunk, block_size, num_kv_heads, group, head_size, reduction, packing
):
    inputs, dense = make_inputs(start, chunk, block_size, num_kv_heads, group, head_size, packing=packing)
    actual = run(implementation, inputs, reduction)
    torch.testing.assert_close(actual, dense_formula(queries_of(inputs), dense, inputs.scale, reduction), **TOLERANCE)


@pytest.mark.parametrize("dtype, key_dtype", PAIRS, ids=str)
def test_every_dtype(implementation, dtype, key_dtype):
    inputs, dense = make_inputs(7, 90, 16, 2, 2, 32, dtype, key_dtype, "transposed")
    actual = run(implementation, inputs, "mean")
    torch.testing.assert_close(actual, dense_formula(queries_of(inputs), dense, inputs.scale, "mean"), **TOLERANCE)


@pytest.mark.parametrize("magnitude", [1e-3, 1e4])
def test_extreme_logits(implementation, magnitude):
    """Flat attention, and logits whose exponential no float can hold: every query hands out one."""
    inputs, dense = make_inputs(7, 90, 16, 2, 2, 32)
    inputs = inputs._replace(query=inputs.query * magnitude)
    actual = run(implementation, inputs, "mean")
    rtol = (
        rounding_of_interpreter(queries_of(inputs), dense, inputs.scale)
        if implementation is module._launch
        else ROUNDING
    )
    torch.testing.assert_close(actual.sum(1), torch.full((2,), 90.0), rtol=rtol, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_nan_in_a_key_is_not_hidden(implementation, reduction):
    inputs, _ = make_inputs(7, 90, 16, 1, 2, 32)
    inputs.keys[inputs.page_table[0, 0, 1], 3] = float("nan")
    assert run(implementation, inputs, reduction).isnan().all()


def test_inputs_stay_as_they_are(implementation):
    inputs, _ = make_inputs(7, 90, 16, 2, 2, 32, torch.bfloat16, packing="transposed")
    before = [tensor.clone() for tensor in inputs[:4]]
    run(implementation, inputs, "max")
    for tensor, copy in zip(inputs, before, strict=False):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


# request, start, length: two of one request, one that begins in the page where another ends, one empty
SEVERAL = [(1, 40, 65), (0, 3, 1), (1, 105, 20), (3, 0, 0), (3, 60, 64), (0, 17, 130)]


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_each_of_several_chunks_is_as_if_alone(implementation, reduction, packing):
    inputs, denses = make_chunks(SEVERAL, 16, 2, 2, 32, packing=packing)
    together = implementation(*inputs, reduction)
    for chunk, dense in enumerate(denses):
        query, rows = queries_of(inputs, chunk), rows_of(inputs, chunk)
        if len(query) == 0:
            continue
        expected = dense_formula(query, dense, inputs.scale, reduction)
        torch.testing.assert_close(together[:, rows], expected, **TOLERANCE)
        of_chunk = inputs.chunks[chunk] * torch.tensor([0, 1, 0, 1])  # in the first row of its own page table
        pages = inputs.page_table[inputs.chunks[chunk, 0]][None]
        alone = Inputs(query, inputs.keys, pages, of_chunk[None], len(query), inputs.scale)
        assert run(implementation, alone, reduction).equal(together[:, rows])


def test_max_chunk_may_be_larger_than_any(implementation):
    inputs, _ = make_inputs(7, 90, 16, 2, 2, 32)
    assert run(implementation, inputs._replace(max_chunk=200), "max").equal(run(implementation, inputs, "max"))


def test_no_chunk(implementation):
    inputs, _ = make_inputs(7, 90, 16, 2, 2, 32)
    assert implementation(*inputs._replace(chunks=inputs.chunks[:0]), "mean").shape == (2, len(inputs.query))
    assert implementation(*inputs._replace(chunks=inputs.chunks[:0], max_chunk=0), "mean").shape[0] == 2


@pytest.mark.parametrize("implementation", ["native-16", "native-8", "native-4"], indirect=True)
def test_does_not_depend_on_the_number_of_threads(implementation):
    inputs, _ = make_chunks([(0, 100, 500), (0, 600, 65)], 16, 2, 3, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            received = implementation(*inputs, "mean")
            results.append(torch.cat([received[:, rows_of(inputs, chunk)] for chunk in range(2)], 1))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def one_chunk(*numbers):
    return {"chunks": torch.tensor([numbers])}


@pytest.mark.parametrize(
    "changes, message",
    [
        (one_chunk(0, -1, 2, 40), "`query`: expected 40 tokens among 192 of the page table, got -1 to 39"),
        (one_chunk(0, 153, 2, 40), "`query`: expected 40 tokens among 192 of the page table, got 153 to 193"),
        (one_chunk(0, 19, 2, 40), "`page_table`: expected page ids 0 to 16, got .* to 1152921504606846976"),
        (one_chunk(0, 64, 3, 40), "`query`: expected a chunk among 42 rows, got one from 3 to 43"),
        (one_chunk(0, 64, -1, 40), "`query`: expected a chunk among 42 rows, got one from -1 to 39"),
        (one_chunk(0, 64, 2, -1), "`query`: expected a chunk among 42 rows, got one from 2 to 1"),
        (one_chunk(1, 64, 2, 40), "`chunks`: expected rows 0 to 0 of the page table, got 1"),
        (one_chunk(-1, 64, 2, 40), "`chunks`: expected rows 0 to 0 of the page table, got -1"),
        (one_chunk(64, 2, 40), "`chunks`: expected contiguous torch.int64 .1, 4. on cpu"),
        ({"chunks": lambda chunks: chunks.int()}, "`chunks`: expected contiguous torch.int64 .1, 4. on cpu"),
        ({"max_chunk": 39}, "`max_chunk`: expected at least 40, got 39"),
        ({"page_table": lambda table: table[0]}, "`page_table`: expected .3, num_kv_heads, max_pages., got shape"),
        ({"reduction": "sum"}, "`reduction`: expected 'mean' or 'max', got 'sum'"),
    ],
)
def test_wrong_arguments(changes, message):
    """What other arguments may be is tested with streaming_sums, which shares the check."""
    inputs, _ = make_inputs(64, 40, 32, 3, 2, 64)
    named = {**inputs._asdict(), "reduction": "mean"}
    for name, change in changes.items():
        named[name] = change(named[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        chunk_attention(**named)


def test_no_scratch_memory(monkeypatch):
    inputs, _ = make_inputs(64, 40, 32, 2, 2, 64)
    monkeypatch.setattr(module, "function", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="no scratch memory for 4 heads and 40 tokens"):
        chunk_attention(*inputs, "mean")


def test_reference_without_library(monkeypatch):
    inputs, dense = make_inputs(64, 40, 32, 2, 2, 64)
    monkeypatch.setattr(module, "function", lambda *_: None)
    expected = dense_formula(queries_of(inputs), dense, inputs.scale, "max")
    torch.testing.assert_close(run(chunk_attention, inputs, "max"), expected, **TOLERANCE)
