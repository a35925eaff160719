"""leverage against a dense float64 formula, for every implementation that can run here."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.held_bytes import HeldBytes
from tests.implementations import IMPLEMENTATIONS, scrambled_keys
from tests.implementations import implementation as one_of
from tests.launches import Launches
from vllm_kvevict.kernels import leverage as module
from vllm_kvevict.kernels.leverage import leverage, leverage_reference
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.kernels.whitening import mean_and_map, whiten

# start, end, block_size, num_kv_heads, head_size, rotary_dim, rank; the last has a sketch of more columns than rows
CASES = [
    (0, 1, 16, 1, 16, 16, 8),
    (5, 70, 16, 1, 12, 8, 7),
    (31, 50, 32, 3, 20, 12, 8),
    (3, 40, 64, 1, 16, 8, 18),
]
NAMES = "start, end, block_size, num_kv_heads, head_size, rotary_dim, rank"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]

# The leverage is at most 1. Keys are turned back in float32, whose rounding, 1e-7 of a key, the inverse amplifies by
# the condition of X, below 100 here.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[object]:
    with one_of(request.param, leverage, leverage_reference, module._launch) as function:
        yield function


def make_inputs(
    start,
    end,
    block_size,
    num_kv_heads,
    head_size,
    rotary_dim,
    rank,
    dtype=torch.float32,
    packing="plain",
    is_neox=True,
):
    """One block, and the dense keys [num_kv_heads, end - start, head_size]; all others are NaN."""
    keys, page_table, dense = scrambled_keys(num_kv_heads, range(start, end), block_size, head_size, dtype, packing)
    rotary, sketch = make_maps(end + 3, head_size, rotary_dim, rank, is_neox)
    return (keys, page_table[None], torch.tensor([[0, start, end]]), end - start, rotary, sketch), dense


def make_maps(num_positions, head_size, rotary_dim, rank, is_neox=True):
    angles = torch.arange(num_positions)[:, None] * torch.logspace(0, -2, rotary_dim // 2)
    # YaRN's magnitude
    rotary = Rotary(1.3 * torch.cat([angles.cos(), angles.sin()], dim=1), is_neox)
    generator = torch.Generator().manual_seed(1)
    return rotary, torch.randn(head_size, rank, generator=generator, dtype=torch.float64)


HEADS, SIZES = 2, (16, 12, 10)  # of the batch: head size, rotary dimensions, rank
RANGES = [range(5, 160), range(40), range(3, 90)]  # what its requests hold; all other keys are NaN
# rows of the page table and tokens: of a request twice, one of a single token, and some that overlap
BLOCKS = [[2, 3, 47], [0, 5, 160], [1, 7, 8], [1, 0, 40], [2, 30, 90], [0, 8, 76]]


def make_batch(packing="plain"):
    """Blocks of several requests in a result that is wider than it need be; and the dense keys of each request."""
    pools, tables, dense = [], [], []
    max_pages = max(tokens.stop for tokens in RANGES) // 16 + 3
    for seed, tokens in enumerate(RANGES):
        keys, table, of_request = scrambled_keys(HEADS, tokens, 16, SIZES[0], packing=packing, seed=seed)
        table = torch.nn.functional.pad(table, (0, max_pages - table.shape[1]), value=2**60)
        tables.append(table + sum(map(len, pools)))
        pools.append(keys)
        dense.append(of_request)
    keys = torch.cat([pool.mT for pool in pools]).mT if packing == "transposed" else torch.cat(pools)
    table = torch.stack(tables, dim=1).transpose(0, 1)  # neither of its outer strides is what it is in a batch of one
    return (keys, table, torch.tensor(BLOCKS), 180, *make_maps(170, *SIZES)), dense


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs share the longest blocks of the batch, and one part has but a few tokens."""
    monkeypatch.setattr(module, "LEAST_PART_TOKENS", 64)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("packing", ["plain", "transposed"])
def test_blocks_of_several_requests(implementation, packing):
    (*inputs, rotary, sketch), dense = make_batch(packing)
    actual = implementation(*inputs, rotary, sketch, 0.1)
    assert actual.shape == (len(BLOCKS), HEADS, 180)
    for of_block, (row, start, end) in zip(actual, BLOCKS, strict=True):
        of_request = dense[row][:, start - RANGES[row].start : end - RANGES[row].start]
        expected = dense_formula(of_request, start, rotary, sketch, 0.1)
        torch.testing.assert_close(of_block[:, : end - start], expected, **TOLERANCE)


@pytest.mark.usefixtures("one_thread", "short_parts")
def test_no_bit_of_a_block_depends_on_the_others_or_the_width(implementation, monkeypatch):
    """Nor one of the sums in float64, of which few bits show in the result; the reference makes others."""
    seen = []

    def watched(total, moment, *others):
        seen.append((total, moment))
        return mean_and_map(total, moment, *others)

    monkeypatch.setattr(module, "mean_and_map", watched)
    (keys, table, blocks, max_tokens, *maps), _ = make_batch()
    together = implementation(keys, table, blocks, max_tokens, *maps, 0.1)
    sums = seen.pop() if seen else ()
    for index, (row, start, end) in enumerate(BLOCKS):
        of_request = torch.tensor([[0, start, end]])
        alone = implementation(keys, table[row : row + 1], of_request, end - start, *maps, 0.1)
        assert together[index, :, : end - start].equal(alone[0])
        for of_all, of_one in zip(sums, seen.pop() if seen else (), strict=True):
            assert of_all[index].equal(of_one[0])


@pytest.mark.parametrize("rank", [5, 20, 100])
@pytest.mark.parametrize("implementation", ["native-4", "triton"], indirect=True)
def test_blocks_hold_what_they_are_said_to_hold(implementation, rank):
    (keys, table, _, _, *_), _ = make_batch()
    most = []
    for num_blocks in (3, 6):
        blocks = torch.tensor([[0, 5, 15]]).repeat(num_blocks, 1)
        with HeldBytes() as held:
            result = implementation(keys, table, blocks, 10, *make_maps(15, *SIZES[:2], rank), 0.0)
        most.append(held.most - result.nbytes)
    assert (most[1] - most[0]) / 3 <= module.block_bytes(HEADS, SIZES[0], rank, 10)


def dense_formula(dense, start, rotary, sketch, ridge):
    """Head by head by the pseudo-inverse, in float64 but for the table of the rotation."""
    leverages = []
    for head in dense.double():
        positions = torch.arange(start, start + len(head))
        wide = Rotary(rotary.cos_sin.double(), rotary.is_neox_style)
        x = wide.unrotate(head, positions) @ sketch
        x = x - x.mean(0)
        inverse = torch.linalg.pinv(x.T @ x + ridge * torch.eye(x.shape[1]), rtol=1e-12 if ridge == 0 else 0)
        leverages.append((x @ inverse * x).sum(1))
    return torch.stack(leverages).float()


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize(NAMES, CASES)
def test_equals_dense_formula(
    implementation, start, end, block_size, num_kv_heads, head_size, rotary_dim, rank, is_neox, packing
):
    sizes = start, end, block_size, num_kv_heads, head_size, rotary_dim, rank
    inputs, dense = make_inputs(*sizes, packing=packing, is_neox=is_neox)
    actual = implementation(*inputs, 0.0)
    assert actual.dtype == torch.float32
    assert actual.shape == (1, num_kv_heads, end - start)
    torch.testing.assert_close(actual[0], dense_formula(dense, start, *inputs[-2:], 0.0), **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_a_scale_and_a_ridge(implementation, dtype):
    inputs, dense = make_inputs(3, 40, 16, 1, 16, 16, 8, dtype, "transposed")
    expected = dense_formula(dense.float() * 0.3, 3, *inputs[-2:], 0.5)
    torch.testing.assert_close(implementation(*inputs, 0.5, 0.3)[0], expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rotary_table_of_16_bits(implementation, dtype):
    inputs, dense = make_inputs(3, 40, 16, 1, 16, 16, 8)
    table = Rotary(inputs[4].cos_sin.to(dtype), True)
    expected = dense_formula(dense, 3, table, inputs[5], 0.0)
    torch.testing.assert_close(implementation(*inputs[:4], table, inputs[5], 0.0)[0], expected, **TOLERANCE)


def test_keys_far_from_their_mean(implementation):
    """Moments of keys whose mean is 100 times their deviation lose 4 of the 16 digits of float64."""
    inputs, dense = make_inputs(3, 40, 16, 1, 16, 16, 8)
    keys = inputs[0] + 100
    expected = dense_formula(dense + 100, 3, *inputs[-2:], 0.0)
    # keys themselves have lost 2 of the 7 digits of float32 when they are turned back
    torch.testing.assert_close(implementation(keys, *inputs[1:], 0.0)[0], expected, rtol=1e-3, atol=1e-4)


def test_inputs_stay_as_they_are(implementation):
    inputs, _ = make_inputs(3, 40, 16, 1, 16, 16, 8, torch.bfloat16, "transposed")
    tensors = [*inputs[:3], inputs[4].cos_sin, inputs[5]]
    before = [tensor.clone() for tensor in tensors]
    implementation(*inputs, 0.0)
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", ["native-16", "native-8", "native-4"], indirect=True)
def test_does_not_depend_on_the_number_of_threads(implementation):
    inputs, _ = make_inputs(3, 1500, 16, 2, 64, 64, 48)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(implementation(*inputs, 0.0))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def replaced(**changes):
    """Valid arguments with some replaced; a function replaces an argument by its result."""
    inputs, _ = make_inputs(3, 40, 16, 2, 16, 16, 8)
    named = dict(zip(("keys", "page_table", "blocks", "max_tokens", "rotary", "sketch"), inputs, strict=True))
    named["ridge"] = 0.0
    for name, change in changes.items():
        named[name] = change(named[name]) if callable(change) else change
    return named


def block(row, start, end):
    return torch.tensor([[row, start, end]])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keys": lambda keys: keys[0]}, "`keys`: expected floats .num_pages, block_size, head_size."),
        ({"keys": lambda keys: keys.double()}, "`keys`: expected floats .* got torch.float64"),
        ({"keys": lambda keys: keys.repeat_interleave(2, 2)[:, ::2, ::2]}, "`keys`: expected .* contiguous token or"),
        ({"page_table": lambda table: table[0]}, "`page_table`: expected .*num_kv_heads, max_pages."),
        ({"page_table": lambda table: table.int()}, "`page_table`: expected int64"),
        ({"blocks": torch.zeros(0, 3).long()}, "`blocks`: expected contiguous torch.int64 .1, 3."),
        ({"blocks": torch.zeros(1, 2).long()}, "`blocks`: expected contiguous torch.int64 .1, 3."),
        ({"blocks": lambda blocks: blocks.int()}, "`blocks`: expected contiguous torch.int64 .* got torch.int32"),
        ({"blocks": block(1, 3, 40)}, "`blocks`: expected a row below 1 .* got 3 to 40 of row 1"),
        ({"blocks": block(-1, 3, 40)}, "`blocks`: expected a row below 1 .* got 3 to 40 of row -1"),
        ({"blocks": block(0, -1, 30)}, "`blocks`: expected .* range .* 80 tokens .* 43 positions .* got -1 to 30"),
        ({"blocks": block(0, 40, 40)}, "`blocks`: expected .* range .* got 40 to 40"),
        ({"blocks": block(0, 8, 44)}, "`blocks`: expected .* range .* got 8 to 44"),
        ({"max_tokens": 36}, "`blocks`: expected .* range of 1 to 36 .* got 3 to 40"),
        ({"page_table": lambda table: table - 1}, "`page_table`: expected page ids 0 to 10, got -1 to"),
        ({"rotary": Rotary(torch.ones(50, 18), True)}, "`rotary`: expected .* at most 16 dimensions"),
        ({"rotary": Rotary(torch.ones(50, 8).double(), True)}, "`rotary`: expected .* got torch.float64"),
        ({"sketch": lambda sketch: sketch.float()}, "`sketch`: expected float64 .16, rank."),
        ({"sketch": lambda sketch: sketch[1:]}, "`sketch`: expected float64 .16, rank."),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        leverage(**replaced(**changes))


def test_no_scratch_memory(monkeypatch):
    monkeypatch.setattr(module, "function", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="no scratch memory for 2 heads of size 16"):
        leverage(**replaced())


def test_reference_without_library(monkeypatch):
    inputs, dense = make_inputs(3, 40, 16, 2, 16, 16, 8)
    monkeypatch.setattr(module, "function", lambda *_: None)
    torch.testing.assert_close(leverage(*inputs, 0.0)[0], dense_formula(dense, 3, *inputs[-2:], 0.0), **TOLERANCE)


@pytest.mark.parametrize("num_rows", [2, 5, 40])
def test_the_factorisation_waits_for_nothing_and_inverts_what_the_rows_span(num_rows):
    rows = torch.randn(1, 3, num_rows, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, moment = rows.sum(dim=2, keepdim=True), rows.mT @ rows
    sketch = torch.eye(8, dtype=torch.float64)
    with Launches() as launches:
        mean, root = whiten(total, moment, torch.tensor([num_rows]), sketch, 0.0)
    assert launches.waits == []
    centred = (rows - mean)[0]
    hat = centred @ torch.linalg.pinv(centred)
    lengths = (centred @ root).square().sum(dim=-1)
    torch.testing.assert_close(lengths, hat.diagonal(dim1=1, dim2=2), rtol=1e-6, atol=1e-9)


def test_factorisations_that_wait_are_noticed():
    with Launches() as launches:
        torch.linalg.eigh(torch.eye(3))
        torch.linalg.pinv(torch.eye(3), hermitian=True)
    assert launches.waits == ["_linalg_eigh", "linalg_pinv"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize(("size", "rank"), [(6, 3), (20, 7), (64, 48), (128, 48), (96, 130)])
def test_no_bit_of_a_map_depends_on_how_many_there_are(size, rank, num_kv_heads):
    rows = torch.randn(9, num_kv_heads, 50, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = rows.sum(dim=2, keepdim=True), rows.mT @ rows, torch.arange(50, 59)
    sketch = torch.randn(size, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = mean_and_map(*inputs, sketch, 0.0, 16)
    for first in range(9):
        alone = mean_and_map(*(tensor[first : first + 1] for tensor in inputs), sketch, 0.0, 16)
        assert together[0][first].equal(alone[0][0])
        assert together[1].unflatten(0, (9, -1))[first].equal(alone[1])
