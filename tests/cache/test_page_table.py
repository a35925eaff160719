"""The page table against a model in plain Python, for requests that come, grow by some tokens per step, and go."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paged import LAYOUTS, PagedCache, make_pool
from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.page_table import FoldedBatch, PageTable
from vllm_kvevict.cache.plan import EvictionPlan

LAYERS, HEADS, BLOCKS = 2, 3, 400
MAX_NUM_REQS = 4
FIRST_CAPACITY = 64  # pages per row that a new table has room for


@dataclass
class RequestModel:
    """What a reader of the documentation expects of one evicted request.

    pages:   [num_layers][num_kv_heads] page ids
    kv_lens: [num_layers][num_kv_heads] tokens held
    blocks:  vLLM's block table; freed blocks are the null block
    grows:   whether new tokens are added behind the others
    """

    seq_len: int
    pages: list[list[list[int]]]
    kv_lens: list[list[int]]
    blocks: list[int] = field(default_factory=list)
    grows: bool = True

    def generate(self, cache: PagedCache, rng: random.Random) -> None:
        """Take a token, and a new block for it if all blocks are full."""
        if self.seq_len == len(self.blocks) * cache.pool.block_size:
            self.blocks.append(rng.randrange(1, BLOCKS))
            for layer, rows in enumerate(self.pages if self.grows else []):
                for head, row in enumerate(rows):
                    row.append(cache.page_id(layer, self.blocks[-1], head))
        self.grow(1)

    def grow(self, num_tokens: int) -> None:
        """Change the lengths only; rejected drafts leave their blocks to the request."""
        self.seq_len += num_tokens
        if self.grows:
            self.kv_lens = [[kv_len + num_tokens for kv_len in row] for row in self.kv_lens]


def evict(
    cache: PagedCache, rng: random.Random, most_pages: int, num_tokens: int | None = None
) -> tuple[Compaction, EvictionPlan, RequestModel]:
    """Make up a compaction with random ragged pages, and the model of its request."""
    block_size = cache.pool.block_size
    num_full = [[rng.randrange(most_pages) for _ in range(HEADS)] for _ in range(LAYERS)]
    num_tokens = num_tokens or rng.randrange(most_pages * block_size, (most_pages + 2) * block_size)
    grows = rng.random() < 0.7
    plan = EvictionPlan(num_tokens, rng.randint(1, -(-num_tokens // block_size) - 1), block_size, not grows)
    has_tail = plan.num_tail_tokens > 0
    blocks = [0] * plan.first_kept_block + [rng.randrange(1, BLOCKS) for _ in range(plan.num_kept_blocks)]
    last_page = [[cache.page_id(layer, blocks[-1], head) for head in range(HEADS)] for layer in range(LAYERS)]
    pages = [
        [
            [rng.randrange(cache.pool.pages.shape[0]) for _ in range(num_full[layer][head])]
            + [last_page[layer][head]] * has_tail
            for head in range(HEADS)
        ]
        for layer in range(LAYERS)
    ]
    table = torch.zeros(LAYERS, HEADS, max(len(row) for rows in pages for row in rows) + 1, dtype=torch.int64)
    for layer, rows in enumerate(pages):
        for head, row in enumerate(rows):
            table[layer, head, : len(row)] = torch.tensor(row, dtype=torch.int64)
    kv_lens = torch.tensor(num_full) * block_size + plan.num_tail_tokens
    compaction = Compaction([], table, torch.tensor(num_full) + has_tail, kv_lens)
    return compaction, plan, RequestModel(num_tokens, pages, kv_lens.tolist(), blocks, grows)


def fold(table: PageTable, batch: dict[str, RequestModel], query_lens: list[int]) -> FoldedBatch:
    """Call ``fold`` as a decode step of these requests does: rows of other lengths are padded with garbage."""
    width = max(len(model.blocks) for model in batch.values()) + 2
    block_table = torch.full((len(batch), width), 2**40)
    for row, model in enumerate(batch.values()):
        block_table[row, : len(model.blocks)] = torch.tensor(model.blocks)
    slots = table.slots.of(list(batch))
    seq_lens = torch.tensor([model.seq_len for model in batch.values()], dtype=torch.int32)
    return table.fold(slots, seq_lens, torch.tensor(query_lens), block_table)


def check(folded: FoldedBatch, batch: dict[str, RequestModel], block_size: int) -> None:
    """Every row holds its pages in order and then zeros, and its length counts the new token."""
    assert folded.page_table.dtype == folded.kv_lens.dtype == torch.int32
    rows, kv_lens = folded.page_table.tolist(), folded.kv_lens.tolist()
    for layer in range(LAYERS):
        assert len(rows[layer]) == len(kv_lens[layer]) == len(batch) * HEADS
        assert kv_lens[layer] == [kv_len for model in batch.values() for kv_len in model.kv_lens[layer]]
        expected = [pages for model in batch.values() for pages in model.pages[layer]]
        for row, pages, kv_len in zip(rows[layer], expected, kv_lens[layer], strict=True):
            assert len(row) * block_size >= kv_len
            assert row == (pages + [0] * len(row))[: len(row)]  # blocks of rejected drafts may lie behind the last one


def decode(table: PageTable, cache: PagedCache, batch: dict[str, RequestModel], rng: random.Random) -> FoldedBatch:
    for model in batch.values():
        model.generate(cache, rng)
    folded = fold(table, batch, [1] * len(batch))
    check(folded, batch, cache.pool.block_size)
    return folded


EVENTS = ["add", "remove", "preempt", "decode", "decode", "decode some"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    block_size=st.sampled_from([2, 16, 32, 64]),
    layout=st.sampled_from(LAYOUTS),
    most_pages=st.sampled_from([2, 10, FIRST_CAPACITY + 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_follows_the_model(block_size, layout, most_pages, seed):
    rng = random.Random(seed)
    cache = make_pool(LAYERS, HEADS, BLOCKS, block_size, 1, layout=layout)
    table, models, named = PageTable(cache.pool, MAX_NUM_REQS), {}, 0
    for event in ["add", *rng.choices(EVENTS, k=25)]:
        if event == "add" and len(models) < MAX_NUM_REQS:
            named += 1
            compaction, plan, models[f"r{named}"] = evict(cache, rng, most_pages)
            table.add(f"r{named}", compaction, plan)
        elif event == "remove" and models:
            req_id = rng.choice(list(models))
            del models[req_id]
            table.remove(req_id)
        elif event == "preempt" and models:
            req_id = rng.choice(list(models))
            table.remove(req_id)
            compaction, plan, models[req_id] = evict(cache, rng, most_pages, models[req_id].seq_len + 2 * block_size)
            table.add(req_id, compaction, plan)
        elif event.startswith("decode") and models:
            req_ids = list(models) if event == "decode" else rng.sample(list(models), rng.randint(1, len(models)))
            for _ in range(rng.randint(1, 2 * block_size)):
                decode(table, cache, {req_id: models[req_id] for req_id in req_ids}, rng)
    assert len(table) == len(models)
    assert all(req_id in table for req_id in models)
    slots = table.slots.of(list(models)).to(torch.int64)
    assert table.constant_rows(slots).tolist() == [not model.grows for model in models.values()]
    for (req_id, model), slot in zip(models.items(), slots, strict=True):
        assert table.pages_of(req_id, model.seq_len) == model.pages
        if not model.grows:
            most = max(len(row) for rows in model.pages for row in rows)
            assert table.most_pages(slot[None]) == most
            for layer in range(LAYERS):
                pages, num_pages = table.layer_rows(layer, slot[None], most)
                assert num_pages[0].tolist() == [len(row) for row in model.pages[layer]]
                assert pages[0].tolist() == [row + [0] * (most - len(row)) for row in model.pages[layer]]


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("tail", [0, 1, 15])
def test_every_step_over_several_block_boundaries(block_size, tail, rng):
    cache = make_pool(LAYERS, HEADS, BLOCKS, block_size, 1)
    table = PageTable(cache.pool, 1)
    compaction, plan, model = evict(cache, rng, 5, 7 * block_size + tail)
    table.add("a", compaction, plan)
    for _ in range(3 * block_size + 1):
        decode(table, cache, {"a": model}, rng)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(block_size=st.sampled_from([2, 16, 32]), most_drafts=st.sampled_from([1, 5, 70]), seed=st.integers(0, 2**32 - 1))
def test_drafts_may_span_blocks_and_be_rejected(block_size, most_drafts, seed):
    rng = random.Random(seed)
    cache = make_pool(LAYERS, HEADS, BLOCKS, block_size, 1)
    table, models = PageTable(cache.pool, 3), {}
    for req_id in "abc":
        compaction, plan, models[req_id] = evict(cache, rng, 5)
        table.add(req_id, compaction, plan)
    for _ in range(12):
        query_lens = [1 + rng.randint(0, most_drafts) for _ in models]
        for model, query_len in zip(models.values(), query_lens, strict=True):
            for _ in range(query_len):
                model.generate(cache, rng)
        check(fold(table, models, query_lens), models, block_size)
        for model, query_len in zip(models.values(), query_lens, strict=True):
            model.grow(-rng.randint(0, query_len - 1))


def test_a_row_outgrows_the_table_by_decoding(rng):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 2, 1)
    table = PageTable(cache.pool, 2)
    models = {}
    for req_id in ("a", "b"):
        compaction, plan, models[req_id] = evict(cache, rng, 6, 17)
        table.add(req_id, compaction, plan)
    first = decode(table, cache, models, rng).page_table.shape[-1]
    for _ in range(2 * 2 * FIRST_CAPACITY + 8):
        folded = decode(table, cache, models, rng)
    assert first < FIRST_CAPACITY
    assert folded.page_table.shape[-1] > 2 * FIRST_CAPACITY


def test_a_compaction_wider_than_the_table(rng):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = PageTable(cache.pool, 2)
    models = {}
    for req_id, most_pages in (("small", 4), ("wide", 5 * FIRST_CAPACITY)):
        compaction, plan, models[req_id] = evict(cache, rng, most_pages)
        table.add(req_id, compaction, plan)
        decode(table, cache, models, rng)


def test_a_reused_slot_shows_nothing_of_its_last_owner(rng):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = PageTable(cache.pool, 1)
    for most_pages in (40, 2, 20):
        compaction, plan, model = evict(cache, rng, most_pages)
        table.add("a", compaction, plan)
        decode(table, cache, {"a": model}, rng)
        table.remove("a")


def test_order_of_a_batch_may_change(rng):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = PageTable(cache.pool, 3)
    models = {}
    for req_id in "abc":
        compaction, plan, models[req_id] = evict(cache, rng, 5)
        table.add(req_id, compaction, plan)
    for order in ("abc", "cab", "ab", "ba", "b", "cba"):
        decode(table, cache, {req_id: models[req_id] for req_id in order}, rng)


@pytest.mark.parametrize("block_size", [2, 16])
def test_a_step_leaves_the_batches_of_earlier_steps_alone(block_size, rng):
    """The engine may still read the last step's batch while it prepares the next one."""
    cache = make_pool(LAYERS, HEADS, BLOCKS, block_size, 1)
    table = PageTable(cache.pool, 1)
    compaction, plan, model = evict(cache, rng, 5)
    table.add("a", compaction, plan)
    earlier = decode(table, cache, {"a": model}, rng)
    pages, kv_lens = earlier.page_table.clone(), earlier.kv_lens.clone()
    for _ in range(5):
        decode(table, cache, {"a": model}, rng)
    assert earlier.page_table.equal(pages)
    assert earlier.kv_lens.equal(kv_lens)


def test_membership(rng):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = PageTable(cache.pool, 2)
    compaction, plan, _ = evict(cache, rng, 5)
    assert len(table) == 0
    assert "a" not in table
    for req_id in "ab":
        table.add(req_id, compaction, plan)
    assert len(table) == 2
    table.remove("a")
    table.remove("a")
    table.remove("never there")
    assert len(table) == 1
    assert "a" not in table
    assert "b" in table
    with pytest.raises(ValueError, match="req_id: 'b' has a slot already"):
        table.add("b", compaction, plan)


def test_pages_of_counts_the_blocks_of_the_answer(rng):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = PageTable(cache.pool, 1)
    compaction, plan, model = evict(cache, rng, 5, 16 * 7)
    table.add("a", compaction, plan)
    prompt_pages = [[list(row) for row in rows] for rows in model.pages]
    assert table.pages_of("a", 16 * 7) == prompt_pages
    decode(table, cache, {"a": model}, rng)
    assert table.pages_of("a", 16 * 7) == prompt_pages
    assert table.pages_of("a", 16 * 7 + 1) == model.pages


@pytest.mark.parametrize("num_tokens", [16 * 7, 16 * 7 + 5])
def test_rows_that_shrink_whenever_a_block_is_full(rng, num_tokens):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = PageTable(cache.pool, 2)
    compaction, plan, model = evict(cache, rng, 5, num_tokens)
    table.add("a", compaction, plan)
    num_full = table.num_full_pages("a").tolist()
    for _ in range(50):
        decode(table, cache, {"a": model}, rng)
        if model.seq_len % 16 == 0:
            table.shrink("a", model.seq_len)
            model.pages = [[row[:-1] for row in rows] for rows in model.pages]
            model.kv_lens = [[kv_len - 16 for kv_len in row] for row in model.kv_lens]
        assert table.pages_of("a", model.seq_len) == model.pages
    assert table.num_full_pages("a").tolist() == num_full
    longest = max(len(row) for rows in model.pages for row in rows)
    pages, num_pages = table.rows("a", model.seq_len)
    assert pages.shape == (LAYERS, HEADS, longest)
    assert num_pages.tolist() == [[len(row) for row in rows] for rows in model.pages]


@pytest.mark.parametrize("num_tokens", [16 * 7, 16 * 7 + 5])
@pytest.mark.parametrize("chunk", [3, 16, 40])
def test_rows_that_shrink_behind_every_chunk_keep_the_page_that_is_not_full(rng, num_tokens, chunk):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = PageTable(cache.pool, 1)
    compaction, plan, model = evict(cache, rng, 5, num_tokens)
    table.add("a", compaction, plan)
    num_full = table.num_full_pages("a").tolist()
    for _ in range(10):
        for _ in range(chunk):
            model.generate(cache, rng)
        folded = fold(table, {"a": model}, [chunk])
        check(folded, {"a": model}, 16)
        table.shrink("a", model.seq_len)
        tail = model.seq_len % 16
        for layer, rows in enumerate(model.pages):
            for head, row in enumerate(rows):
                rows[head] = row[: num_full[layer][head]] + row[-1:] * (tail > 0)
                model.kv_lens[layer][head] = num_full[layer][head] * 16 + tail
        assert table.pages_of("a", model.seq_len) == model.pages
        assert table.num_full_pages("a").tolist() == num_full
