"""window_scores against a dense float64 formula, for every implementation that can run here."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from tests.gpu import HAS_GPU, on_gpu
from tests.implementations import LOGITS, ROUNDING, hard_sinks, probabilities, rounding_of_interpreter
from vllm_kvevict.kernels import window_scores as module
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.window_batch import Reduction, WindowBatch
from vllm_kvevict.kernels.window_scores import window_scores, window_scores_reference, window_scores_triton

HEAD_SIZE, VALUE_HEAD_SIZE = 40, 24  # no multiples of a vector, nor powers of two
# kv_lens, window, block_size, num_kv_heads, group
CASES = [
    pytest.param(*case, id="kv{}-window{}-block{}-kvheads{}-group{}".format(*case))
    for case in [
        ((33,), 32, 16, 1, 1),
        ((33, 35), 33, 32, 3, 3),
        ((63,), 1, 16, 2, 4),
        ((64, 9), 8, 64, 2, 1),
        ((100, 131), 17, 64, 1, 4),
        ((500,), 64, 16, 2, 3),
        ((500, 40, 263), 40, 32, 1, 1),
        ((1000, 257), 5, 32, 3, 3),
    ]
]
FEW = [CASES[2], CASES[4]]  # for the interpreter, which is slow
REDUCTIONS = [
    Reduction(),
    Reduction("sum", "avg", 5),
    Reduction("max", "max", 7, "largest_value_norm"),
    Reduction("mean", "avg", 63, "value_norm"),
    Reduction("max", "max", 3, "value_norm", own_columns=True),
    Reduction("mean", own_columns=True),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
# of the query, of the cache
PAIRS = [*zip(DTYPES, DTYPES, strict=True), *product(DTYPES[:2], FLOAT8)]

# Every implementation converts its inputs to float32 exactly, so one tolerance serves all dtypes. A logit here is a sum
# of 40 products of size about 1 and is off by about 1e-6, which is the relative error of its exponential; the sums over
# keys and queries have positive terms and add nothing worse. 2^-125 may stand for 0 where causality hides a key.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-9}
NATIVE = ["native-16", "native-8", "native-4"]


@pytest.fixture(params=["reference", *NATIVE, "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[object]:
    """One way to compute window_scores; native-16 is AVX-512, native-8 AVX2, native-4 SSE or NEON."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        yield on_gpu(window_scores_triton) if HAS_GPU else window_scores_triton
        return
    if request.param == "reference":
        yield window_scores_reference
        return
    kernels = library()
    if kernels is None:
        pytest.skip("the CPU kernels are not built: run `python setup.py build_ext --inplace`")
    lanes = int(request.param.removeprefix("native-"))
    try:
        if kernels.kvevict_limit_lanes(lanes) != lanes:
            pytest.skip(f"this machine has no vectors of {lanes} floats")
        yield window_scores
    finally:
        kernels.kvevict_limit_lanes(16)


def is_slow(implementation):
    return implementation is window_scores_triton


def make_batch(
    kv_lens,
    window,
    block_size,
    num_kv_heads,
    group,
    dtype=torch.float32,
    packing="plain",
    key_dtype=None,
    head_size=HEAD_SIZE,
):
    """Scrambled pages in a poisoned pool; also the dense K and V of each request, [num_kv_heads, kv_len, size]."""
    key_dtype = key_dtype or dtype
    generator = torch.Generator().manual_seed(0)
    pages_per_head = [-(-kv_len // block_size) for kv_len in kv_lens]
    num_pages = sum(pages_per_head) * num_kv_heads + 5
    # a page holds K, then V, as in the engine; whatever no request owns is NaN
    slot = head_size + VALUE_HEAD_SIZE
    storage = torch.full((num_pages, block_size * slot), float("nan"), dtype=key_dtype)
    if packing == "transposed":
        keys = storage[:, : block_size * head_size].view(num_pages, head_size, block_size).transpose(1, 2)
        values = storage[:, block_size * head_size :].view(num_pages, block_size, VALUE_HEAD_SIZE)
    else:
        keys, values = storage.view(num_pages, block_size, slot).split([head_size, VALUE_HEAD_SIZE], dim=2)
    owned = iter(torch.randperm(num_pages, generator=generator).tolist())
    page_table = torch.full((len(kv_lens), num_kv_heads, max(pages_per_head) + 2), 2**60)
    dense = []
    for req, (kv_len, count) in enumerate(zip(kv_lens, pages_per_head, strict=True)):
        kv = [torch.randn(num_kv_heads, kv_len, n, generator=generator) for n in (head_size, VALUE_HEAD_SIZE)]
        dense.append([part.to(key_dtype) for part in kv])
        page_table[req, :, :count] = torch.tensor([[next(owned) for _ in range(count)] for _ in range(num_kv_heads)])
        for token in range(kv_len):
            for pool, part in zip((keys, values), dense[-1], strict=True):
                pool[page_table[req, :, token // block_size], token % block_size] = part[:, token]
    shape = (len(kv_lens), window, num_kv_heads * group + 2, head_size + 8)
    query = torch.randn(shape, generator=generator).to(dtype)[:, :, 1:-1, :head_size]
    lens = torch.tensor(kv_lens)
    return WindowBatch(query, keys, values, page_table, lens, max(kv_lens) + 3, head_size**-0.5, 0.5), dense


def mean_attention(query, keys, scale, softcap=0.0, sinks=None):
    """[num_heads, kv_len] float64, head by head and query by query, over nothing but the keys that the query sees."""
    window, num_heads, _ = query.shape
    num_kv_heads, kv_len, _ = keys.shape
    query, keys = query.double(), keys.double()
    means = torch.zeros(num_heads, kv_len, dtype=torch.float64)
    for head, i in product(range(num_heads), range(window)):
        seen = keys[head * num_kv_heads // num_heads, : kv_len - window + i + 1]
        sink = None if sinks is None else sinks[head]
        means[head, : len(seen)] += probabilities(seen @ query[i, head] * scale, softcap, sink) / window
    return means


def dense_formula(batch, dense, reduction):
    """Request by request and token by token in float64."""
    window, num_kv_heads = batch.query.shape[1], batch.page_table.shape[1]
    expected = torch.zeros(len(dense), num_kv_heads, batch.max_kv_len, dtype=torch.float64)
    for req, (keys, values) in enumerate(dense):
        kv_len = keys.shape[1]
        num_scored = kv_len if reduction.own_columns else kv_len - window
        sinks = None if batch.sinks is None else batch.sinks[req]
        means = mean_attention(batch.query[req], keys, batch.scale, batch.softcap, sinks)[:, :num_scored]
        for kv_head, of_group in enumerate(means.unflatten(0, (num_kv_heads, -1))):
            reduced = {"mean": torch.mean, "max": torch.amax, "sum": torch.sum}[reduction.group](of_group, 0).tolist()
            norms = (values[kv_head, :num_scored].double().abs().sum(1) * batch.value_scale).tolist()
            for token in range(num_scored):
                near = reduced[max(token - reduction.pool_kernel // 2, 0) : token + reduction.pool_kernel // 2 + 1]
                score = max(near) if reduction.pool == "max" else sum(near) / reduction.pool_kernel
                weight = {"none": 1, "value_norm": norms[token], "largest_value_norm": max(norms)}[reduction.weight]
                expected[req, kv_head, token] = score * weight
    return expected.float()


@cache
def case(*arguments):
    """A batch that several tests read, and what is expected of each reduction."""
    batch, dense = make_batch(*arguments)
    return batch, [dense_formula(batch, dense, reduction) for reduction in REDUCTIONS]


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: f"{r.group}-{r.pool}{r.pool_kernel}-{r.weight}")
@pytest.mark.parametrize("kv_lens, window, block_size, num_kv_heads, group", CASES)
def test_equals_dense_formula(implementation, kv_lens, window, block_size, num_kv_heads, group, reduction, packing):
    shape = (kv_lens, window, block_size, num_kv_heads, group)
    if is_slow(implementation) and (shape not in [few.values for few in FEW] or packing == "plain"):
        pytest.skip("too slow for Triton's interpreter")
    batch, expected = case(*shape, torch.float32, packing)
    actual = implementation(batch, reduction)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected[REDUCTIONS.index(reduction)], **TOLERANCE)


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("dtype, key_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("reduction", [REDUCTIONS[2], REDUCTIONS[4]], ids=lambda r: r.weight)
def test_dtypes(implementation, dtype, key_dtype, packing, reduction):
    if is_slow(implementation) and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    if is_slow(implementation) and packing == "plain" and key_dtype != torch.float32:
        pytest.skip("too slow for Triton's interpreter")
    kv_lens = (70,) if is_slow(implementation) else (100, 333)
    batch, expected = case(kv_lens, 17, 32, 2, 3, dtype, packing, key_dtype)
    torch.testing.assert_close(implementation(batch, reduction), expected[REDUCTIONS.index(reduction)], **TOLERANCE)


@pytest.mark.parametrize("softcap, has_sinks", LOGITS)
@pytest.mark.parametrize("reduction", [REDUCTIONS[0], REDUCTIONS[4]], ids=lambda r: r.group)
def test_soft_capping_and_sinks(implementation, reduction, softcap, has_sinks):
    """Heads of one group and of one request each have a sink of their own; no request has that of another."""
    batch, dense = make_batch((70,) if is_slow(implementation) else (333, 40), 17, 16, 2, 3)
    sinks = hard_sinks(len(dense), 6).add_(torch.arange(len(dense))[:, None]) if has_sinks else None
    batch = replace(batch, softcap=softcap, sinks=sinks)
    expected = dense_formula(batch, dense, reduction)
    torch.testing.assert_close(implementation(batch, reduction), expected, **TOLERANCE)
    others = [replace(batch, softcap=0.0, sinks=None)]
    if has_sinks:
        others.append(replace(batch, sinks=batch.sinks.roll(1, 1)))
    for other in others:
        assert (dense_formula(other, dense, reduction) - expected).abs().max() > 1e-2 * expected.max()


@pytest.fixture
def tiles():
    """AMX is used inside the test."""
    kernels = library()
    if kernels is None or not kernels.kvevict_allow_tiles(1):
        pytest.skip("the CPU kernels are not built, or this machine has no AMX")


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("block_size", [8, 24, 32])  # runs of keys that do and do not fill a tile
@pytest.mark.parametrize("window, group, head_size", [(16, 3, 64), (32, 3, 32), (48, 1, 128)])
@pytest.mark.parametrize("reduction", REDUCTIONS[::2], ids=lambda r: f"{r.group}-{r.pool}{r.pool_kernel}-{r.weight}")
def test_products_of_tiles(tiles, reduction, window, group, head_size, block_size, packing):
    batch, dense = make_batch((48, 563, 320), window, block_size, 2, group, torch.bfloat16, packing, None, head_size)
    expected = dense_formula(batch, dense, reduction)
    actual = window_scores(batch, reduction)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    # it was AMX that did it: sums in another order differ in their last bits
    library().kvevict_allow_tiles(0)
    try:
        assert not window_scores(batch, reduction).equal(actual)
    finally:
        library().kvevict_allow_tiles(1)


def test_tiles_leave_other_libraries_theirs(tiles):
    """PyTorch configures AMX once per thread, and multiplies by what it then believes to be there."""
    batch, _ = make_batch((563,), 32, 32, 2, 3, torch.bfloat16, "transposed", None, 64)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 300, 40, generator=generator).to(torch.bfloat16)
    left, right = torch.randn(2, 200, 200, generator=generator).to(torch.bfloat16)

    def others():
        return torch.nn.functional.scaled_dot_product_attention(query, key, value), left @ right

    expected = others()
    for _ in range(3):
        window_scores(batch, REDUCTIONS[0])
        assert all(found.equal(before) for found, before in zip(others(), expected, strict=True))


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
    table, lens = torch.zeros(1, 1, 1, dtype=torch.int64), torch.tensor([len(numbers)])
    batch = WindowBatch(torch.ones(1, 1, 1, 8), keys, keys, table, lens, len(numbers), 4 / largest)
    reduction = Reduction(weight="value_norm", own_columns=True)
    expected = dense_formula(batch, [[keys, keys]], reduction)
    torch.testing.assert_close(implementation(batch, reduction), expected, **TOLERANCE)


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_extreme_logits(implementation, magnitude):
    """Flat attention, one-hot attention, and logits whose exponential no float can hold."""
    batch, dense = make_batch((200 if is_slow(implementation) else 700,), 32, 32, 2, 2)
    batch = replace(batch, query=batch.query * magnitude)
    reduction = Reduction("sum", own_columns=True)
    actual = implementation(batch, reduction)
    # a logit of size magnitude * 8 has a float32 error of some 1e-7 of itself, which the exponential makes relative
    tolerance = {"rtol": 1e-5 + 3e-6 * magnitude, "atol": 1e-7}
    if magnitude < 1e4:
        torch.testing.assert_close(actual, dense_formula(batch, dense, reduction), **tolerance)
    # rows are probabilities whatever the logits are: means of 32 of them
    rtol = rounding_of_interpreter(batch.query, dense[0][0], batch.scale) if is_slow(implementation) else ROUNDING
    torch.testing.assert_close(actual[0].sum(1), torch.full((2,), 2.0), rtol=rtol, atol=0)


def test_logits_that_grow_and_shrink_along_the_prompt(implementation):
    """The running maximum of the softmax is left behind again and again, or never reached again."""
    batch, dense = make_batch((300,), 4, 32, 1, 2)
    for sign in (1, -1):
        ramp = torch.linspace(0, sign * 60, 300)
        keys = dense[0][0] * 0.1 + ramp[None, :, None] * batch.query[0, 0, 0]
        for token in range(300):
            batch.keys[batch.page_table[0, :, token // 32], token % 32] = keys[:, token]
        actual = implementation(batch, Reduction(own_columns=True))
        expected = dense_formula(batch, [[keys, dense[0][1]]], Reduction(own_columns=True))
        # logits of some hundreds are off by 1e-4, which the exponential makes relative
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("reduction", [Reduction(), Reduction("max", "max", 5)], ids=lambda r: r.group)
@pytest.mark.parametrize("dtype, nan", [(torch.float32, float("nan")), *product(FLOAT8, (0x7F, 0xFF))], ids=str)
def test_nan_in_a_live_key_is_not_hidden(implementation, dtype, nan, reduction):
    if is_slow(implementation) and dtype in FLOAT8:
        pytest.skip("Triton's interpreter reads the NaN of 8-bit floats as numbers")
    batch, _ = make_batch((100,), 32, 32, 2, 2, key_dtype=dtype)
    pool = batch.keys if dtype == torch.float32 else batch.keys.view(torch.uint8)
    pool[batch.page_table[0, 1, 0], 3, 5] = nan
    scores = implementation(batch, reduction)[0]
    assert scores[1, :68].isnan().all()
    assert not scores[0].isnan().any()


def test_inputs_stay_as_they_are(implementation):
    batch, _ = make_batch((100,), 32, 32, 3, 3, torch.float16, "transposed")
    tensors = (batch.query, batch.keys, batch.values, batch.page_table, batch.kv_lens)
    before = [tensor.clone() for tensor in tensors]
    implementation(batch, REDUCTIONS[2])
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", NATIVE, indirect=True)
def test_does_not_depend_on_the_number_of_threads(implementation):
    batch, _ = make_batch((1000, 333), 32, 32, 3, 3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(implementation(batch, REDUCTIONS[2]))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@pytest.mark.parametrize("implementation", ["reference", *NATIVE], indirect=True)
def test_a_request_is_scored_in_a_batch_as_it_is_alone(implementation):
    batch, _ = make_batch((500, 40, 263), 40, 32, 2, 2)
    together = implementation(batch, REDUCTIONS[3])
    for req in range(3):
        one = slice(req, req + 1)
        alone = replace(batch, query=batch.query[one], page_table=batch.page_table[one], kv_lens=batch.kv_lens[one])
        assert implementation(alone, REDUCTIONS[3])[0].equal(together[req])


def changed(**changes):
    """A valid batch with some fields replaced; a function replaces a field by its result."""
    batch, _ = make_batch((100,), 32, 32, 2, 2)
    return replace(batch, **{n: c(getattr(batch, n)) if callable(c) else c for n, c in changes.items()})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": lambda query: query[0]}, "`query`: expected .* .num_reqs, window, num_heads, head_size."),
        ({"query": lambda query: query.transpose(2, 3)}, "`query`: expected .* contiguous last dimension"),
        ({"query": lambda query: query.double()}, "`query`: expected torch.float32 .* got torch.float64"),
        (
            {"query": lambda query: query.to(torch.float8_e5m2)},
            "`query`: expected torch.float32 .* got torch.float8_e5m2",
        ),
        ({"keys": lambda keys: keys[:, :, :32]}, "`keys`: expected .* of head size 40 on cpu; got .* of head size 32"),
        ({"keys": lambda keys: keys.half()}, "`keys`: expected torch.float32, or an 8-bit .* got torch.float16"),
        ({"keys": lambda keys: keys.repeat_interleave(2, 2)[:, ::2, ::2]}, "`keys`: expected .* contiguous token or"),
        ({"values": lambda values: values[1:]}, "`values`: expected .13, 32, value_head_size. .* got shape"),
        ({"values": lambda values: values[:, :, ::2]}, "`values`: .* contiguous last dimension"),
        ({"values": lambda values: values.half()}, "`values`: expected torch.float32 on cpu; got torch.float16"),
        ({"page_table": lambda table: table[0]}, "`page_table`: expected .1, num_kv_heads, max_pages., got"),
        ({"page_table": lambda table: table.repeat(1, 2, 1)[:, :3]}, "`page_table`: expected .* 4 query heads"),
        ({"page_table": lambda table: table.int()}, "`page_table`: expected int64 on cpu"),
        (
            {"kv_lens": lambda lens: lens.int()},
            "`kv_lens`: expected contiguous torch.int64 .1. on cpu, got torch.int32",
        ),
        ({"kv_lens": lambda lens: lens.repeat(4)[::2]}, "`kv_lens`: expected contiguous torch.int64 .1."),
        (
            {"kv_lens": lambda lens: lens.repeat(2)},
            "`kv_lens`: expected contiguous torch.int64 .1. on cpu, got torch.int64 .2.",
        ),
        ({"kv_lens": lambda lens: lens * 0 + 31}, "`kv_lens`: expected 32 .window. to 103 tokens, got 31"),
        ({"kv_lens": lambda lens: lens + 4}, "`kv_lens`: expected 32 .window. to 103 tokens, got 104"),
        ({"max_kv_len": 31}, "`max_kv_len`: expected 32 .window. to 192 .page table. tokens, got 31"),
        ({"max_kv_len": 193}, "`max_kv_len`: expected 32 .window. to 192 .page table. tokens, got 193"),
        ({"kv_lens": torch.tensor([150]), "max_kv_len": 150}, "`page_table`: expected page ids 0 to 12, got 0 to 1152"),
        ({"page_table": lambda table: table - 1}, "`page_table`: expected page ids 0 to 12, got -1 to"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        window_scores(changed(**changes), Reduction())


@pytest.mark.parametrize(
    "reduction, message",
    [
        (Reduction(pool_kernel=4), "`reduction.pool_kernel`: expected an odd number, at least 1, got 4"),
        (Reduction("median"), "`reduction.group`: expected 'sum' or 'mean' or 'max', got 'median'"),
        (Reduction(pool="min"), "`reduction.pool`: expected 'max' or 'avg', got 'min'"),
        (Reduction(weight="l2"), "`reduction.weight`: expected 'none' or .*, got 'l2'"),
    ],
)
def test_wrong_reductions(reduction, message):
    with pytest.raises(ValueError, match=message):
        window_scores(changed(), reduction)


def test_no_scratch_memory(monkeypatch):
    monkeypatch.setattr(module, "function", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="no scratch memory for 4 heads and 103 tokens"):
        window_scores(changed(), Reduction())


def test_reference_without_library(monkeypatch):
    batch, dense = make_batch((100,), 32, 32, 2, 2)
    monkeypatch.setattr(module, "function", lambda *_: None)
    torch.testing.assert_close(
        window_scores(batch, REDUCTIONS[1]), dense_formula(batch, dense, REDUCTIONS[1]), **TOLERANCE
    )
