"""Requests that are evicted again together: each as if it were alone, and all with as few launches as one."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.implementations import hard_sinks
from tests.launches import counted
from tests.one_by_one import ONE_BY_ONE, THIRD_PARTY, OneByOne, policy_of
from tests.paged import LAYOUTS, PACKINGS, PagedCache, make_pool, scrambled_blocks
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.eviction import resident as module
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.resident import ResidentEvictions
from vllm_kvevict.kernels.tiled_tokens import tiled_offsets
from vllm_kvevict.policies import POLICIES
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import scores_batches
from vllm_kvevict.policies.criticalkv import CriticalKV
from vllm_kvevict.policies.inputs import LayerWeights

LAYERS, KV_HEADS, GROUP, HEAD_SIZE, BLOCK, SCALE = 3, 2, 2, 16, 16, 0.25
PROJECTIONS = torch.randn(LAYERS, 24, KV_HEADS * GROUP * HEAD_SIZE, generator=torch.Generator().manual_seed(0))
HEADS = list(product(range(LAYERS), range(KV_HEADS)))
BATCHED = [
    name for name in POLICIES.names() if scores_batches(POLICIES.get(name)()) and POLICIES.get(name)().supports_decode
]
POLICY_NAMES = [*BATCHED, *ONE_BY_ONE]
# of policies that do much, the one with chunks and the other with each query head of a layer
MOST_LAUNCHES = {"chunkkv": 230, "criticalkv": 300}


@dataclass
class Answers:
    """Several requests in one pool, with new tokens since their last evictions; whatever nobody owns is NaN."""

    cache: PagedCache
    residents: Residents
    num_tokens: list[int]
    num_new: list[int]
    page_table: torch.Tensor
    num_pages: torch.Tensor
    num_full_pages: torch.Tensor
    query: torch.Tensor
    has_sinks: bool = True

    def evict(self, policy_name: str, per_token: bool, reqs: list[int]) -> ResidentEvictions:
        eviction = self.begin(policy_name, per_token, reqs)
        self.score(eviction, reqs, range(LAYERS))
        eviction.compact()
        return eviction

    def begin(self, policy_name: str, per_token: bool, reqs: list[int]) -> ResidentEvictions:
        policy = policy_of(policy_name)
        method = Method(policy, Uniform(), policy.num_sink, policy.num_recent)
        return ResidentEvictions(
            method,
            [self.num_tokens[req] for req in reqs],
            [self.num_new[req] for req in reqs],
            self.cache.pool,
            self.residents,
            self.page_table[reqs],
            self.num_pages[reqs],
            self.num_full_pages[reqs],
            per_token,
        )

    def score(self, eviction: ResidentEvictions, reqs: list[int], layers: range) -> None:
        num_new = min(eviction.num_new) if Need.ALL_QUERIES in eviction.method.policy.needs else 0
        query = self.query[reqs][:, layers]
        chunk = query[:, :, query.shape[2] - num_new :]
        weights = [
            LayerWeights(None, projection, softcap=2.0, sinks=hard_sinks(KV_HEADS * GROUP) - layer)
            for layer, projection in enumerate(PROJECTIONS)
        ]
        weights[2] = replace(weights[2], key_scale=0.5)  # as an fp8 cache may have it
        if not self.has_sinks:
            weights = [replace(of_layer, sinks=None) for of_layer in weights]
        eviction.score_layers(layers, query, chunk, [SCALE] * len(layers), weights[layers.start : layers.stop])


def answers(num_reqs: int, seed: int, packing: str, layout: str, ragged: bool = True, same_new: bool = True) -> Answers:
    """The same seed draws the same requests; those of smaller numbers are the first ones of larger ones."""
    sizes, generators = random.Random(seed), [torch.Generator().manual_seed(seed + req) for req in range(num_reqs)]
    most_blocks, num_blocks = 8, 12 * num_reqs + 4
    cache = make_pool(LAYERS, KV_HEADS, num_blocks, BLOCK, HEAD_SIZE, packing, layout)
    block_ids = scrambled_blocks(cache, num_blocks - 4, torch.Generator().manual_seed(seed)).view(num_reqs, 12)
    residents = Residents(cache.pool)
    shape = num_reqs, LAYERS, KV_HEADS
    table = torch.zeros(*shape, 4 * most_blocks, dtype=torch.int64)
    num_pages, num_full = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    query, num_tokens, all_new = torch.zeros(num_reqs, LAYERS, 32, KV_HEADS * GROUP, HEAD_SIZE), [], []
    new_of_all = sizes.choice([BLOCK, 2 * BLOCK, 21])
    for req, generator in enumerate(generators):
        num_kept = sizes.randint(3, most_blocks)
        num_new = new_of_all if same_new else sizes.choice([BLOCK, 7, 2 * BLOCK, 21])
        old_tail = (-num_new) % BLOCK if sizes.random() < 0.5 or num_new % BLOCK else sizes.randint(0, BLOCK - 1)
        total = 40 * BLOCK + old_tail + num_new
        own = cache.pool.page_ids(block_ids[req])
        shares = [num_kept] * len(HEADS)
        for _ in range(2 * len(HEADS) if ragged else 0):
            giver, taker = sizes.sample(range(len(HEADS)), 2)
            if shares[giver] > 3:
                shares[giver], shares[taker] = shares[giver] - 1, shares[taker] + 1
        pages = iter(own[..., :num_kept].flatten().tolist())
        for (layer, head), share in zip(HEADS, shares, strict=True):
            behind = -(-(old_tail + num_new) // BLOCK)
            row = [next(pages) for _ in range(share)] + own[layer, head, num_kept : num_kept + behind].tolist()
            table[req, layer, head, : len(row)] = torch.tensor(row)
            num_pages[req, layer, head], num_full[req, layer, head] = len(row), share
            held = share * BLOCK + old_tail + num_new
            slots = (torch.tensor(row)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:held]
            places = torch.randperm(40 * BLOCK - 64, generator=generator)[: share * BLOCK]
            residents.positions[slots[: share * BLOCK]] = places.int()
            known = slots[share * BLOCK : share * BLOCK + old_tail]
            residents.positions[known] = torch.arange(total - num_new - old_tail, total - num_new).int()
            residents.sums[slots[: held - num_new]] = torch.rand(held - num_new, generator=generator)
            kv = torch.randn(2, held, HEAD_SIZE, generator=generator)
            _write(cache, slots, *kv)
        num_tokens.append(total)
        all_new.append(num_new)
        query[req] = torch.randn(query.shape[1:], generator=generator)
    width = int(num_pages.max())
    return Answers(cache, residents, num_tokens, all_new, table[..., :width], num_pages, num_full, query)


def _write(cache: PagedCache, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    pool = cache.pool
    if pool.is_tiled:
        for (part, tokens), offsets in zip(
            ((pool.keys, keys), (pool.values, values)), tiled_offsets(BLOCK, HEAD_SIZE), strict=True
        ):
            part.flatten(1)[(slots // BLOCK)[:, None], offsets[slots % BLOCK]] = tokens
    else:
        pool.keys[slots // BLOCK, slots % BLOCK], pool.values[slots // BLOCK, slots % BLOCK] = keys, values


@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    packing=st.sampled_from(PACKINGS),
    layout=st.sampled_from(LAYOUTS),
    per_token=st.booleans(),
    ragged=st.booleans(),
)
def test_each_keeps_and_moves_what_it_would_alone(policy, seed, packing, layout, per_token, ragged):
    same_new = Need.ALL_QUERIES in policy_of(policy).needs
    per_token &= all(new % BLOCK == 0 for new in answers(3, seed, packing, layout, ragged, same_new).num_new)
    together, alone = (answers(3, seed, packing, layout, ragged, same_new) for _ in range(2))
    batch = together.evict(policy, per_token, [0, 1, 2])
    singles = [alone.evict(policy, per_token, [req]) for req in range(3)]
    assert together.cache.pool.pages.view(torch.int32).equal(alone.cache.pool.pages.view(torch.int32))
    assert together.residents.positions.equal(alone.residents.positions)
    assert together.residents.sums.equal(alone.residents.sums)
    if per_token:
        assert batch.next_victims.equal(torch.cat([single.next_victims for single in singles]))


# draws of "random" are those of a head's number, which differs among fewer heads
@pytest.mark.parametrize("policy", [name for name in BATCHED if name != "random"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_what_is_scored_together_is_what_a_policy_says_of_each_head(policy, packing, monkeypatch):
    """``score`` and ``observe`` see heads that hold equally many tokens, request by request and layer by layer."""
    together, alone = (answers(4, 11, packing, "BLHNC") for _ in range(2))
    together.evict(policy, False, [0, 1, 2, 3])
    monkeypatch.setattr(module, "scores_batches", lambda policy: False)
    alone.evict(policy, False, [0, 1, 2, 3])
    assert together.cache.pool.pages.view(torch.int32).equal(alone.cache.pool.pages.view(torch.int32))
    assert together.residents.positions.equal(alone.residents.positions)
    torch.testing.assert_close(together.residents.sums, alone.residents.sums, rtol=1e-5, atol=1e-6)


def test_sums_grow_by_what_the_new_queries_pay_and_are_those_of_the_tokens(monkeypatch):
    """Every query pays 1 in all, mean over its group. Where nothing moves the sums stand where the tokens are."""
    requests = replace(answers(3, 11, "interleaved", "LBHNC"), has_sinks=False)
    before, num_new = requests.residents.sums.clone(), requests.num_new[0]
    monkeypatch.setattr(Residents, "move", lambda *arguments: None)
    eviction = requests.evict("h2o", False, [0, 1, 2])
    slots = eviction._order.of_layers(range(LAYERS))
    is_held = torch.arange(eviction._order.shape[3]) < eviction._kv_lens[..., None]
    is_earlier = torch.arange(eviction._order.shape[3]) < eviction._kv_lens[..., None] - num_new
    sums = requests.residents.sums[slots].masked_fill(~is_held, 0).sum(dim=3)
    earlier = before[slots].masked_fill(~is_earlier, 0).sum(dim=3)
    torch.testing.assert_close(sums, earlier + num_new, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", THIRD_PARTY])
def test_who_goes_on_alone_keeps_what_was_scored(policy):
    together, parted = (answers(3, 5, "interleaved", "LBHNC") for _ in range(2))
    together.evict(policy, False, [0, 1, 2])
    eviction = parted.begin(policy, False, [0, 1, 2])
    parted.score(eviction, [0, 1, 2], range(1))
    for req in range(3):
        alone = eviction.alone(req)
        parted.score(alone, [req], range(1, LAYERS))
        alone.compact()
    assert parted.cache.pool.pages.view(torch.int32).equal(together.cache.pool.pages.view(torch.int32))
    assert parted.residents.positions.equal(together.residents.positions)
    assert parted.residents.sums.equal(together.residents.sums)


@pytest.mark.parametrize("policy", BATCHED)
@pytest.mark.parametrize("packing", PACKINGS)
def test_launches_do_not_depend_on_how_many_there_are_and_nothing_waits(policy, packing, monkeypatch):
    """The heads are ragged, and so no two requests are alike. Of one request more tables are contiguous already."""
    of_one, of_two, of_five = (_launches(num_reqs, policy, packing, monkeypatch) for num_reqs in (1, 2, 5))
    assert of_two.counts == of_five.counts
    assert of_one.counts <= of_two.counts
    assert of_two.counts.total() < MOST_LAUNCHES.get(policy, 210)
    assert of_five.waits == []
    moves = "kvevict_move_tiled_tokens" if packing == "tiled" else "kvevict_move_tokens"
    num_scales = 2
    first_stages = num_scales if policy == "criticalkv" else 0
    assert (of_five.counts["kvevict_select"], of_five.counts[moves]) == (1 + first_stages, 1)
    by_window = policy in ("snapkv", "lava", "vatp", "tova", "h2o", "chunkkv", "criticalkv")
    assert of_five.counts["kvevict_window_scores"] == (num_scales if by_window else 0)


def _launches(num_reqs, policy, packing, monkeypatch):
    requests = answers(num_reqs, 3, packing, "LBHNC")
    with counted(monkeypatch) as launches:
        requests.evict(policy, True, list(range(num_reqs)))
    return launches


def test_all_others_are_asked_request_by_request():
    """Exempt by name: whoever adds a policy decides on which side it stands."""
    batched = {name for name in POLICIES.names() if scores_batches(POLICIES.get(name)())}
    assert batched == {
        "chunkkv", "compactor", "criticalkv", "curdkv", "expected_attention", "h2o", "keydiff", "knorm", "laq",
        "laq++", "laq_deferred", "lava", "morphkv", "obcache_joint",
        "obcache_k", "obcache_v", "random", "snapkv", "streaming_llm", "tova", "vatp",
    }  # fmt: skip


def test_a_subclass_that_changes_score_is_asked_for_it():
    class Changed(POLICIES.get("snapkv")):
        def score(self, inputs):
            return super().score(inputs)

    class Inherited(POLICIES.get("snapkv")):
        pass

    assert scores_batches(Inherited())
    assert not scores_batches(Changed())


def test_a_wrapper_is_asked_as_what_it_wraps_is():
    assert scores_batches(CriticalKV("chunkkv", {"policy": "knorm"}))
    with patch.dict(POLICIES._classes, {THIRD_PARTY: OneByOne}):
        assert not scores_batches(CriticalKV(THIRD_PARTY))
        assert not scores_batches(CriticalKV("chunkkv", {"policy": THIRD_PARTY}))


def test_an_answer_that_was_not_scored_is_an_error_and_nothing_moves():
    requests = answers(2, 1, "transposed", "LBHNC")
    policy = POLICIES.get("snapkv")()
    tables = requests.page_table, requests.num_pages, requests.num_full_pages
    numbers = requests.num_tokens, requests.num_new
    method = Method(policy, Uniform(), 0, policy.num_recent)
    eviction = ResidentEvictions(method, *numbers, requests.cache.pool, requests.residents, *tables)
    eviction.score_layers(range(1), requests.query[:, :1], requests.query[:, :1, :0], [SCALE], [LayerWeights()])
    before = requests.cache.pool.pages.clone()
    with pytest.raises(RuntimeError, match="some layers of an answer were not scored"):
        eviction.compact()
    assert requests.cache.pool.pages.view(torch.int32).equal(before.view(torch.int32))
