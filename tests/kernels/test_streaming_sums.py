"""streaming_sums against a dense float64 formula, for every implementation that can run here."""

from collections.abc import Iterator

import pytest
import torch

from tests.implementations import IMPLEMENTATIONS, ROUNDING, rounding_of_interpreter, scrambled_keys
from tests.implementations import implementation as one_of
from vllm_kvevict.kernels import streaming_sums as module
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


def make_inputs(
    kv_len,
    num_queries,
    block_size,
    num_kv_heads,
    group,
    head_size,
    dtype=torch.float32,
    key_dtype=None,
    packing="plain",
):
    """Also the dense keys [num_kv_heads, kv_len, head_size]."""
    keys, page_table, dense = scrambled_keys(
        num_kv_heads, range(kv_len), block_size, head_size, key_dtype or dtype, packing
    )
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(num_queries, num_kv_heads * group + 2, head_size + 8, generator=generator)
    return (query.to(dtype)[:, 1:-1, :head_size], keys, page_table, kv_len, head_size**-0.5), dense


def run(function, inputs, start=0.0):
    """The sums, which begin at ``start``; what lies beside them stays as it was."""
    _query, _, page_table, kv_len, _ = inputs
    around = torch.full((len(page_table), kv_len + 3), float("nan"))
    sums = around[:, 1:-2]
    sums.fill_(start)
    assert function(*inputs, sums) is None
    assert around[:, 0].isnan().all() and around[:, -2:].isnan().all()
    return sums


def dense_formula(query, dense, scale):
    """Head by head in float64."""
    num_queries, num_heads, _ = query.shape
    num_kv_heads, kv_len, _ = dense.shape
    group = num_heads // num_kv_heads
    hidden = torch.arange(kv_len) > torch.arange(kv_len - num_queries, kv_len)[:, None]
    sums = torch.zeros(num_kv_heads, kv_len, dtype=torch.float64)
    for head in range(num_heads):
        logits = query[:, head].double() @ dense[head // group].double().T * scale
        sums[head // group] += logits.masked_fill(hidden, float("-inf")).softmax(1).sum(0) / group
    return sums.float()


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize(NAMES, CASES)
def test_equals_dense_formula(implementation, kv_len, num_queries, block_size, num_kv_heads, group, head_size, packing):
    inputs, dense = make_inputs(kv_len, num_queries, block_size, num_kv_heads, group, head_size, packing=packing)
    torch.testing.assert_close(run(implementation, inputs), dense_formula(inputs[0], dense, inputs[-1]), **TOLERANCE)


@pytest.mark.parametrize(NAMES, LARGE)
def test_equals_dense_formula_at_length(
    fast_implementation, kv_len, num_queries, block_size, num_kv_heads, group, head_size
):
    inputs, dense = make_inputs(kv_len, num_queries, block_size, num_kv_heads, group, head_size, packing="transposed")
    expected = dense_formula(inputs[0], dense, inputs[-1])
    torch.testing.assert_close(run(fast_implementation, inputs), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype, key_dtype", PAIRS, ids=str)
def test_every_dtype(implementation, dtype, key_dtype):
    inputs, dense = make_inputs(90, 31, 16, 2, 2, 32, dtype, key_dtype, "transposed")
    torch.testing.assert_close(run(implementation, inputs), dense_formula(inputs[0], dense, inputs[-1]), **TOLERANCE)


def test_adds_to_what_is_there(implementation):
    inputs, dense = make_inputs(90, 31, 16, 2, 2, 32)
    actual = run(implementation, inputs, start=2.0)
    # 2 holds the sums to a float32 rounding of 2
    torch.testing.assert_close(actual, dense_formula(inputs[0], dense, inputs[-1]) + 2, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("magnitude", [1e-3, 1e4])
def test_extreme_logits(implementation, magnitude):
    """Flat attention, and logits whose exponential no float can hold: every query hands out one."""
    inputs, dense = make_inputs(150, 70, 16, 2, 2, 32)
    actual = run(implementation, (inputs[0] * magnitude, *inputs[1:]))
    rtol = (
        rounding_of_interpreter(inputs[0] * magnitude, dense, inputs[-1])
        if implementation is module._launch
        else ROUNDING
    )
    torch.testing.assert_close(actual.sum(1), torch.full((2,), 70.0), rtol=rtol, atol=0)


def test_nan_in_a_key_reaches_those_that_see_it_only(implementation):
    inputs, dense = make_inputs(150, 150, 16, 1, 1, 32)
    inputs[1][inputs[2][0, 149 // 16], 149 % 16] = float("nan")  # the last query sees it, and all keys
    assert run(implementation, inputs).isnan().all()
    before = inputs[0][:149], *inputs[1:3], 149, inputs[4]
    expected = dense_formula(before[0], dense[:, :149], before[-1])
    torch.testing.assert_close(run(implementation, before), expected, **TOLERANCE)


def test_inputs_stay_as_they_are(implementation):
    inputs, _ = make_inputs(90, 31, 16, 2, 2, 32, torch.bfloat16, packing="transposed")
    before = [tensor.clone() for tensor in inputs[:3]]
    run(implementation, inputs)
    for tensor, copy in zip(inputs, before, strict=False):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fast_implementation", ["native-16", "native-8", "native-4"], indirect=True)
def test_does_not_depend_on_the_number_of_threads(fast_implementation):
    inputs, _ = make_inputs(700, 530, 16, 2, 3, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(fast_implementation, inputs))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def replaced(**changes):
    """Valid arguments with some replaced; a function replaces an argument by its result."""
    inputs, _ = make_inputs(100, 32, 32, 2, 2, 64)
    named = dict(zip(("query", "keys", "page_table", "kv_len", "scale"), inputs, strict=True))
    named["sums"] = torch.zeros(2, 100)
    for name, change in changes.items():
        named[name] = change(named[name]) if callable(change) else change
    return named


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": lambda query: query[0]}, "`query`: expected .* .num_queries, num_heads, head_size."),
        ({"query": lambda query: query.transpose(1, 2)}, "`query`: expected .* contiguous last dimension"),
        ({"query": lambda query: query.double()}, "`query`: expected .* got torch.float64"),
        ({"keys": lambda keys: keys[0]}, "`keys`: expected floats .num_pages, block_size, head_size."),
        ({"keys": lambda keys: keys[:, :, :32]}, "`keys`: expected .* of head size 64 on cpu; got .* of head size 32"),
        ({"keys": lambda keys: keys.half()}, "`keys`: expected torch.float32, or an 8-bit .* got torch.float16"),
        ({"keys": lambda keys: keys.repeat_interleave(2, 2)[:, ::2, ::2]}, "`keys`: expected .* contiguous token or"),
        ({"page_table": lambda table: table[0]}, "`page_table`: expected .num_kv_heads, max_pages., got shape"),
        (
            {"page_table": lambda table: table.repeat(2, 1)[:3]},
            "`page_table`: expected .* divides 4 query heads, got 3",
        ),
        ({"page_table": lambda table: table.int()}, "`page_table`: expected int64 on cpu"),
        ({"kv_len": 31}, "`query`: expected 32 tokens among 192 of the page table, got 0 to 31"),
        ({"kv_len": 193}, "`query`: expected 32 tokens among 192 of the page table, got 0 to 193"),
        ({"kv_len": 192}, "`page_table`: expected page ids 0 to 12, got 0 to 1152921504606846976"),
        ({"page_table": lambda table: table - 1}, "`page_table`: expected page ids 0 to 12, got -1 to"),
        ({"sums": lambda sums: sums[:, :99]}, r"`sums`: expected float32 \(2, 100\) .* got torch.float32 \(2, 99\)"),
        ({"sums": lambda sums: sums.double()}, r"`sums`: expected float32 \(2, 100\) .* got torch.float64"),
        ({"sums": lambda sums: sums.T.contiguous().T}, r"`sums`: expected float32 \(2, 100\) with contiguous rows"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        streaming_sums(**replaced(**changes))


def test_no_scratch_memory(monkeypatch):
    monkeypatch.setattr(module, "function", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="no scratch memory for 4 heads and 100 tokens"):
        streaming_sums(**replaced())


def test_reference_without_library(monkeypatch):
    inputs, dense = make_inputs(100, 32, 32, 2, 2, 64)
    monkeypatch.setattr(module, "function", lambda *_: None)
    torch.testing.assert_close(run(streaming_sums, inputs), dense_formula(inputs[0], dense, inputs[-1]), **TOLERANCE)
