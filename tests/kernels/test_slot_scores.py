"""slot_scores against a dense float64 formula, for every implementation that can run here."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from tests.implementations import IMPLEMENTATIONS, LOGITS, hard_sinks, probabilities
from tests.implementations import implementation as one_of
from vllm_kvevict.kernels import slot_scores as module
from vllm_kvevict.kernels.native import library
from vllm_kvevict.kernels.slot_scores import SlotBatch, slot_scores, slot_scores_reference, slot_scores_triton

HEAD_SIZE = 40  # no multiple of a vector, nor a power of two
# slots held by the KV heads of each request, num_queries, block_size, group
CASES = [
    pytest.param(*case, id="held{}-queries{}-block{}-group{}".format(*case))
    for case in [
        (((16,), (32,)), 1, 16, 1),
        (((64, 96, 32), (128, 32, 0)), 1, 32, 3),
        (((80, 160),), 8, 16, 2),
        (((80, 160), (240, 48)), 20, 16, 1),
        (((448, 64), (64, 192)), 70, 64, 4),
        (((72, 24, 96),), 19, 24, 3),
    ]
]
FEW = [CASES[1], CASES[2], CASES[5]]  # for the interpreter, which is slow
REDUCTIONS = [*product(("mean", "max"), ("sum", "max", "none"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
# of the query, of the cache
PAIRS = [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16), *product(DTYPES[:2], FLOAT8)]
# as for window_scores, for the same reasons
TOLERANCE = {"rtol": 1e-5, "atol": 1e-9}
NATIVE = ["native-16", "native-8", "native-4"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[object]:
    with one_of(request.param, slot_scores, slot_scores_reference, slot_scores_triton) as function:
        yield function


def is_slow(implementation):
    return implementation is slot_scores_triton


def make_batch(held, num_queries, block_size, group, dtype=torch.float32, packing="plain", key_dtype=None):
    """Tokens in scrambled order in scrambled pages of a poisoned pool; also [request][head] position -> key.

    Some slots among them are empty; behind the pages of shorter heads stands page 0, which is NaN. The first query of
    each request sees no token, the last one all of them.
    """
    generator = torch.Generator().manual_seed(0)
    num_kv_heads, max_pages = len(held[0]), max(map(max, held)) // block_size
    num_pages = sum(map(sum, held)) // block_size + 5
    storage = torch.full((num_pages, block_size * HEAD_SIZE * 2), float("nan"), dtype=key_dtype or dtype)
    if packing == "transposed":
        keys = storage[:, : block_size * HEAD_SIZE].view(num_pages, HEAD_SIZE, block_size).transpose(1, 2)
    else:
        keys = storage.view(num_pages, block_size, 2 * HEAD_SIZE)[:, :, :HEAD_SIZE]
    free = iter((torch.randperm(num_pages - 1, generator=generator) + 1).tolist())
    page_table = torch.zeros(len(held), num_kv_heads, max_pages, dtype=torch.int64)
    positions = torch.full((len(held), num_kv_heads, max_pages * block_size), -1)
    num_tokens = max_pages * block_size + 50
    dense = []
    for req, lengths in enumerate(held):
        dense.append([])
        for head, length in enumerate(lengths):
            of_head = torch.randn(length, HEAD_SIZE, generator=generator).to(keys.dtype)
            tokens = torch.randperm(num_tokens, generator=generator)[:length]
            tokens[3:5] = -1
            positions[req, head, :length] = tokens
            for first in range(0, length, block_size):
                page = page_table[req, head, first // block_size] = next(free)
                keys[page] = of_head[first : first + block_size]
            dense[-1].append((tokens.tolist(), of_head))
    shape = (len(held), num_queries, num_kv_heads * group + 2, HEAD_SIZE + 8)
    query = torch.randn(shape, generator=generator).to(dtype)[:, :, 1:-1, :HEAD_SIZE]
    last_seen = torch.linspace(-1, num_tokens, num_queries + 1).long()[1 if num_queries == 1 else 0 :][:num_queries]
    return SlotBatch(query, keys, page_table, positions, last_seen.repeat(len(held), 1), HEAD_SIZE**-0.5), dense


def dense_formula(batch, dense, group, fusion):
    """Query by query and head by head in float64, over nothing but the keys that the query sees."""
    num_queries, num_heads = batch.query.shape[1:3]
    num_kv_heads, num_slots = batch.positions.shape[1:]
    paid = torch.zeros(len(dense), num_kv_heads, num_heads // num_kv_heads, num_queries, num_slots, dtype=torch.float64)
    for req, kv_head, query in product(range(len(dense)), range(num_kv_heads), range(num_queries)):
        tokens, keys = dense[req][kv_head]
        seen = [slot for slot, token in enumerate(tokens) if 0 <= token <= batch.last_seen[req, query]]
        for member in range(paid.shape[2]) if seen else []:
            of_head = batch.query[req, query, kv_head * paid.shape[2] + member].double()
            logits, head = keys[seen].double() @ of_head * batch.scale, kv_head * paid.shape[2] + member
            sink = None if batch.sinks is None else batch.sinks[req, head]
            paid[req, kv_head, member, query, seen] = probabilities(logits, batch.softcap, sink)
    of_group = {"mean": torch.mean, "max": torch.amax}[group](paid, 2)
    return (of_group if fusion == "none" else {"sum": torch.sum, "max": torch.amax}[fusion](of_group, 2)).float()


@cache
def case(*arguments):
    """A batch that several tests read, and what is expected of each reduction."""
    batch, dense = make_batch(*arguments)
    return batch, {reduction: dense_formula(batch, dense, *reduction) for reduction in REDUCTIONS}


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids="-".join)
@pytest.mark.parametrize("held, num_queries, block_size, group", CASES)
def test_equals_dense_formula(implementation, held, num_queries, block_size, group, reduction, packing):
    shape = (held, num_queries, block_size, group)
    if is_slow(implementation) and (shape not in [few.values for few in FEW] or packing == "plain"):
        pytest.skip("too slow for Triton's interpreter")
    batch, expected = case(*shape, torch.float32, packing)
    actual = implementation(batch, *reduction)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected[reduction], **TOLERANCE)


@pytest.mark.parametrize("softcap, has_sinks", LOGITS)
@pytest.mark.parametrize("reduction", [("mean", "none"), ("max", "sum")], ids="-".join)
def test_soft_capping_and_sinks(implementation, reduction, softcap, has_sinks):
    """The first query of a request sees no token: its sink takes nothing from anybody."""
    batch, dense = make_batch(((80, 160), (48, 32)), 8, 16, 3)
    sinks = hard_sinks(len(dense), 6).add_(torch.arange(len(dense))[:, None]) if has_sinks else None
    batch = replace(batch, softcap=softcap, sinks=sinks)
    expected = dense_formula(batch, dense, *reduction)
    torch.testing.assert_close(implementation(batch, *reduction), expected, **TOLERANCE)
    if has_sinks:
        shifted = dense_formula(replace(batch, sinks=batch.sinks.roll(1, 1)), dense, *reduction)
        assert (shifted - expected).abs().max() > 1e-3


@pytest.mark.parametrize("fusion", ["sum", "max", "none"])
def test_a_task_goes_through_its_queries_in_passes_where_a_head_holds_many_slots(fusion):
    """Of 32 queries with 8 heads each 16 MiB have the logits of 32,768 slots of 16; of 40 there are two tasks."""
    batch, _ = make_batch(((32768, 64),), 40, 64, 8)
    with one_of("native-16", slot_scores, slot_scores_reference, slot_scores_triton) as native:
        actual = native(batch, "max", fusion)
    torch.testing.assert_close(actual, slot_scores_reference(batch, "max", fusion), **TOLERANCE)


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("dtype, key_dtype", PAIRS, ids=str)
def test_dtypes(implementation, dtype, key_dtype, packing):
    if is_slow(implementation) and torch.bfloat16 in (dtype, key_dtype):
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    batch, expected = case(((64, 96), (32, 64)), 9, 32, 3, dtype, packing, key_dtype)
    torch.testing.assert_close(implementation(batch, "max", "sum"), expected["max", "sum"], **TOLERANCE)


@pytest.mark.parametrize("packing", ["plain", "transposed"])
@pytest.mark.parametrize("held, num_queries, block_size, group", CASES)
def test_products_of_pairs(held, num_queries, block_size, group, packing):
    """bfloat16 where AVX-512 multiplies two dimensions at once."""
    kernels = library()
    if kernels is None or not kernels.kvevict_allow_pairs(1):
        pytest.skip("the CPU kernels are not built, or this machine has no AVX512_BF16")
    batch, expected = case(held, num_queries, block_size, group, torch.bfloat16, packing)
    for reduction in REDUCTIONS:
        actual = slot_scores(batch, *reduction)
        torch.testing.assert_close(actual, expected[reduction], **TOLERANCE)
        # it was AVX512_BF16 that did it: sums in another order differ in their last bits
        kernels.kvevict_allow_pairs(0)
        try:
            without = slot_scores(batch, *reduction)
        finally:
            kernels.kvevict_allow_pairs(1)
        assert not without.equal(actual)
        torch.testing.assert_close(without, expected[reduction], **TOLERANCE)


@pytest.mark.parametrize("magnitude", [1e-3, 1e4])
def test_extreme_logits(implementation, magnitude):
    """Flat attention, and logits whose exponential no float can hold: every query that sees a slot hands out one."""
    batch, _ = case(*FEW[2].values, torch.float32, "transposed")
    paid = implementation(replace(batch, query=batch.query * magnitude), "mean", "none").sum(-1)
    expected = (batch.last_seen >= batch.positions.masked_fill(batch.positions < 0, 10**6).amin(-1).T).float()
    # two passes over a key may round its logit apart, by a part of how large it is
    largest = (
        magnitude * float(batch.query.norm(dim=-1).max() * batch.keys.norm(dim=-1).nan_to_num().max()) * batch.scale
    )
    rounding = 2 * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(paid, expected[None], rtol=max(1e-4, rounding), atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids="-".join)
def test_nan_in_a_key_is_not_hidden(implementation, reduction):
    batch, _ = make_batch(((32, 32),), 3, 16, 2)
    batch.keys[batch.page_table[0, 1, 1], 5] = float("nan")
    batch = replace(batch, last_seen=torch.tensor([[1000, 1000, 1000]]))
    scores = implementation(batch, *reduction)
    assert scores[0, 1].isnan().all()
    assert not scores[0, 0].isnan().any()


def test_inputs_stay_as_they_are(implementation):
    batch, _ = make_batch(((32, 64),), 5, 16, 2, torch.float16, "transposed")
    before = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    implementation(batch, "max", "max")
    for name, copy in before.items():
        torch.testing.assert_close(getattr(batch, name), copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", NATIVE, indirect=True)
@pytest.mark.parametrize("reduction", REDUCTIONS[:2], ids="-".join)
def test_does_not_depend_on_the_number_of_threads(implementation, reduction):
    batch, _ = case(*CASES[4].values)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(implementation(batch, *reduction))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@pytest.mark.parametrize("implementation", NATIVE, indirect=True)
def test_a_request_is_scored_in_a_batch_as_it_is_alone(implementation):
    batch, _ = case(*CASES[4].values)
    together = implementation(batch, "max", "sum")
    for req in range(2):
        of_requests = ("query", "page_table", "positions", "last_seen")
        alone = replace(batch, **{name: getattr(batch, name)[req : req + 1] for name in of_requests})
        assert implementation(alone, "max", "sum")[0].equal(together[req])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": lambda query: query[0]}, "`query`: expected .* .num_reqs, num_queries, num_heads, head_size."),
        ({"query": lambda query: query.double()}, "`query`: expected torch.float32 .* got torch.float64"),
        ({"keys": lambda keys: keys[:, :, :32]}, "`keys`: expected a head size of 40 on cpu, got 32 on cpu"),
        ({"keys": lambda keys: keys[0]}, "`keys`: expected floats .num_pages, block_size, head_size."),
        ({"page_table": lambda table: table[0]}, "`page_table`: expected .1, num_kv_heads, max_pages., got"),
        ({"page_table": lambda table: table.repeat(1, 2, 1)[:, :3]}, "`page_table`: expected .* 4 query heads"),
        ({"page_table": lambda table: table - 1}, "`page_table`: expected page ids 0 to 10, got -1 to"),
        ({"page_table": lambda table: table + 10}, "`page_table`: expected page ids 0 to 10, got 10 to"),
        (
            {"positions": lambda positions: positions.int()},
            "`positions`: expected .* torch.int64 .1, 2, 64.*torch.int32",
        ),
        (
            {"positions": lambda positions: positions[:, :, 1:]},
            "`positions`: expected contiguous torch.int64 .1, 2, 64.",
        ),
        ({"last_seen": lambda seen: seen[:, 1:]}, "`last_seen`: expected contiguous torch.int64 .1, 5."),
        ({"group": "sum"}, "`group`: expected 'mean' or 'max', got 'sum'"),
        ({"fusion": "mean"}, "`fusion`: expected 'sum' or 'max' or 'none', got 'mean'"),
    ],
)
def test_wrong_arguments(changes, message):
    batch, _ = make_batch(((32, 64),), 5, 16, 2)
    arguments = {"group": "mean", "fusion": "sum", **{n: c for n, c in changes.items() if isinstance(c, str)}}
    fields = {name: change(getattr(batch, name)) for name, change in changes.items() if callable(change)}
    with pytest.raises(ValueError, match=message):
        slot_scores(replace(batch, **fields), **arguments)


def test_no_scratch_memory(monkeypatch):
    batch, _ = make_batch(((32, 64),), 5, 16, 2)
    monkeypatch.setattr(module, "function", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="no scratch memory for 4 heads and 64 slots"):
        slot_scores(batch, "mean", "sum")


def test_reference_without_library(monkeypatch):
    batch, expected = case(*CASES[3].values)
    monkeypatch.setattr(module, "function", lambda *_: None)
    torch.testing.assert_close(slot_scores(batch, "max", "sum"), expected["max", "sum"], **TOLERANCE)
