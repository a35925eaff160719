"""chunk_attention against a dense float64 formula, for every implementation that can run here."""

from collections.abc import Iterator

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


def make_inputs(
    start, chunk, block_size, num_kv_heads, group, head_size, dtype=torch.float32, key_dtype=None, packing="plain"
):
    """Also the dense keys [num_kv_heads, chunk, head_size]; all others are NaN."""
    keys, page_table, dense = scrambled_keys(
        num_kv_heads, range(start, start + chunk), block_size, head_size, key_dtype or dtype, packing
    )
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(chunk, num_kv_heads * group + 2, head_size + 8, generator=generator)
    return (query.to(dtype)[:, 1:-1, :head_size], keys, page_table, start, head_size**-0.5), dense


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
    actual = implementation(*inputs, reduction)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, dense_formula(inputs[0], dense, inputs[-1], reduction), **TOLERANCE)


@pytest.mark.parametrize("dtype, key_dtype", PAIRS, ids=str)
def test_every_dtype(implementation, dtype, key_dtype):
    inputs, dense = make_inputs(7, 90, 16, 2, 2, 32, dtype, key_dtype, "transposed")
    actual = implementation(*inputs, "mean")
    torch.testing.assert_close(actual, dense_formula(inputs[0], dense, inputs[-1], "mean"), **TOLERANCE)


@pytest.mark.parametrize("magnitude", [1e-3, 1e4])
def test_extreme_logits(implementation, magnitude):
    """Flat attention, and logits whose exponential no float can hold: every query hands out one."""
    inputs, dense = make_inputs(7, 90, 16, 2, 2, 32)
    actual = implementation(inputs[0] * magnitude, *inputs[1:], "mean")
    rtol = (
        rounding_of_interpreter(inputs[0] * magnitude, dense, inputs[-1])
        if implementation is module._launch
        else ROUNDING
    )
    torch.testing.assert_close(actual.sum(1), torch.full((2,), 90.0), rtol=rtol, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_nan_in_a_key_is_not_hidden(implementation, reduction):
    inputs, _ = make_inputs(7, 90, 16, 1, 2, 32)
    inputs[1][inputs[2][0, 1], 3] = float("nan")
    assert implementation(*inputs, reduction).isnan().all()


def test_inputs_stay_as_they_are(implementation):
    inputs, _ = make_inputs(7, 90, 16, 2, 2, 32, torch.bfloat16, packing="transposed")
    before = [tensor.clone() for tensor in inputs[:3]]
    implementation(*inputs, "max")
    for tensor, copy in zip(inputs, before, strict=False):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", ["native-16", "native-8", "native-4"], indirect=True)
def test_does_not_depend_on_the_number_of_threads(implementation):
    inputs, _ = make_inputs(100, 500, 16, 2, 3, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(implementation(*inputs, "mean"))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start": -1}, "`query`: expected 40 tokens among 192 of the page table, got -1 to 39"),
        ({"start": 153}, "`query`: expected 40 tokens among 192 of the page table, got 153 to 193"),
        ({"start": 19}, "`page_table`: expected page ids 0 to 10, got .* to 1152921504606846976"),
        ({"reduction": "sum"}, "`reduction`: expected 'mean' or 'max', got 'sum'"),
    ],
)
def test_wrong_arguments(changes, message):
    """What other arguments may be is tested with streaming_sums, which shares the check."""
    inputs, _ = make_inputs(64, 40, 32, 3, 2, 64)
    named = dict(zip(("query", "keys", "page_table", "start", "scale"), inputs, strict=True))
    named["page_table"] = named["page_table"][:, : named["page_table"].shape[1] + 2]
    with pytest.raises(ValueError, match=message):
        chunk_attention(**{**named, "reduction": "mean", **changes})


def test_no_scratch_memory(monkeypatch):
    inputs, _ = make_inputs(64, 40, 32, 2, 2, 64)
    monkeypatch.setattr(module, "function", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="no scratch memory for 4 heads and 40 tokens"):
        chunk_attention(*inputs, "mean")


def test_reference_without_library(monkeypatch):
    inputs, dense = make_inputs(64, 40, 32, 2, 2, 64)
    monkeypatch.setattr(module, "function", lambda *_: None)
    expected = dense_formula(inputs[0], dense, inputs[-1], "max")
    torch.testing.assert_close(chunk_attention(*inputs, "max"), expected, **TOLERANCE)
