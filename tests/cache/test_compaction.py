"""Hole filling: after the moves every head reads exactly its kept tokens, in the pages of the kept blocks."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compactions import PlannedCompaction, kv_lens_of, plan_compaction
from tests.paged import LAYOUTS, NULL_BLOCK, PACKINGS, PagedCache, make_pool, random_kv, scrambled_blocks
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.eviction.selection import select

HEAD_SIZE = 16
properties = settings(max_examples=120, deadline=None, derandomize=True)


@dataclass
class Case:
    """One request in a scrambled cache, what each of its heads keeps, and the compaction planned for it.

    fresh_block_ids: None if it is compacted in place
    """

    cache: PagedCache
    block_ids: torch.Tensor
    fresh_block_ids: torch.Tensor | None
    plan: EvictionPlan
    keys: torch.Tensor
    values: torch.Tensor
    num_full_pages: torch.Tensor
    kept: torch.Tensor
    compaction: PlannedCompaction

    @property
    def heads(self) -> list[tuple[int, int]]:
        return list(product(*map(range, self.num_full_pages.shape)))

    @property
    def kv_lens(self) -> torch.Tensor:
        return kv_lens_of(self.compaction, self.plan)

    @property
    def full_block_ids(self) -> list[int]:
        """The blocks whose pages are shared out."""
        if self.fresh_block_ids is not None:
            return self.fresh_block_ids.tolist()
        first = self.plan.first_kept_block
        return self.block_ids[first : first + self.plan.num_full_blocks].tolist()

    @property
    def kept_block_ids(self) -> list[int]:
        return self.full_block_ids + (self.block_ids[-1:].tolist() if self.plan.num_tail_tokens else [])

    def pages(self, layer: int, head: int) -> list[int]:
        """The row of the compacted table, up to its count."""
        count = int(self.compaction.num_pages[layer, head])
        return self.compaction.page_table[layer, head, :count].tolist()

    def own_pages(self, layer: int, head: int) -> list[int]:
        """Page of each block of the prompt, before the eviction."""
        return [self.cache.page_id(layer, block, head) for block in self.block_ids.tolist()]

    def own_slots(self, layer: int, head: int) -> set[int]:
        """Every slot of the pages of each block of the prompt."""
        block_size = self.plan.block_size
        return {page * block_size + lane for page in self.own_pages(layer, head) for lane in range(block_size)}

    def owner(self, slot: int) -> tuple[int, int]:
        """The head in whose page of a prompt's block a slot is."""
        return next(head for head in self.heads if slot // self.plan.block_size in self.own_pages(*head))

    def kept_slots(self, layer: int, head: int) -> set[int]:
        """Where the kept tokens of a head are before the eviction."""
        own, block_size = self.own_pages(layer, head), self.plan.block_size
        tokens = self.kept[layer, head].nonzero()[:, 0].tolist()
        return {own[token // block_size] * block_size + token % block_size for token in tokens}

    def live_slots(self, layer: int, head: int) -> set[int]:
        """Where the tokens of a head are after the eviction."""
        pages, block_size = self.pages(layer, head), self.plan.block_size
        kv_len = int(self.kv_lens[layer, head])
        return {pages[index // block_size] * block_size + index % block_size for index in range(kv_len)}

    def move(self) -> None:
        for source, destination in self.compaction.phases:
            self.cache.pool.move(source, destination)

    def read(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = torch.tensor(self.pages(layer, head), dtype=torch.int64)
        return self.cache.read(pages, int(self.kv_lens[layer, head]))


def ragged_pages(total: int, shape: tuple[int, int], maximum: int, skew: float, generator: torch.Generator):
    """Return [num_layers, num_kv_heads] page counts up to ``maximum`` that sum to ``total``, the more uneven the
    larger ``skew``."""
    pages = torch.zeros(shape[0] * shape[1], dtype=torch.int64)
    weights = torch.rand(pages.shape, generator=generator) ** skew + 1e-6
    for _ in range(total):
        pages[torch.multinomial(weights * (pages < maximum), 1, generator=generator)] += 1
    return pages.reshape(shape)


def make_case(
    block_size: int,
    shape: tuple[int, int],
    num_tokens: int,
    num_kept_blocks: int,
    packing: str = "transposed",
    layout: str = "LBHNC",
    skew: float = 3.0,
    seed: int = 0,
    fresh: bool = False,
    per_token: bool = False,
    heads_at_once: int = 1000,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    plan = EvictionPlan(num_tokens, num_kept_blocks, block_size, per_token)
    num_blocks = plan.num_blocks + fresh * plan.num_full_blocks
    cache = make_pool(*shape, num_blocks + 4, block_size, HEAD_SIZE, packing, layout)
    all_ids = scrambled_blocks(cache, num_blocks, generator)
    block_ids, fresh_ids = all_ids[: plan.num_blocks], all_ids[plan.num_blocks :] if fresh else None
    keys, values = random_kv(*shape, num_tokens, HEAD_SIZE, generator)
    cache.write(keys, values, block_ids)
    total = plan.num_full_blocks * shape[0] * shape[1]
    num_full_pages = ragged_pages(total, shape, num_tokens // block_size, skew, generator)
    scores = torch.rand(*shape, num_tokens, generator=generator)
    kept = select(scores, num_full_pages * block_size + plan.num_tail_tokens)
    compaction = plan_compaction(kept, num_full_pages, block_ids, plan, cache.pool, fresh_ids, heads_at_once)
    return Case(cache, block_ids, fresh_ids, plan, keys, values, num_full_pages, kept, compaction)


def random_case(block_size: int, packing: str, layout: str, seed: int, fresh: bool) -> Case:
    """Sizes come from the seed: drawn one by one, most examples would be the smallest possible."""
    rng = random.Random(seed)
    num_blocks = rng.randint(2, 7)
    num_tokens = (num_blocks - 1) * block_size + rng.choice([1, rng.randint(1, block_size), block_size])
    shape = (rng.randint(1, 3), rng.randint(1, 3))
    num_kept = rng.randint(1, num_blocks - 1)
    keeps_something = num_kept > (num_tokens % block_size > 0)  # without its tail
    return make_case(
        block_size,
        shape,
        num_tokens,
        num_kept,
        packing,
        layout,
        rng.choice([0.0, 1.0, 8.0]),
        seed,
        fresh,
        rng.random() >= 0.7 and keeps_something,
        rng.choice([1, 2, 1000]),
    )


def cases_where(**fixed: st.SearchStrategy) -> st.SearchStrategy:
    drawn = {
        "block_size": st.sampled_from([16, 32, 64]),
        "packing": st.sampled_from(PACKINGS),
        "layout": st.sampled_from(LAYOUTS),
        "seed": st.integers(0, 2**32 - 1),
        "fresh": st.booleans(),
    }
    return st.builds(random_case, **{**drawn, **fixed})


cases = cases_where()
cases_in_place = cases_where(fresh=st.just(False))


@properties
@given(cases)
def test_pages_are_conserved(case):
    """Every page of every kept block in exactly one row; no page of a freed block or of the null block."""
    held = Counter(page for head in case.heads for page in case.pages(*head))
    expected = {
        case.cache.page_id(layer, block, head) for (layer, head), block in product(case.heads, case.kept_block_ids)
    }
    assert set(held) == expected
    assert set(held.values()) == {1}
    assert not held.keys() & {case.cache.page_id(layer, NULL_BLOCK, head) for layer, head in case.heads}


@properties
@given(cases)
def test_counts_are_those_asked_for(case):
    has_tail = case.plan.num_tail_tokens > 0
    assert case.compaction.num_pages.equal(case.num_full_pages + has_tail)
    assert case.kv_lens.equal(case.num_full_pages * case.plan.block_size + case.plan.num_tail_tokens)
    assert case.kv_lens.equal(case.kept.sum(-1))
    assert case.compaction.page_table.dtype == torch.int32
    for layer, head in case.heads:
        unused = case.compaction.page_table[layer, head, int(case.compaction.num_pages[layer, head]) :]
        assert not unused.any()


@properties
@given(cases)
def test_a_head_keeps_the_latest_of_its_own_pages_first(case):
    for layer, head in case.heads:
        own = [case.cache.page_id(layer, block, head) for block in case.full_block_ids]
        num_own = min(int(case.num_full_pages[layer, head]), len(own))
        latest = own[len(own) - num_own :]
        assert set(case.pages(layer, head)[:num_own]) == set(latest)


@properties
@given(cases)
def test_a_head_reads_exactly_its_kept_tokens(case):
    case.move()
    for layer, head in case.heads:
        mask = case.kept[layer, head]
        before = torch.cat([case.keys[layer, head, mask], case.values[layer, head, mask]], dim=1)
        after = torch.cat(case.read(layer, head), dim=1)
        # bit for bit, in any order; a NaN equals nothing
        assert sorted(after.tolist()) == sorted(before.tolist())


@properties
@given(cases)
def test_the_tail_page_is_last_and_holds_the_tail(case):
    tail = case.plan.num_tail_tokens
    if tail == 0:
        return
    case.move()
    last_block = case.block_ids[-1].item()
    for layer, head in case.heads:
        last_page = case.cache.page_id(layer, last_block, head)
        assert case.pages(layer, head)[-1] == last_page
        live = {slot for slot in case.live_slots(layer, head) if slot // case.plan.block_size == last_page}
        assert live == {last_page * case.plan.block_size + lane for lane in range(tail)}
        in_tail = torch.arange(case.plan.num_tokens) >= case.plan.num_tokens - tail
        stayed = case.kept[layer, head] & in_tail
        lanes = stayed.nonzero()[:, 0] % case.plan.block_size
        keys, values = case.cache.read(torch.tensor([last_page]), tail)
        assert keys[lanes].equal(case.keys[layer, head, stayed])
        assert values[lanes].equal(case.values[layer, head, stayed])


@properties
@given(cases)
def test_moves_are_the_fewest_and_stay_with_their_head(case):
    """Sources: the kept tokens outside the pages that their head keeps. Destinations: what these leave to fill."""
    moves = [
        move
        for source, destination in case.compaction.phases
        for move in zip(source.tolist(), destination.tolist(), strict=True)
    ]
    assert len({source for source, _ in moves}) == len(moves)
    assert len({destination for _, destination in moves}) == len(moves)
    for head in case.heads:
        kept, live = case.kept_slots(*head), case.live_slots(*head)
        own = case.own_slots(*head)
        of_head = [(source, destination) for source, destination in moves if source in own]
        assert {source for source, _ in of_head} == kept - live
        assert {destination for _, destination in of_head} == live - kept


@properties
@given(cases)
def test_phases_may_run_in_any_order_inside(case):
    for source, destination in case.compaction.phases:
        assert source.dtype == destination.dtype == torch.int64
        assert source.numel() > 0
        assert not set(source.tolist()) & set(destination.tolist())
    for (_, written), (read, _) in zip(case.compaction.phases, case.compaction.phases[1:], strict=False):
        assert not set(written.tolist()) & set(read.tolist())  # each survivor moves once


@properties
@given(cases_in_place)
def test_heads_that_give_pages_away_come_first_and_write_into_their_own(case):
    giving, taking = set(), set()
    for layer, head in case.heads:
        gives = case.num_full_pages[layer, head] < case.plan.num_full_blocks
        (giving if gives else taking).update(case.own_slots(layer, head))
    sources = [set(source.tolist()) for source, _ in case.compaction.phases]
    assert all(source <= giving or source <= taking for source in sources)
    assert sources == sorted(sources, key=lambda source: source <= taking)
    for source, destination in case.compaction.phases:
        if set(source.tolist()) <= giving:
            moved = zip(source.tolist(), destination.tolist(), strict=True)
            assert all(case.owner(old) == case.owner(new) for old, new in moved)


@properties
@given(cases)
def test_only_kept_blocks_are_written(case):
    """The freed blocks keep their hashes, so another request may still read them; other blocks are not ours."""
    pages = case.cache.pool.pages
    before = pages.clone()
    kept_pages = [
        case.cache.page_id(layer, block, head) for (layer, head), block in product(case.heads, case.kept_block_ids)
    ]
    case.move()
    others = torch.ones(pages.shape[0], dtype=torch.bool)
    others[kept_pages] = False
    assert pages[others].view(torch.int32).equal(before[others].view(torch.int32))


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor | None = None):
    """Attention of one head. query [n, head_size], keys and values [kv_len, head_size], hidden [kv_len] bool."""
    logits = (query[:, None] * keys).sum(-1) * HEAD_SIZE**-0.5
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    return (logits.softmax(-1)[..., None] * values).sum(1)


@settings(properties, max_examples=50)
@given(cases)
def test_attention_equals_dense_attention_over_the_kept_tokens(case):
    """Sums of at most 384 terms of size 1 in another order: off by a few float32 roundings."""
    case.move()
    query = torch.randn(4, HEAD_SIZE, generator=torch.Generator().manual_seed(1))
    for layer, head in case.heads:
        if not case.kept[layer, head].any():
            continue
        compacted_keys, compacted_values = case.read(layer, head)
        evicted = ~case.kept[layer, head]
        dense = attend(query, case.keys[layer, head], case.values[layer, head], evicted)
        paged = attend(query, compacted_keys, compacted_values)
        torch.testing.assert_close(paged, dense, rtol=1e-5, atol=2e-6)


def test_equal_pages_and_kept_recent_tokens_move_nothing():
    case = make_case(16, (2, 2), 100, 3, skew=0.0)
    pages = torch.full((2, 2), case.plan.num_full_blocks)
    recent = torch.arange(100) >= 100 - case.plan.num_kept_tokens
    compaction = plan_compaction(recent.expand(2, 2, -1), pages, case.block_ids, case.plan, case.cache.pool)
    assert compaction.phases == []
    assert compaction.page_table.equal(case.cache.pool.page_ids(case.block_ids[-3:]))


def test_one_head_takes_everything():
    case = make_case(16, (1, 4), 100, 2)
    pages = torch.tensor([[0, 4, 0, 0]])
    kept = select(torch.rand(1, 4, 100), pages * 16 + 4)
    compaction = plan_compaction(kept, pages, case.block_ids, case.plan, case.cache.pool)
    assert compaction.num_pages.tolist() == [[1, 5, 1, 1]]
    full = [case.cache.page_id(0, int(case.block_ids[-2]), head) for head in range(4)]
    assert sorted(compaction.page_table[0, 1, :4].tolist()) == sorted(full)


def test_nothing_but_the_tail_is_kept():
    case = make_case(16, (2, 1), 35, 1)
    assert case.plan.num_full_blocks == 0
    assert case.compaction.num_pages.tolist() == [[1], [1]]
    assert case.kv_lens.tolist() == [[3], [3]]


def test_pages_that_do_not_add_up_are_refused():
    case = make_case(16, (2, 2), 100, 3)
    with pytest.raises(ValueError, match="num_full_pages: expected a sum of 8 pages, got 9"):
        plan_compaction(case.kept, torch.tensor([[2, 2], [2, 3]]), case.block_ids, case.plan, case.cache.pool)
