"""Prompts that end in one step are evicted together: each as if it were alone, with as few launches as one."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import _disable_current_modes

from tests.compactions import kv_lens_of
from tests.implementations import hard_sinks
from tests.launches import Launches, counted
from tests.one_by_one import ONE_BY_ONE, THIRD_PARTY, policy_of
from tests.paged import LAYOUTS, PACKINGS, PagedCache, make_pool, random_kv, scrambled_blocks
from vllm_kvevict.budgets import ALLOCATORS, BudgetAllocator
from vllm_kvevict.cache.compaction import Compaction
from vllm_kvevict.cache.plan import EvictionPlan, plan_eviction, plan_per_token
from vllm_kvevict.cache.residents import Residents
from vllm_kvevict.eviction import allocation, grouping, scoring
from vllm_kvevict.eviction.grouping import chosen_together, scored_again_together, scored_together
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction, Evictions
from vllm_kvevict.eviction.schedule import DuringDecode, Schedule
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import POLICIES
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import scores_batches
from vllm_kvevict.policies.compactor import Compactor, gaussian_sketch
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs

LAYERS, KV_HEADS, GROUP, HEAD_SIZE, BLOCK, SCALE = 3, 2, 2, 16, 16, 0.25
PROJECTION = torch.randn(24, KV_HEADS * GROUP * HEAD_SIZE, generator=torch.Generator().manual_seed(0))
ANGLES = torch.arange(400)[:, None] * 10.0 ** -torch.arange(HEAD_SIZE // 2)
ROTARY = Rotary(torch.cat([ANGLES.cos(), ANGLES.sin()], dim=1), is_neox_style=True)
BATCHED = [name for name in POLICIES.names() if scores_batches(POLICIES.get(name)())]
OPTIONS = {"global": {"head_floor": 0.2, "layer_floor": 0.5}, "lava": {"floor_alpha": 0.2}}
ALLOCATOR_NAMES = [name for name in ALLOCATORS.names() if name != "fixed"]  # which needs a file


@dataclass
class Prompts:
    """Several prefilled requests in one pool; whatever nobody owns is NaN.

    states: of each and its layers, what the policy has observed
    """

    cache: PagedCache
    evictions: list[Eviction]
    queries: torch.Tensor
    outputs: torch.Tensor
    states: list[list[Any]]

    @property
    def by_name(self) -> dict[str, Eviction]:
        return {str(req): eviction for req, eviction in enumerate(self.evictions)}

    def score(self, parts: list[Evictions]) -> None:
        policy = self.evictions[0].method.policy
        asks_for_outputs = Need.OUTPUTS in policy.needs
        for part in parts:
            for layer in range(LAYERS):
                reqs, weights = [self.number_of(eviction) for eviction in part.members], weights_of(layer)
                queries = [self.queries[req, layer, -40:] for req in reqs]
                outputs = [self.outputs[req, layer, -40:] for req in reqs] if asks_for_outputs else None
                states, pseudo = [self.states[req][layer] for req in reqs], None
                if policy.num_pseudo_tokens:
                    part.preselect_layer(layer, queries, SCALE, weights)
                    pseudo = [self.queries[req, layer, : 1 + req % policy.num_pseudo_tokens] for req in reqs]
                part.score_layer(layer, queries, SCALE, outputs, weights, states, pseudo)

    def number_of(self, eviction: Eviction) -> int:
        return next(req for req, known in enumerate(self.evictions) if known.block_ids is eviction.block_ids)


def weights_of(layer: int) -> LayerWeights:
    """Scales as an fp8 cache may have them."""
    logits = {"softcap": 2.0, "sinks": hard_sinks(KV_HEADS * GROUP) - layer}
    return LayerWeights(ROTARY, PROJECTION + layer, key_scale=0.5 if layer == 1 else 1.0, **logits)


def observed(eviction: Eviction, queries: torch.Tensor) -> list[Any]:
    """queries: [num_layers, at least num_tokens, num_heads, head_size]"""
    pool, policy, num_tokens = eviction.pool, eviction.method.policy, eviction.plan.num_tokens
    if Need.ALL_QUERIES not in policy.needs:
        return [None] * LAYERS
    states = []
    for layer in range(LAYERS):
        pages = pool.readable(pool.layer_page_ids(layer, eviction.block_ids))
        query, weights = queries[layer, len(queries[layer]) - num_tokens :], weights_of(layer)
        states.append(policy.observe(None, ScoreInputs(query, *pages, num_tokens, SCALE, weights=weights)))
    return states


def method_of(policy: str, allocator: str, per_token: bool = False) -> Method:
    scorer = policy_of(policy)
    schedule = Schedule(during_decode=DuringDecode.BY_TOKEN) if per_token else Schedule()
    allocator_options = OPTIONS.get(allocator, {})
    return Method(scorer, ALLOCATORS.get(allocator)(**allocator_options), 2, scorer.num_recent, schedule)


def prompts(
    method: Method, num_reqs: int, seed: int, packing: str = "transposed", layout: str = "LBHNC", fresh: bool = False
) -> Prompts:
    """The same seed draws the same prompts; those of smaller numbers are the first ones of larger ones."""
    sizes, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = make_pool(LAYERS, KV_HEADS, 30 * num_reqs + 4, BLOCK, HEAD_SIZE, packing, layout)
    all_ids = scrambled_blocks(cache, 30 * num_reqs, generator).view(num_reqs, 30)
    evictions = []
    for block_ids in all_ids:
        num_tokens = sizes.randint(80, 300)
        plan = plan_of(method, num_tokens, sizes.choice([60, 0.3, 0.6]))
        own, others = block_ids[: plan.num_blocks], block_ids[plan.num_blocks :]
        cache.write(*random_kv(LAYERS, KV_HEADS, num_tokens, HEAD_SIZE, generator), own)
        fresh_ids = others[: plan.num_full_blocks] if fresh else None
        evictions.append(Eviction(method, plan, cache.pool, own, fresh_ids))
    queries = torch.randn(num_reqs, LAYERS, 300, KV_HEADS * GROUP, HEAD_SIZE, generator=generator)
    states = [observed(eviction, of_request) for eviction, of_request in zip(evictions, queries, strict=True)]
    return Prompts(cache, evictions, queries, queries.flip(2), states)


def plan_of(method: Method, num_tokens: int, budget: int | float) -> EvictionPlan:
    if method.schedule.per_token:
        return plan_per_token(num_tokens, 60, BLOCK, method.min_tokens)
    plan = plan_eviction(num_tokens, budget, BLOCK, method.min_tokens)
    return plan or EvictionPlan(num_tokens, -(-num_tokens // BLOCK) - 1, BLOCK)


def joined(prompts: Prompts) -> list[tuple[list[str], Evictions]]:
    """Those that were scored by their own methods, in the groups that go on together."""
    groups = chosen_together(prompts.by_name)
    return [(names, Evictions.joined([prompts.by_name[name] for name in names])) for names in groups]


POLICY_NAMES = [*BATCHED, *ONE_BY_ONE]


@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    allocator=st.sampled_from(ALLOCATOR_NAMES),
    packing=st.sampled_from(PACKINGS),
    layout=st.sampled_from(LAYOUTS),
    fresh=st.booleans(),
    per_token=st.booleans(),
)
def test_each_keeps_and_moves_what_it_would_alone(policy, seed, allocator, packing, layout, fresh, per_token):
    method = method_of(policy, allocator, per_token)
    together, alone = (prompts(method, 3, seed, packing, layout, fresh) for _ in range(2))
    groups = scored_together(together.by_name)
    if policy in ONE_BY_ONE:
        assert groups == []
        together.score([eviction.alone for eviction in together.evictions])
        groups = joined(together)
    else:
        together.score([group for _, group in groups])
    ((names, group),) = groups
    assert names == list(together.by_name)
    group.choose()
    compactions, noted = group.compact(), Residents(together.cache.pool)
    group.note(noted, [None] * 3)
    expected = Residents(alone.cache.pool)
    for eviction, single, compaction in zip(together.evictions, alone.evictions, compactions, strict=True):
        alone.score([single.alone])
        of_single = single.finish()
        single.alone.note(expected, [None])
        for name in ("page_table", "num_pages"):
            assert getattr(compaction, name).equal(getattr(of_single, name))
        assert not per_token or eviction.next_victims.equal(single.next_victims)
        held = slots_of(compaction, single.plan)
        assert noted.positions[held].equal(expected.positions[held])
    assert together.cache.pool.pages.view(torch.int32).equal(alone.cache.pool.pages.view(torch.int32))


@pytest.mark.parametrize("policy", BATCHED)
def test_what_is_scored_together_is_what_a_policy_says_of_each_layer(policy, monkeypatch):
    method = method_of(policy, "uniform")
    together, alone = prompts(method, 4, 21), prompts(method, 4, 21)
    ((_, group),) = scored_together(together.by_name)
    together.score([group])
    group.choose()
    monkeypatch.setattr(scoring, "scores_batches", lambda policy: False)
    alone.score([eviction.alone for eviction in alone.evictions])
    for req, single in enumerate(alone.evictions):
        single.choose()
        of_request = group._scores.scores.of_layers(0, LAYERS)[req, ..., : single.plan.num_tokens]
        assert of_request.equal(single.alone._scores.scores.of_layers(0, LAYERS)[0])


def slots_of(compaction: Compaction, plan: EvictionPlan) -> torch.Tensor:
    slots = (compaction.page_table[..., None] * BLOCK + torch.arange(BLOCK)).flatten(2)
    return slots[torch.arange(slots.shape[2]) < kv_lens_of(compaction, plan)[..., None]]


def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers of the host launch nothing."""

    @functools.wraps(function)
    def uncounted(*arguments: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments)

    return uncounted


@pytest.mark.parametrize("allocator", ALLOCATOR_NAMES)
@pytest.mark.parametrize("policy", BATCHED)
@pytest.mark.parametrize("fresh", [False, True])
def test_launches_do_not_depend_on_how_many_there_are_and_the_host_waits_once(policy, allocator, fresh, monkeypatch):
    method = method_of(policy, allocator)
    of_two, of_five = (launches(method, num_reqs, fresh, monkeypatch) for num_reqs in (2, 5))
    assert of_two.counts == of_five.counts
    assert of_two.counts.total() < 640
    assert of_five.counts["to_host"] == (allocator not in ("pyramid", "uniform"))
    assert of_five.waits == []
    selects = {"adakv": 2, "global": 2}.get(allocator, 1)
    if policy == "criticalkv":  # of the first stage, in each of three layers: the scales of neighbours differ
        selects += 3
    assert (of_five.counts["kvevict_select"], of_five.counts["kvevict_move_tokens"]) == (selects, 2 - fresh)


def launches(method: Method, num_reqs: int, fresh: bool, monkeypatch: pytest.MonkeyPatch) -> Launches:
    several = prompts(method, num_reqs, 6, fresh=fresh)
    gaussian_sketch(HEAD_SIZE, Compactor.sketch_rank, Compactor.seed)  # which is drawn once
    with counted(monkeypatch) as launches, monkeypatch.context() as patched:
        allocator = type(method.allocator)
        for owner, name in ((allocation, "_pages"), (allocation, "checked_wish"), (allocator, "share")):
            patched.setattr(owner, name, on_the_host(getattr(owner, name)))

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            launches.counts["to_host"] += 1
            return tensor

        patched.setattr(allocation, "to_host", to_host)
        ((_, group),) = scored_together(several.by_name)
        several.score([group])
        group.choose()
        group.compact()
        group.note(Residents(several.cache.pool), [None] * num_reqs)
    return launches


@dataclass(frozen=True)
class OneByOne(BudgetAllocator):
    """A third party's: it sees one request at a time, and its scores are those of that request."""

    seen: list[tuple[int, ...]]
    refused: int = 0

    def wish(self, scores: torch.Tensor, num_tokens: int, measures: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(scores.shape))
        assert not scores.isnan().any()
        if scores.shape[2] == self.refused:
            raise LookupError(f"{self.refused} tokens")
        return torch.ones(scores.shape[:2])


def test_a_third_party_s_allocator_is_asked_request_by_request():
    method = replace(method_of("snapkv", "uniform"), allocator=OneByOne([]))
    several = prompts(method, 3, 2)
    assert scored_together(several.by_name) == []
    assert chosen_together(several.by_name) == [["0"], ["1"], ["2"]]
    group = Evictions(several.evictions)
    several.score([group])
    group.choose()
    lengths = [eviction.plan.num_tokens for eviction in several.evictions]
    assert method.allocator.seen == [(LAYERS, KV_HEADS, length) for length in lengths]
    assert len(set(lengths)) > 1


def test_those_that_break_up_go_on_with_what_was_seen_and_one_fails_alone():
    """In the middle of the layers, some of which wait to be scored; and after one of them has failed to choose."""
    method = method_of("snapkv", "uniform")
    lengths = [eviction.plan.num_tokens for eviction in prompts(method, 3, 9).evictions]
    method = replace(method, allocator=OneByOne([], lengths[1]))
    together, alone = prompts(method, 3, 9), prompts(method, 3, 9)
    group = Evictions(together.evictions)
    group.score_layer(0, list(together.queries[:, 0]), SCALE)
    group.break_up()
    group.break_up()  # once more changes nothing
    for several, first in ((together, 1), (alone, 0)):
        for eviction, queries in zip(several.evictions, several.queries, strict=True):
            for layer in range(first, LAYERS):
                eviction.score_layer(layer, queries[layer], SCALE)
    again = Evictions.joined(together.evictions)
    with pytest.raises(LookupError):
        again.choose()
    again.break_up()
    for eviction, single in zip(together.evictions, alone.evictions, strict=True):
        if eviction.plan.num_tokens == lengths[1]:
            with pytest.raises(LookupError):
                eviction.choose()
        else:
            assert eviction.finish().page_table.equal(single.finish().page_table)
    assert together.cache.pool.pages.view(torch.int32).equal(alone.cache.pool.pages.view(torch.int32))


def test_those_are_together_that_one_method_evicts_alike_and_whose_lengths_are_not_too_far_apart():
    method = method_of("snapkv", "uniform")
    several = prompts(method, 5, 4)
    several.evictions[1].method = method_of("snapkv", "lava")
    several.evictions[2].fresh_block_ids = several.evictions[2].block_ids[:3]
    several.evictions[3].plan = replace(several.evictions[3].plan, per_token=True)
    assert [names for names, _ in scored_together(several.by_name)] == [["0", "4"]]
    ahead = prompts(method_of("laq", "uniform"), 2, 4)
    assert [names for names, _ in scored_together(ahead.by_name)] == [["0", "1"]]

    class Changed(POLICIES.get("laq")):  # type: ignore[misc]
        def preselect(self, inputs):
            return super().preselect(inputs)

    for eviction in ahead.evictions:
        eviction.method = replace(eviction.method, policy=Changed())
    assert scored_together(ahead.by_name) == [], "pseudo tokens see what is asked prompt by prompt"
    lengths = (20, 4096, 4097, 8192, 8193)
    long = {str(length): replace(several.evictions[0], plan=EvictionPlan(length, 2, BLOCK)) for length in lengths}
    assert grouping._grouped(long, grouping._fit) == [["20", "4096"], ["4097", "8192"], ["8193"]]


def test_answers_are_together_that_one_method_evicts_and_whose_queries_are_as_many_if_all_are_observed():
    methods = [
        method_of(policy, "uniform") for policy in ("snapkv", "snapkv", "h2o", "h2o", "h2o", THIRD_PARTY, THIRD_PARTY)
    ]
    due = {str(place): (method, 16 + (place == 4)) for place, method in enumerate(methods)}
    due["1"] = (methods[1], 9)
    assert scored_again_together(due) == [["0", "1"], ["2", "3"], ["4"], ["5"], ["6"]]
