"""streaming_sums against a dense float64 formula, for every implementation that can run here."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.implementations import (
    IMPLEMENTATIONS,
    LOGITS,
    ROUNDING,
    hard_sinks,
    probabilities,
    rounding_of_interpreter,
    scrambled_keys,
)
from tests.implementations import implementation as one_of
from vllm_kvevict.kernels import streaming_sums as module
from vllm_kvevict.kernels.chunk_batch import ChunkBatch
from vllm_kvevict.kernels.streaming_sums import streaming_sums, streaming_sums_reference

# kv_len, num_queries, block_size, num_kv_heads, group, head_size
CASES = [
    (1, 1, 16, 1, 1, 16),
    (63, 63, 16, 2, 3, 20),
    (65, 1, 32, 2, 1, 64),
    (150, 33, 16, 1, 4, 32),
    (131, 131, 64, 3, 2, 16),
]
# more tokens than those whose exponentials the CPU kernel keeps, more queries than the reference looks at in one go
LARGE = [(8500, 5, 32, 1, 2, 16), (700, 530, 16, 2, 3, 64), (1000, 40, 32, 20, 1, 16)]
NAMES = "kv_len, num_queries, block_size, num_kv_heads, group, head_size"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [
    *zip(FLOATS, FLOATS, strict=True),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float8_e5m2),
]

# Every implementation converts its inputs to float32 exactly, so one tolerance serves all dtypes. A logit here is a sum
# of up to 64 products of size about 1 and is off by about 1e-6, which is the relative error of its exponential; the
# sums over keys and queries have positive terms and add nothing worse. Where few queries see a key, it
# gets next to nothing.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[object]:
    with one_of(request.param, streaming_sums, streaming_sums_reference, module._launch) as function:
        yield function


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name != "triton"])
def fast_implementation(request: pytest.FixtureRequest) -> Iterator[object]:
    with one_of(request.param, streaming_sums, streaming_sums_reference, module._launch) as function:
        yield function


def make_batch(
    requests: Sequence[tuple[int, int]],
    block_size,
    num_kv_heads,
    group,
    head_size,
    dtype=torch.float32,
    key_dtype=None,
    packing="plain",
):
    """Requests of (kv_len, num_queries), and of each the dense keys [num_kv_heads, kv_len, head_size].

    What belongs to none of them is NaN, and so are the queries before the first one and behind the last; ids of other
    pages are out of range.
    """
    longest = max(kv_len for kv_len, _ in requests)
    keys, page_table, dense = scrambled_keys(
        len(requests) * num_kv_heads, range(longest), block_size, head_size, key_dtype or dtype, packing
    )
    page_table = page_table.unflatten(0, (-1, num_kv_heads))
    of_requests = zip(dense.split(num_kv_heads), requests, strict=True)
    denses = [of_request[:, :kv_len] for of_request, (kv_len, _) in of_requests]
    for pages, (kv_len, _) in zip(page_table, requests, strict=True):
        for token in range(kv_len, longest):
            keys[pages[:, token // block_size], token % block_size] = float("nan")
        pages[:, -(-kv_len // block_size) :] = 2**60
    kv_lens, num_queries = torch.tensor(requests).T
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(int(num_queries.sum()) + 4, num_kv_heads * group + 2, head_size + 8, generator=generator)
    query[:3] = query[-1:] = float("nan")
    starts = F.pad(num_queries.cumsum(0), (1, 0)) + 3, F.pad(kv_lens.cumsum(0), (1, 0))
    batch = ChunkBatch(
        query.to(dtype)[:, 1:-1, :head_size], keys, page_table, *starts, int(num_queries.max()), longest,
        head_size**-0.5,
    )  # fmt: skip
    return batch, denses


def make_inputs(kv_len, num_queries, *sizes_and_dtypes, **packing):
    """One request."""
    batch, (dense,) = make_batch([(kv_len, num_queries)], *sizes_and_dtypes, **packing)
    return batch, dense


def queries_of(batch, req=0):
    return batch.query[batch.query_start_loc[req] : batch.query_start_loc[req + 1]]


def run(function, batch, start=0.0):
    """The sums, which begin at ``start``; what lies beside them stays as it was."""
    around = torch.full((batch.page_table.shape[1], batch.kv_start_loc[-1] + 3), float("nan"))
    sums = around[:, 1:-2]
    sums.fill_(start)
    assert function(batch, sums) is None
    assert around[:, 0].isnan().all() and around[:, -2:].isnan().all()
    return sums


def dense_formula(query, dense, scale, softcap=0.0, sinks=None):
    """Head by head in float64."""
    num_queries, num_heads, _ = query.shape
    num_kv_heads, kv_len, _ = dense.shape
    group = num_heads // num_kv_heads
    hidden = torch.arange(kv_len) > torch.arange(kv_len - num_queries, kv_len)[:, None]
    sums = torch.zeros(num_kv_heads, kv_len, dtype=torch.float64)
    for head in range(num_heads):
        logits = query[:, head].double() @ dense[head // group].double().T * scale
        sink = None if sinks is None else sinks[head]
        for logits_of_query, is_hidden in zip(logits, hidden, strict=True):
            seen = logits_of_query[~is_hidden]
            sums[head // group, : len(seen)] += probabilities(seen, softcap, sink) / group
    return sums.float()


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize(NAMES, CASES)
def test_equals_dense_formula(implementation, kv_len, num_queries, block_size, num_kv_heads, group, head_size, packing):
    batch, dense = make_inputs(kv_len, num_queries, block_size, num_kv_heads, group, head_size, packing=packing)
    torch.testing.assert_close(
        run(implementation, batch), dense_formula(queries_of(batch), dense, batch.scale), **TOLERANCE
    )


@pytest.mark.parametrize("softcap, has_sinks", LOGITS)
def test_soft_capping_and_sinks(implementation, softcap, has_sinks):
    batch, dense = make_inputs(150, 33, 16, 2, 3, 32)
    batch = replace(batch, softcap=softcap, sinks=hard_sinks(6) if has_sinks else None)
    expected = dense_formula(queries_of(batch), dense, batch.scale, softcap, batch.sinks)
    torch.testing.assert_close(run(implementation, batch), expected, **TOLERANCE)
    if has_sinks:
        shifted = dense_formula(queries_of(batch), dense, batch.scale, softcap, batch.sinks.roll(1))
        assert (shifted - expected).abs().max() > 1e-2


@pytest.mark.parametrize(NAMES, LARGE)
def test_equals_dense_formula_at_length(
    fast_implementation, kv_len, num_queries, block_size, num_kv_heads, group, head_size
):
    batch, dense = make_inputs(kv_len, num_queries, block_size, num_kv_heads, group, head_size, packing="transposed")
    expected = dense_formula(queries_of(batch), dense, batch.scale)
    torch.testing.assert_close(run(fast_implementation, batch), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype, key_dtype", PAIRS, ids=str)
def test_every_dtype(implementation, dtype, key_dtype):
    batch, dense = make_inputs(90, 31, 16, 2, 2, 32, dtype, key_dtype, "transposed")
    torch.testing.assert_close(
        run(implementation, batch), dense_formula(queries_of(batch), dense, batch.scale), **TOLERANCE
    )


def test_adds_to_what_is_there(implementation):
    batch, dense = make_inputs(90, 31, 16, 2, 2, 32)
    actual = run(implementation, batch, start=2.0)
    # 2 holds the sums to a float32 rounding of 2
    torch.testing.assert_close(actual, dense_formula(queries_of(batch), dense, batch.scale) + 2, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("magnitude", [1e-3, 1e4])
def test_extreme_logits(implementation, magnitude):
    """Flat attention, and logits whose exponential no float can hold: every query hands out one."""
    batch, dense = make_inputs(150, 70, 16, 2, 2, 32)
    batch = replace(batch, query=batch.query * magnitude)
    actual = run(implementation, batch)
    rtol = (
        rounding_of_interpreter(queries_of(batch), dense, batch.scale) if implementation is module._launch else ROUNDING
    )
    torch.testing.assert_close(actual.sum(1), torch.full((2,), 70.0), rtol=rtol, atol=0)


def test_nan_in_a_key_reaches_those_that_see_it_only(implementation):
    batch, dense = make_inputs(150, 150, 16, 1, 1, 32)
    batch.keys[batch.page_table[0, 0, 149 // 16], 149 % 16] = float("nan")  # the last query sees it, and all keys
    assert run(implementation, batch).isnan().all()
    one_less = torch.tensor([0, 1])
    before = replace(
        batch, query_start_loc=batch.query_start_loc - one_less, kv_start_loc=batch.kv_start_loc - one_less
    )
    expected = dense_formula(queries_of(before), dense[:, :149], before.scale)
    torch.testing.assert_close(run(implementation, before), expected, **TOLERANCE)


def test_inputs_stay_as_they_are(implementation):
    batch, _ = make_inputs(90, 31, 16, 2, 2, 32, torch.bfloat16, packing="transposed")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    run(implementation, batch)
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


# kv_len, num_queries
SEVERAL = [(150, 33), (1, 1), (70, 0), (129, 129), (200, 1), (64, 20)]


def check_that_each_is_as_if_alone(implementation, batch, denses):
    """Zeros are negative: adding one of the other sign to what stays as it is would show."""
    together = run(implementation, batch, start=-0.0)
    for req, dense in enumerate(denses):
        query, of_request = queries_of(batch, req), together[:, batch.kv_start_loc[req] : batch.kv_start_loc[req + 1]]
        starts = torch.tensor([[0, len(query)], [0, dense.shape[1]]])
        if len(query) == 0:
            assert of_request.equal(torch.zeros_like(of_request)) and of_request.signbit().all()
            continue
        torch.testing.assert_close(of_request, dense_formula(query, dense, batch.scale), **TOLERANCE)
        pages = batch.page_table[req : req + 1]
        alone = ChunkBatch(query, batch.keys, pages, *starts, len(query), dense.shape[1], batch.scale)
        assert run(implementation, alone).equal(of_request)


@pytest.mark.parametrize("packing", ["plain", "transposed"])
def test_each_of_several_requests_is_as_if_alone(implementation, packing):
    batch, denses = make_batch(SEVERAL, 16, 2, 3, 32, packing=packing)
    check_that_each_is_as_if_alone(implementation, batch, denses)


def test_each_of_several_requests_is_as_if_alone_at_length(fast_implementation):
    batch, denses = make_batch([(300, 280), (8500, 5), (700, 64)], 32, 1, 2, 16)
    check_that_each_is_as_if_alone(fast_implementation, batch, denses)


@pytest.mark.parametrize("most", [(33, 200), (200, 208)])
def test_bounds_may_be_larger_than_what_they_bound(implementation, most):
    batch, _ = make_batch([(150, 33), (64, 20)], 16, 1, 1, 32)
    wide = replace(batch, page_table=F.pad(batch.page_table, (0, 2)), max_query_len=most[0], max_kv_len=most[1])
    assert run(implementation, wide).equal(run(implementation, batch))


def test_no_queries_at_all(implementation):
    batch, _ = make_batch([(150, 0), (64, 0)], 16, 1, 1, 32)
    assert run(implementation, batch, start=-0.0).signbit().all()


@pytest.mark.parametrize("fast_implementation", ["native-16", "native-8", "native-4"], indirect=True)
def test_does_not_depend_on_the_number_of_threads(fast_implementation):
    batch, _ = make_batch([(700, 530), (90, 31)], 16, 2, 3, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(fast_implementation, batch))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def replaced(**changes):
    """Valid arguments with some replaced; a function replaces an argument by its result."""
    batch, _ = make_inputs(100, 32, 32, 2, 2, 64)
    named = {**vars(batch), "sums": torch.zeros(2, 100)}
    for name, change in changes.items():
        named[name] = change(named[name]) if callable(change) else change
    sums = named.pop("sums")
    return ChunkBatch(**named), sums


def of_length(kv_len):
    return {"kv_start_loc": torch.tensor([0, kv_len]), "max_kv_len": min(kv_len, 192), "sums": torch.zeros(2, kv_len)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": lambda query: query[0]}, "`query`: expected .* .num_tokens, num_heads, head_size."),
        ({"query": lambda query: query.transpose(1, 2)}, "`query`: expected .* contiguous last dimension"),
        ({"query": lambda query: query.double()}, "`query`: expected .* got torch.float64"),
        ({"keys": lambda keys: keys[0]}, "`keys`: expected floats .num_pages, block_size, head_size."),
        ({"keys": lambda keys: keys[:, :, :32]}, "`keys`: expected .* of head size 64 on cpu; got .* of head size 32"),
        ({"keys": lambda keys: keys.half()}, "`keys`: expected torch.float32, or an 8-bit .* got torch.float16"),
        ({"keys": lambda keys: keys.repeat_interleave(2, 2)[:, ::2, ::2]}, "`keys`: expected .* contiguous token or"),
        ({"page_table": lambda table: table[0]}, "`page_table`: expected .2, num_kv_heads, max_pages., got shape"),
        (
            {"page_table": lambda table: table.repeat(1, 2, 1)[:, :3]},
            "`page_table`: expected .* divides 4 query heads, got 3",
        ),
        ({"page_table": lambda table: table.int()}, "`page_table`: expected int64 on cpu"),
        ({"page_table": lambda table: table - 1}, "`page_table`: expected page ids 0 to 12, got -1 to"),
        (of_length(192), "`page_table`: expected page ids 0 to 12, got 0 to 1152921504606846976"),
        (of_length(31), "`query`: expected 32 tokens among 192 of the page table, got 0 to 31"),
        ({**of_length(193), "max_kv_len": 193}, "`max_kv_len`: expected at most 192 tokens .page table., got 193"),
        (of_length(193), "`max_kv_len`: expected at least 193, got 192"),
        ({"max_query_len": 31}, "`max_query_len`: expected at least 32, got 31"),
        ({"query_start_loc": lambda starts: starts[1:]}, "`query_start_loc`: expected contiguous torch.int64 .2."),
        ({"kv_start_loc": lambda starts: starts.int()}, "`kv_start_loc`: expected contiguous torch.int64 .2."),
        ({"query_start_loc": torch.tensor([5, 37])}, "`query`: expected a chunk among 36 rows, got one from 5 to 37"),
        ({"query_start_loc": torch.tensor([-1, 31])}, "`query`: expected a chunk among 36 rows, got one from -1 to 31"),
        ({"query_start_loc": torch.tensor([9, 8])}, "`query`: expected a chunk among 36 rows, got one from 9 to 8"),
        ({"kv_start_loc": torch.tensor([-1, 100])}, "`kv_start_loc`: expected a request among 100 sums, got -1 to 100"),
        ({"sums": lambda sums: sums[0]}, "`sums`: expected .2, kv_start_loc.-1.., got shape .100,."),
        ({"sums": lambda sums: sums[:1]}, "`sums`: expected .2, kv_start_loc.-1.., got shape .1, 100."),
        ({"sums": lambda sums: sums[:, :99]}, "`kv_start_loc`: expected an end of 99 .sums., got 100"),
        ({"sums": lambda sums: sums.double()}, "`sums`: expected float32 .* got torch.float64"),
        ({"sums": lambda sums: sums.T.contiguous().T}, "`sums`: expected float32 on cpu with contiguous rows"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        streaming_sums(*replaced(**changes))


def test_no_scratch_memory(monkeypatch):
    monkeypatch.setattr(module, "function", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="no scratch memory for 4 heads and 100 tokens"):
        streaming_sums(*replaced())


def test_reference_without_library(monkeypatch):
    batch, dense = make_inputs(100, 32, 32, 2, 2, 64)
    monkeypatch.setattr(module, "function", lambda *_: None)
    torch.testing.assert_close(
        run(streaming_sums, batch), dense_formula(queries_of(batch), dense, batch.scale), **TOLERANCE
    )
