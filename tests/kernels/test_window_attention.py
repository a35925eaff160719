"""window_attention against a dense float64 formula, for every implementation that can run here."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from vllm_kvevict.kernels import window_attention as module
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.window_attention import window_attention, window_attention_reference

HEAD_SIZE = 64
# kv_len, window, block_size, num_kv_heads, group
CASES = [
    pytest.param(*case, id="kv{}-window{}-block{}-kvheads{}-group{}".format(*case))
    for case in [
        (33, 32, 16, 1, 1),
        (33, 33, 32, 3, 3),
        (63, 1, 16, 2, 4),
        (64, 8, 64, 2, 1),
        (100, 32, 32, 3, 3),
        (100, 17, 64, 1, 4),
        (500, 64, 16, 2, 3),
        (500, 40, 32, 1, 1),
        (1000, 32, 64, 2, 4),
        (1000, 5, 32, 3, 3),
    ]
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
# of the query, of the keys
PAIRS = [*zip(DTYPES, DTYPES, strict=True), *product(DTYPES[:2], FLOAT8)]

# Every implementation converts its inputs to float32 exactly, so one tolerance serves all dtypes. A logit here is a sum
# of 64 products of size about 1 and is off by about 1e-6, which is the relative error of its exponential; the sums over
# keys and queries have positive terms and add nothing worse.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(params=["reference", "native-16", "native-8", "native-4"])
def implementation(request: pytest.FixtureRequest) -> Iterator[object]:
    """One way to compute window_attention; native-16 is AVX-512, native-8 AVX2, native-4 SSE or NEON."""
    if request.param == "reference":
        yield window_attention_reference
        return
    kernels = library()
    if kernels is None:
        pytest.skip("the CPU kernels are not built: run `python setup.py build_ext --inplace`")
    lanes = int(request.param.removeprefix("native-"))
    try:
        if kernels.kvevict_limit_lanes(lanes) != lanes:
            pytest.skip(f"this machine has no vectors of {lanes} floats")
        yield window_attention
    finally:
        kernels.kvevict_limit_lanes(16)


def make_inputs(
    kv_len, window, block_size, num_kv_heads, group, dtype=torch.float32, packing="plain", seed=0, key_dtype=None
):
    """Scrambled pages in a poisoned pool; also the dense keys [num_kv_heads, kv_len, head_size]."""
    key_dtype = key_dtype or dtype
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-kv_len // block_size)
    num_pages = num_blocks * num_kv_heads + 5
    page_elements = block_size * HEAD_SIZE
    # a page holds K, then V, as in the engine; whatever no request owns is NaN
    storage = torch.full((num_pages, 2 * page_elements), float("nan"), dtype=key_dtype)
    if packing == "transposed":
        keys = storage[:, :page_elements].view(num_pages, HEAD_SIZE, block_size).transpose(1, 2)
    else:
        keys = storage.view(num_pages, block_size, 2 * HEAD_SIZE)[:, :, :HEAD_SIZE]
    owned = torch.randperm(num_pages, generator=generator)[: num_blocks * num_kv_heads].view(num_kv_heads, num_blocks)
    page_table = torch.full((num_kv_heads, num_blocks + 2), 2**60)
    page_table[:, :num_blocks] = owned
    dense_keys = torch.randn(num_kv_heads, kv_len, HEAD_SIZE, generator=generator).to(key_dtype)
    for cache_index in range(kv_len):
        keys[owned[:, cache_index // block_size], cache_index % block_size] = dense_keys[:, cache_index]
    num_heads = num_kv_heads * group
    query = torch.randn(window, num_heads + 2, HEAD_SIZE + 8, generator=generator).to(dtype)[:, 1:-1, :HEAD_SIZE]
    return (query, keys, page_table, kv_len, HEAD_SIZE**-0.5), dense_keys


def dense_formula(query, dense_keys, scale):
    """Query by query and head by head in float64, over nothing but the keys that the query sees."""
    window, num_heads, _ = query.shape
    num_kv_heads, kv_len, _ = dense_keys.shape
    sums = torch.zeros(num_heads, kv_len, dtype=torch.float64)
    for head in range(num_heads):
        head_keys = dense_keys[head * num_kv_heads // num_heads].double()
        for i in range(window):
            seen = kv_len - window + i + 1
            sums[head, :seen] += torch.softmax(head_keys[:seen] @ query[i, head].double() * scale, dim=0)
    return sums.float()


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("dtype, key_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("kv_len, window, block_size, num_kv_heads, group", CASES)
def test_equals_dense_formula(
    implementation, kv_len, window, block_size, num_kv_heads, group, dtype, key_dtype, packing
):
    inputs, dense_keys = make_inputs(
        kv_len, window, block_size, num_kv_heads, group, dtype, packing, key_dtype=key_dtype
    )
    actual = implementation(*inputs)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, dense_formula(inputs[0], dense_keys, inputs[-1]), **TOLERANCE)


@pytest.mark.parametrize(
    "dtype, largest",
    # first the subnormals and the number that follows them, in the end all that are finite
    [
        *product([torch.float8_e4m3fn], [2**-6, 1.0, 448.0]),
        *product([torch.float8_e5m2], [2**-14, 2**-6, 1.0, 57344.0]),
    ],
    ids=str,
)
def test_every_8_bit_float_up_to_a_magnitude(implementation, dtype, largest):
    """Each is the only number of one key that is not 0; the largest make logits of 4 and -4."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = numbers[numbers.float().abs() <= largest]
    keys = torch.zeros(1, len(numbers), 8, dtype=dtype)
    keys[0, :, 3] = numbers
    query, page_table = torch.ones(1, 1, 8), torch.zeros(1, 1, dtype=torch.int64)
    scale = 4 / largest
    actual = implementation(query, keys, page_table, len(numbers), scale)
    torch.testing.assert_close(actual, dense_formula(query, keys, scale), **TOLERANCE)


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_extreme_logits(implementation, magnitude):
    """Flat attention, one-hot attention, and logits whose exponential no float can hold."""
    inputs, dense_keys = make_inputs(300, 32, 32, 2, 2)
    query = inputs[0] * magnitude
    actual = implementation(query, *inputs[1:])
    # a logit of size magnitude * 8 has a float32 error of some 1e-7 of itself, which the exponential makes relative
    tolerance = {"rtol": 1e-5 + 3e-6 * magnitude, "atol": 1e-6}
    if magnitude < 1e4:
        torch.testing.assert_close(actual, dense_formula(query, dense_keys, inputs[-1]), **tolerance)
    # rows are probabilities whatever the logits are: 32 of them, each off by a few float32 roundings
    torch.testing.assert_close(actual.sum(1), torch.full((4,), 32.0), rtol=1e-5, atol=0)


def test_nan_in_a_live_key_is_not_hidden(implementation):
    inputs, _ = make_inputs(100, 32, 32, 1, 1)
    inputs[1][inputs[2][0, 0], 3] = float("nan")
    assert implementation(*inputs).isnan().all()


def test_inputs_stay_as_they_are(implementation):
    inputs, _ = make_inputs(100, 32, 32, 3, 3, torch.bfloat16, "transposed")
    before = [tensor.clone() for tensor in inputs[:3]]
    implementation(*inputs)
    for tensor, copy in zip(inputs, before, strict=False):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_nan_in_a_live_key_of_8_bits_is_not_hidden(implementation, dtype):
    inputs, _ = make_inputs(100, 32, 32, 1, 1, key_dtype=dtype)
    for bits in (0x7F, 0xFF):
        keys = inputs[1].clone()
        keys.view(torch.uint8)[inputs[2][0, 0], 3, 5] = bits
        assert implementation(inputs[0], keys, *inputs[2:]).isnan().all()


@pytest.mark.parametrize("implementation", ["native-16", "native-8", "native-4"], indirect=True)
def test_does_not_depend_on_the_number_of_threads(implementation):
    inputs, _ = make_inputs(1000, 32, 32, 3, 3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(implementation(*inputs))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def replaced(**changes):
    """Valid inputs with some replaced; a function replaces an input by its result."""
    inputs, _ = make_inputs(100, 32, 32, 2, 2)
    named = dict(zip(("query", "keys", "page_table", "kv_len", "scale"), inputs, strict=True))
    for name, change in changes.items():
        named[name] = change(named[name]) if callable(change) else change
    return named


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": lambda query: query[0]}, "`query`: expected .window, num_heads, head_size."),
        ({"query": lambda query: query.transpose(1, 2)}, "`query`: expected .* contiguous last dimension"),
        ({"query": lambda query: query.double()}, "`query`: expected dtype .* got torch.float64"),
        ({"keys": lambda keys: keys[:, :, :32]}, "`keys`: expected .num_pages, block_size, 64."),
        ({"keys": lambda keys: keys.half()}, "`keys`: expected torch.float32, or an 8-bit .* got torch.float16"),
        ({"query": lambda query: query.to(torch.float8_e5m2)}, "`query`: expected dtype .* got torch.float8_e5m2"),
        ({"keys": lambda keys: keys.repeat_interleave(2, 2)[:, ::2, ::2]}, "`keys`: expected a contiguous token or"),
        ({"page_table": lambda table: table[0]}, "`page_table`: expected .num_kv_heads, max_pages. .* 4 query heads"),
        ({"page_table": lambda table: table.repeat(2, 1)[:3]}, "`page_table`: expected .* 4 query heads"),
        ({"page_table": lambda table: table.int()}, "`page_table`: expected int64 on cpu"),
        ({"kv_len": 31}, "`kv_len`: expected 32 .window. to 192 .page table. tokens, got 31"),
        ({"kv_len": 193}, "`kv_len`: expected 32 .window. to 192 .page table. tokens, got 193"),
        ({"kv_len": 192}, "`page_table`: expected page ids 0 to 12, got 0 to 1152921504606846976"),
        ({"page_table": lambda table: table - 1}, "`page_table`: expected page ids 0 to 12, got -1 to"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        window_attention(**replaced(**changes))


def test_no_scratch_memory(monkeypatch):
    monkeypatch.setattr(module, "function", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="no scratch memory for 4 heads and 100 tokens"):
        window_attention(**replaced())


def test_reference_without_library(monkeypatch):
    inputs, dense_keys = make_inputs(100, 32, 32, 2, 2)
    monkeypatch.setattr(module, "function", lambda *_: None)
    torch.testing.assert_close(window_attention(*inputs), dense_formula(inputs[0], dense_keys, inputs[-1]), **TOLERANCE)
