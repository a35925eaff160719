"""However little scratch there is, prompts and answers are evicted as in a single tile, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eviction import test_prompts, test_resident
from tests.eviction.test_prompts import ALLOCATOR_NAMES, LAYERS, Prompts, method_of, prompts
from tests.eviction.test_resident import answers
from tests.paged import PACKINGS
from vllm_kvevict.budgets.batch import WishBatch
from vllm_kvevict.budgets.joint import count_best_of_tiles, kth_highest
from vllm_kvevict.cache.marks import Marks, PackedMarks
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.eviction.grouping import chosen_together, scored_together
from vllm_kvevict.eviction.prompt import Evictions
from vllm_kvevict.kernels.select import count_best
from vllm_kvevict.policies import POLICIES, scratch
from vllm_kvevict.policies.base import Need

SIZES = st.sampled_from([1, 2**12, 2**14, 2**16])  # from a head a tile to a few of them


@contextmanager
def scratch_of(num_bytes: int) -> Iterator[None]:
    with patch.object(scratch, "_most_bytes", num_bytes), patch.object(scratch, "_num_held", 0):
        yield


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=SIZES,
    seed=st.integers(0, 2**20),
    num_reqs=st.sampled_from([1, 3]),
    policy=st.sampled_from(["snapkv", "tova", "keydiff", "obcache_joint"]),
    allocator=st.sampled_from(ALLOCATOR_NAMES),
    packing=st.sampled_from(PACKINGS),
    fresh=st.booleans(),
    per_token=st.booleans(),
)
def test_prompts_are_evicted_as_in_one_tile(size, seed, num_reqs, policy, allocator, packing, fresh, per_token):
    method = method_of(policy, allocator, per_token)
    tiled, whole = (prompts(method, num_reqs, seed, packing, fresh=fresh) for _ in range(2))
    with scratch_of(size):
        tiles, group, noted = evicted(tiled)
    in_one, expected, expected_notes = evicted(whole)
    assert len(group._compactions._tiles) > 1 or size == 2**16
    for tile, one in zip(tiles, in_one, strict=True):
        assert tile.page_table.equal(one.page_table) and tile.num_pages.equal(one.num_pages)
    for eviction, other in zip(group.members, expected.members, strict=True):
        assert not per_token or eviction.next_victims.equal(other.next_victims)
    assert tiled.cache.pool.pages.view(torch.int32).equal(whole.cache.pool.pages.view(torch.int32))
    assert noted.positions.equal(expected_notes.positions) and noted.sums.equal(expected_notes.sums)


def evicted(several: Prompts):
    group, noted = Evictions(several.evictions), Residents(several.cache.pool)
    several.score([group])
    group.choose()
    compactions = group.compact()
    generator = torch.Generator().manual_seed(1)
    lengths = [eviction.plan.num_tokens for eviction in group.members]
    group.note(noted, [list(torch.rand(LAYERS, 2, length, generator=generator)) for length in lengths])
    return compactions, group, noted


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=SIZES,
    seed=st.integers(0, 2**20),
    policy=st.sampled_from(["snapkv", "h2o", "tova", "keydiff", "laq_deferred"]),
    packing=st.sampled_from(PACKINGS),
    per_token=st.booleans(),
)
def test_answers_are_evicted_as_in_one_tile(size, seed, policy, packing, per_token):
    same_new = Need.ALL_QUERIES in POLICIES.get(policy)().needs
    tiled, whole = (answers(3, seed, packing, "LBHNC", same_new=same_new) for _ in range(2))
    per_token &= all(new % test_resident.BLOCK == 0 for new in whole.num_new)
    with scratch_of(size):
        in_tiles = tiled.evict(policy, per_token, [0, 1, 2])
    expected = whole.evict(policy, per_token, [0, 1, 2])
    assert len(in_tiles._order.tiles) > 1 or size == 2**16
    assert not per_token or in_tiles.next_victims.equal(expected.next_victims)
    assert tiled.cache.pool.pages.view(torch.int32).equal(whole.cache.pool.pages.view(torch.int32))
    assert tiled.residents.positions.equal(whole.residents.positions)
    assert tiled.residents.sums.equal(whole.residents.sums)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_packed_marks_are_the_marks(length):
    marks = torch.rand(2, 5, length, generator=torch.Generator().manual_seed(length)) < 0.5
    packed = PackedMarks((2, 5, length), marks.device)
    packed.put(0, marks[:, :2])
    packed.put(2, marks[:, 2:])
    for first, end in ((0, 5), (1, 3), (4, 5)):
        assert packed.rows(first, end).equal(marks[:, first:end])
        assert Marks(marks).rows(first, end).equal(marks[:, first:end])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), num_reqs=st.integers(1, 3))
def test_the_best_of_tiles_are_counted_as_those_of_all(seed, num_reqs):
    """Scores of all signs, infinite ones, both zeros, ties, and NaN, which ranks last."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_reqs, 4, 2, 30, generator=generator)
    coarse = torch.rand(scores.shape, generator=generator)
    scores = torch.where(coarse < 0.3, scores.round(), scores)
    for value, at_least in ((float("inf"), 0.95), (float("-inf"), 0.9), (-0.0, 0.85)):
        scores[(coarse >= at_least) & (coarse < at_least + 0.05)] = value
    scores[..., 25:] = float("nan")
    totals = torch.randint(1, 4 * 2 * 25 + 1, (num_reqs,), generator=generator)
    batch = WishBatch.of(scores, [25] * num_reqs, [0] * num_reqs, [0] * num_reqs, torch.empty(num_reqs, 4, 0))
    with scratch_of(1):
        tiles = batch.tiles(1).map(lambda of_layers: of_layers.flatten(1, 2))
    found = count_best_of_tiles(tiles, totals)
    expected = count_best(scores.flatten(1, 2), totals)
    assert len(tiles.bounds) == 4
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])
    ranked = scores[..., :25].flatten(1).sort(dim=1, descending=True).values
    assert kth_highest(tiles.map(lambda tile: tile.flatten(1)), totals).equal(
        ranked.gather(1, totals[:, None] - 1)[:, 0]
    )


def test_prompts_that_do_not_fit_together_are_scored_and_chosen_apart():
    method = method_of("snapkv", "uniform")
    longest = max(eviction.plan.num_tokens for eviction in prompts(method, 3, 7).evictions)
    together = scratch_of(2 * longest * test_prompts.KV_HEADS * 16)  # two of the longest
    with together:
        several = prompts(method, 3, 7)
        assert [names for names, _ in scored_together(several.by_name)] == [["0", "1"]]
    with scratch_of(1):
        several = prompts(method, 3, 7)
        several.score([eviction.alone for eviction in several.evictions])
        assert chosen_together(several.by_name) == [["0"], ["1"], ["2"]]
        assert all(eviction.is_scored_on_host for eviction in several.evictions)


def test_what_is_held_for_one_leaves_less_room_for_another_until_it_is_gone():
    method = method_of("snapkv", "uniform")
    longest = max(eviction.plan.num_tokens for eviction in prompts(method, 2, 7).evictions)
    with scratch_of(4 * LAYERS * test_prompts.KV_HEADS * longest):
        for _ in range(2):
            several = prompts(method, 2, 7)
            several.score([eviction.alone for eviction in several.evictions])
            assert [eviction.is_scored_on_host for eviction in several.evictions] == [False, True]
            del several
        assert scratch._num_held == 0
