"""The page table against a model in plain Python, for requests that come, grow by some tokens per step, and go."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paged import LAYOUTS, PagedCache, make_pool, pages_of
from vllm_kvevict.cache import page_table
from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.page_table import PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.kernels.expand_page_table import BatchRows

LAYERS, HEADS, BLOCKS = 2, 3, 1500
MAX_NUM_REQS = 4
MAX_TOKENS = 64 * 300


class Blocks:
    """Blocks in no order, of which nobody has one that another one has. The null block is nobody's."""

    def __init__(self, rng: random.Random) -> None:
        self.free = rng.sample(range(1, BLOCKS), BLOCKS - 1)

    def take(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count
        return taken


@dataclass
class RequestModel:
    """What a reader of the documentation expects of one evicted request.

    pages:   [num_layers][num_kv_heads] page ids
    kv_lens: [num_layers][num_kv_heads] tokens held
    blocks:  vLLM's block table; freed blocks are the null block
    kept:    blocks of which its full pages are
    grows:   whether new tokens are added behind the others
    """

    seq_len: int
    pages: list[list[list[int]]]
    kv_lens: list[list[int]]
    blocks: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    grows: bool = True

    def generate(self, cache: PagedCache, blocks: Blocks) -> None:
        """Take a token, and a new block for it if all blocks are full."""
        if self.seq_len == len(self.blocks) * cache.pool.block_size:
            self.blocks += blocks.take(1)
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
    cache: PagedCache, rng: random.Random, blocks: Blocks, most_pages: int, num_tokens: int | None = None
) -> tuple[Compaction, EvictionPlan, torch.Tensor, RequestModel]:
    """Make up a compaction with random ragged pages, and the model of its request. Return also its kept blocks."""
    block_size = cache.pool.block_size
    num_full = [[rng.randrange(most_pages) for _ in range(HEADS)] for _ in range(LAYERS)]
    num_tokens = num_tokens or rng.randrange(most_pages * block_size, (most_pages + 2) * block_size)
    grows = rng.random() < 0.7
    num_kept = -(-sum(map(sum, num_full)) // (LAYERS * HEADS)) + (num_tokens % block_size > 0)
    plan = EvictionPlan(num_tokens, num_kept, block_size, not grows)
    has_tail = plan.num_tail_tokens > 0
    kept = blocks.take(plan.num_full_blocks)
    table = [0] * (num_tokens // block_size) + blocks.take(int(num_tokens % block_size > 0))
    last_page = [[cache.page_id(layer, table[-1], head) for head in range(HEADS)] for layer in range(LAYERS)]
    free = rng.sample([page for block in kept for page in pages_in(cache, block)], LAYERS * HEADS * len(kept))
    pages = [
        [
            [free.pop() for _ in range(num_full[layer][head])] + [last_page[layer][head]] * has_tail
            for head in range(HEADS)
        ]
        for layer in range(LAYERS)
    ]
    lists = torch.zeros(LAYERS, HEADS, max(len(row) for rows in pages for row in rows) + 1, dtype=torch.int64)
    for layer, rows in enumerate(pages):
        for head, row in enumerate(rows):
            lists[layer, head, : len(row)] = torch.tensor(row, dtype=torch.int64)
    lists = lists[..., : max(max(map(max, num_full)), 1) + has_tail]
    kv_lens = torch.tensor(num_full) * block_size + plan.num_tail_tokens
    compaction = Compaction(lists, torch.tensor(num_full) + has_tail)
    model = RequestModel(num_tokens, pages, kv_lens.tolist(), table, kept, grows)
    return compaction, plan, torch.tensor(kept, dtype=torch.int64), model


def pages_in(cache: PagedCache, block: int) -> list[int]:
    return [cache.page_id(layer, block, head) for layer in range(LAYERS) for head in range(HEADS)]


def expanded(table: PageTable, batch: dict[str, RequestModel]) -> list[tuple[list[list[int]], list[int]]]:
    """Return the page table and lengths of each layer in a step of these requests: whole rows stand between them, and
    rows of other lengths are padded with garbage.
    """
    width = max(len(model.blocks) for model in batch.values()) + 2
    block_table = torch.full((2 * len(batch), width), -(2**31), dtype=torch.int32)
    for row, model in enumerate(batch.values()):
        block_table[2 * row + 1, : len(model.blocks)] = torch.tensor(model.blocks)
    slots = torch.from_numpy(table.slots.of(list(batch)))
    seq_lens = torch.tensor([length for model in batch.values() for length in (9, model.seq_len)], dtype=torch.int32)
    rows = BatchRows(torch.arange(1, len(seq_lens), 2, dtype=torch.int32), slots, seq_lens, block_table)
    lens = np.array([model.seq_len for model in batch.values()])
    max_kv_len = table.most_tokens(table.slots.of(list(batch)), lens)
    (pages,) = table.expand([(rows, max_kv_len)])
    return [tuple(part.tolist() for part in pages.of(layer)) for layer in range(LAYERS)]


def check(table: PageTable, batch: dict[str, RequestModel], block_size: int) -> None:
    """Every row holds its pages in order, its length counts the new tokens, and the host knows the longest."""
    longest = 0
    for layer, (rows, kv_lens) in enumerate(expanded(table, batch)):
        assert len(rows) == len(kv_lens) == len(batch) * HEADS
        # a row without a token, as made up here, stands on the null page
        expected_lens = [max(kv_len, 1) for model in batch.values() for kv_len in model.kv_lens[layer]]
        assert kv_lens == expected_lens
        expected = [pages for model in batch.values() for pages in model.pages[layer]]
        for row, pages, kv_len in zip(rows, expected, kv_lens, strict=True):
            used = -(-kv_len // block_size)
            assert row[:used] == (pages or [0])[:used]  # blocks of rejected drafts may lie behind the last one
        longest = max(longest, *kv_lens)
    lens = np.array([model.seq_len for model in batch.values()])
    assert max(table.most_tokens(table.slots.of(list(batch)), lens), 1) >= longest


def decode(table: PageTable, cache: PagedCache, batch: dict[str, RequestModel], blocks: Blocks) -> None:
    for model in batch.values():
        model.generate(cache, blocks)
    check(table, batch, cache.pool.block_size)


def new_table(cache: PagedCache, max_num_reqs: int = MAX_NUM_REQS) -> PageTable:
    return PageTable(cache.pool, max_num_reqs, MAX_TOKENS)


EVENTS = ["add", "remove", "preempt", "decode", "decode", "decode some"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    block_size=st.sampled_from([2, 16, 32, 64]),
    layout=st.sampled_from(LAYOUTS),
    most_pages=st.sampled_from([2, 10, 84]),
    seed=st.integers(0, 2**32 - 1),
)
def test_follows_the_model(block_size, layout, most_pages, seed):
    rng = random.Random(seed)
    blocks = Blocks(rng)
    cache = make_pool(LAYERS, HEADS, BLOCKS, block_size, 1, layout=layout)
    table, models, named = new_table(cache), {}, 0
    for event in ["add", *rng.choices(EVENTS, k=25)]:
        if event == "add" and len(models) < MAX_NUM_REQS:
            named += 1
            compaction, plan, kept, models[f"r{named}"] = evict(cache, rng, blocks, most_pages)
            table.add(f"r{named}", compaction, plan, kept)
        elif event in ("remove", "preempt") and models:
            req_id = rng.choice(list(models))
            model = models.pop(req_id)
            table.remove(req_id)
            blocks.free += model.kept + [block for block in model.blocks if block]
            if event == "preempt":
                rng.shuffle(blocks.free)
                length = model.seq_len + 2 * block_size
                compaction, plan, kept, models[req_id] = evict(cache, rng, blocks, most_pages, length)
                table.add(req_id, compaction, plan, kept)
        elif event.startswith("decode") and models:
            req_ids = list(models) if event == "decode" else rng.sample(list(models), rng.randint(1, len(models)))
            for _ in range(rng.randint(1, 2 * block_size)):
                decode(table, cache, {req_id: models[req_id] for req_id in req_ids}, blocks)
    assert len(table) == len(models)
    assert all(req_id in table for req_id in models)
    for req_id, model in models.items():
        assert table.replaces(req_id) == (not model.grows)
        assert pages_of(table, req_id, model.seq_len, model.blocks) == model.pages
        if not model.grows:
            slots = torch.tensor([table.slots[req_id]])
            most = max(max(len(row) for rows in model.pages for row in rows), 1)
            assert table.most_pages([req_id]) == most
            for layer in range(LAYERS):
                pages, num_pages = table.layer_rows(layer, slots, most)
                assert num_pages[0].tolist() == [len(row) for row in model.pages[layer]]
                assert pages[0].tolist() == [row + [0] * (most - len(row)) for row in model.pages[layer]]


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.fixture
def blocks(rng) -> Blocks:
    return Blocks(rng)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("tail", [0, 1, 15])
def test_every_step_over_several_block_boundaries(block_size, tail, rng, blocks):
    cache = make_pool(LAYERS, HEADS, BLOCKS, block_size, 1)
    table = new_table(cache, 1)
    compaction, plan, kept, model = evict(cache, rng, blocks, 5, 7 * block_size + tail)
    table.add("a", compaction, plan, kept)
    for _ in range(3 * block_size + 1):
        decode(table, cache, {"a": model}, blocks)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(block_size=st.sampled_from([2, 16, 32]), most_drafts=st.sampled_from([1, 5, 70]), seed=st.integers(0, 2**32 - 1))
def test_drafts_may_span_blocks_and_be_rejected(block_size, most_drafts, seed):
    rng = random.Random(seed)
    blocks = Blocks(rng)
    cache = make_pool(LAYERS, HEADS, BLOCKS, block_size, 1)
    table, models = new_table(cache, 3), {}
    for req_id in "abc":
        compaction, plan, kept, models[req_id] = evict(cache, rng, blocks, 5)
        table.add(req_id, compaction, plan, kept)
    for _ in range(12):
        query_lens = [1 + rng.randint(0, most_drafts) for _ in models]
        for model, query_len in zip(models.values(), query_lens, strict=True):
            for _ in range(query_len):
                model.generate(cache, blocks)
        check(table, models, block_size)
        for model, query_len in zip(models.values(), query_lens, strict=True):
            model.grow(-rng.randint(0, query_len - 1))


def test_memory_is_taken_once_and_is_what_it_says(rng, blocks):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = PageTable(cache.pool, 8, 1000)
    held = {name: tensor.data_ptr() for name, tensor in table._lists._asdict().items()}
    arena, lists = BLOCKS * LAYERS * HEADS, 8 * (63 + 2 * LAYERS * HEADS + 1)
    assert table.num_bytes == 4 * (arena + lists + 2**20 + 8 * LAYERS * HEADS)
    # the page table of a layer, as wide as the longest request, if that takes more than there is in any case
    longest = PageTable(cache.pool, 8, 16 * 50_000).num_bytes
    assert longest == 4 * (arena + lists + 8 * (50_000 - 63) + 8 * HEADS * 50_016 + 8 * LAYERS * HEADS)
    compaction, plan, kept, model = evict(cache, rng, blocks, 40)
    table.add("a", compaction, plan, kept)
    decode(table, cache, {"a": model}, blocks)
    assert held == {name: tensor.data_ptr() for name, tensor in table._lists._asdict().items()}


@pytest.mark.parametrize("room", [2**20, 100])
def test_several_launches_of_a_step_share_memory(rng, blocks, monkeypatch, room):
    """All layers at once where there is room, else one after the other."""
    monkeypatch.setattr(page_table, "_MIN_ENTRIES", room)
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table, models = PageTable(cache.pool, 3, 16 * 20), {}
    for req_id in "abc":
        compaction, plan, kept, models[req_id] = evict(cache, rng, blocks, 9)
        table.add(req_id, compaction, plan, kept)
    parts = [["b"], ["c", "a"]]
    launches = []
    for names in parts:
        slots = torch.from_numpy(table.slots.of(names).copy())
        seq_lens = torch.tensor([models[name].seq_len for name in names], dtype=torch.int32)
        width = max(len(models[name].blocks) for name in names)
        table_of = [models[name].blocks + [0] * (width - len(models[name].blocks)) for name in names]
        rows = BatchRows(torch.arange(len(names)).int(), slots, seq_lens, torch.tensor(table_of).int())
        launches.append((rows, table.most_tokens(slots.numpy(), seq_lens.numpy())))
    expanded = table.expand(launches)
    for layer in range(LAYERS):
        for names, pages in zip(parts, expanded, strict=True):
            found, lens = pages.of(layer)
            rows = [row for name in names for row in models[name].pages[layer]]
            assert lens.tolist() == [max(n, 1) for name in names for n in models[name].kv_lens[layer]]
            assert [row[: len(want)] for row, want in zip(found.tolist(), rows, strict=True)] == rows


def test_a_reused_slot_shows_nothing_of_its_last_owner(rng, blocks):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = new_table(cache, 1)
    for most_pages in (40, 2, 20):
        compaction, plan, kept, model = evict(cache, rng, blocks, most_pages)
        table.add("a", compaction, plan, kept)
        decode(table, cache, {"a": model}, blocks)
        table.remove("a")


def test_order_of_a_batch_may_change(rng, blocks):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = new_table(cache, 3)
    models = {}
    for req_id in "abc":
        compaction, plan, kept, models[req_id] = evict(cache, rng, blocks, 5)
        table.add(req_id, compaction, plan, kept)
    for order in ("abc", "cab", "ab", "ba", "b", "cba"):
        decode(table, cache, {req_id: models[req_id] for req_id in order}, blocks)


def test_membership(rng, blocks):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = new_table(cache, 2)
    compaction, plan, kept, _ = evict(cache, rng, blocks, 5)
    assert len(table) == 0
    assert "a" not in table
    for req_id in "ab":
        table.add(req_id, compaction, plan, kept)
    assert len(table) == 2
    table.remove("a")
    table.remove("a")
    table.remove("never there")
    assert len(table) == 1
    assert "a" not in table
    assert "b" in table
    with pytest.raises(ValueError, match="req_id: 'b' has a slot already"):
        table.add("b", compaction, plan, kept)


def test_rows_count_the_blocks_of_the_answer(rng, blocks):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = new_table(cache, 1)
    compaction, plan, kept, model = evict(cache, rng, blocks, 5, 16 * 7)
    table.add("a", compaction, plan, kept)
    prompt_pages = [[list(row) for row in rows] for rows in model.pages]
    assert pages_of(table, "a", 16 * 7, model.blocks) == prompt_pages
    decode(table, cache, {"a": model}, blocks)
    assert pages_of(table, "a", 16 * 7, model.blocks) == prompt_pages
    assert pages_of(table, "a", 16 * 7 + 1, model.blocks) == model.pages


@pytest.mark.parametrize("alike", [True, False])
def test_layers_that_hold_equally_many_tokens_are_alike(rng, blocks, alike):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = new_table(cache, 2)
    for req_id in "ab":
        compaction, plan, kept, _ = evict(cache, rng, blocks, 5, 16 * 7)
        if alike or req_id == "a":
            compaction.num_pages[:] = compaction.num_pages[0].clone()
        else:
            compaction.num_pages[1, 0] = compaction.num_pages[0, 0] + 1
        table.add(req_id, compaction, plan, kept)
    assert table.are_alike(table.slots.of(["a", "b"])) == alike
    assert table.are_alike(table.slots.of(["a"]))


@pytest.mark.parametrize("num_tokens", [16 * 7, 16 * 7 + 5])
def test_rows_that_shrink_whenever_a_block_is_full(rng, blocks, num_tokens):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = new_table(cache, 2)
    compaction, plan, kept, model = evict(cache, rng, blocks, 5, num_tokens)
    table.add("a", compaction, plan, kept)
    num_full = table.num_full_pages("a").tolist()
    for _ in range(50):
        decode(table, cache, {"a": model}, blocks)
        if model.seq_len % 16 == 0:
            table.shrink("a", model.seq_len)
            model.pages = [[row[:-1] for row in rows] for rows in model.pages]
            model.kv_lens = [[kv_len - 16 for kv_len in row] for row in model.kv_lens]
        assert pages_of(table, "a", model.seq_len, model.blocks) == model.pages
    assert table.num_full_pages("a").tolist() == num_full
    longest = max(len(row) for rows in model.pages for row in rows)
    pages, num_pages = table.rows("a", model.seq_len, torch.tensor(model.blocks))
    assert pages.shape == (LAYERS, HEADS, longest)
    assert num_pages.tolist() == [[len(row) for row in rows] for rows in model.pages]


@pytest.mark.parametrize("num_tokens", [16 * 7, 16 * 7 + 5])
@pytest.mark.parametrize("chunk", [3, 16, 40])
def test_rows_that_shrink_behind_every_chunk_keep_the_page_that_is_not_full(rng, blocks, num_tokens, chunk):
    cache = make_pool(LAYERS, HEADS, BLOCKS, 16, 1)
    table = new_table(cache, 1)
    compaction, plan, kept, model = evict(cache, rng, blocks, 5, num_tokens)
    table.add("a", compaction, plan, kept)
    num_full = table.num_full_pages("a").tolist()
    for _ in range(10):
        for _ in range(chunk):
            model.generate(cache, blocks)
        check(table, {"a": model}, 16)
        table.shrink("a", model.seq_len)
        tail = model.seq_len % 16
        for layer, rows in enumerate(model.pages):
            for head, row in enumerate(rows):
                rows[head] = row[: num_full[layer][head]] + row[-1:] * (tail > 0)
                model.kv_lens[layer][head] = num_full[layer][head] * 16 + tail
        assert pages_of(table, "a", model.seq_len, model.blocks) == model.pages
        assert table.num_full_pages("a").tolist() == num_full


MODELS = {  # layers, KV heads of a worker, bytes of its KV cache
    "8B": (32, 8, 58 << 30),
    "70B at TP 8": (80, 1, 110 << 30),
}
LENGTHS = [("8B", 32, 256), ("8B", 128, 256), ("8B", 1024, 64)]
LENGTHS += [("70B at TP 8", 32, 1024), ("70B at TP 8", 128, 1024), ("70B at TP 8", 1024, 64)]


@pytest.mark.parametrize(("model", "thousands", "max_num_reqs"), LENGTHS)
def test_tables_of_large_models_take_little_beside_the_cache(model, thousands, max_num_reqs):
    """Computed by what allocates them, on a device without memory. A page of 16 tokens of 128 bfloat16 has 8 KiB."""
    layers, heads, num_bytes = MODELS[model]
    pages = torch.empty(num_bytes >> 13, 1, dtype=torch.bfloat16, device="meta")
    kv = pages[:, :, None].expand(-1, 16, 128)
    offsets = torch.arange(layers, device="meta")
    table = PageTable(PagePool(pages, kv, kv, offsets, layers * heads, heads), max_num_reqs, thousands * 1024)
    arena = table._lists.arena.nbytes
    assert arena <= num_bytes * 4 / 8192
    assert max(arena, table._pages.nbytes, table.num_bytes - arena - table._pages.nbytes) <= 256 << 20
