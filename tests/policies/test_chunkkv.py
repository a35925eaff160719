"""ChunkKV: chunks against kvpress's wrapper and a loop, and what the other policy is asked for."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from tests.llama_layer import BLOCK_SIZE, make_llama_layer
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.policies import POLICIES, EvictionPolicy, Need
from vllm_kvevict.policies.chunkkv import ChunkKV
from vllm_kvevict.policies.inputs import LayerWeights
from vllm_kvevict.policies.knorm import Knorm
from vllm_kvevict.policies.snapkv import SnapKV

SNAPKV = {"window": 64, "pool": "avg", "pool_kernel": 5}


@dataclass(frozen=True)
class Given(EvictionPolicy):
    """A policy whose scores are written down, and that asks for everything."""

    scores: torch.Tensor = torch.zeros(2, 0)  # noqa: RUF009
    query_window: ClassVar[int] = 3
    needs: ClassVar[frozenset] = frozenset({Need.ALL_QUERIES, Need.ROTARY})
    query_aware: ClassVar[bool] = False
    num_sink: ClassVar[int] = 5
    num_recent: ClassVar[int] = 7

    def observe(self, state, inputs):
        return (state or 0) + len(inputs.query)

    def state_bytes(self, num_heads, num_kv_heads, head_size):
        return 100 * num_heads + 10 * num_kv_heads + head_size

    def scratch_bytes(self, num_heads, num_kv_heads, head_size):
        return 1000

    def score(self, inputs):
        return self.scores


@pytest.fixture
def given(monkeypatch):
    """Registers ``Given`` for one test."""
    monkeypatch.setitem(POLICIES._classes, "given", Given)


def score(policy, layer):
    return policy.score(layer.inputs(policy))


def score_given(scores, chunk_length):
    policy = ChunkKV("given", {"scores": scores}, chunk_length)
    return policy.score(replace(make_llama_layer(1, 0).inputs(Knorm()), kv_len=scores.shape[1]))


def best(scores, num_kept):
    return scores.topk(num_kept).indices.sort().values


def descending_loop(chunk_scores, length, num_tokens):
    """Tokens in the order of the chunks' scores: that of their chunk, or the next float32 below the token before."""
    result, last = np.zeros(num_tokens, dtype=np.float32), np.float32("inf")
    for chunk in sorted(range(len(chunk_scores)), key=lambda chunk: -chunk_scores[chunk]):
        for token in range(chunk * length, min((chunk + 1) * length, num_tokens)):
            below = np.nextafter(last, np.float32("-inf"), dtype=np.float32)
            result[token] = last = min(np.float32(chunk_scores[chunk]), below)
    return torch.from_numpy(result)


def chunk_means_loop(scores, length):
    """In exact sums of float64: one number for each chunk of [num_kv_heads, num_tokens] scores."""
    return [float(chunk.double().sum() / chunk.shape[1]) for chunk in scores.split(length, dim=1)]


@pytest.mark.usefixtures("given")
class TestScores:
    @pytest.mark.parametrize("num_tokens, length", [(130, 20), (140, 20), (20, 20), (39, 20), (7, 1), (333, 16)])
    @pytest.mark.parametrize("values", ["spread", "tied", "small", "near zero"])
    def test_equal_the_loop(self, num_tokens, length, values):
        """Whole numbers are summed exactly, so that ties are ties and order is order."""
        low, high = {"spread": (-1000, 1000), "tied": (0, 2), "small": (-3, 3), "near zero": (-2, 3)}[values]
        scores = torch.randint(low, high, (2, num_tokens)).float()
        if values in ("tied", "near zero"):  # the same number in every token of a chunk: many chunks are equal
            scores = scores[:, ::length].repeat_interleave(length, dim=1)[:, :num_tokens]
        if values == "near zero":
            scores = scores * 2.0**-149  # the smallest float32
        if values == "spread":
            scores = scores * length / 2**10
        expected = descending_loop(chunk_means_loop(scores, length), length, num_tokens)
        for row in score_given(scores, length):
            # one ulp of the mean, whose division rounds; none where chunks hold one number
            torch.testing.assert_close(row, expected, rtol=2e-7 * (values in ("spread", "small")) * num_tokens, atol=0)
            assert row.argsort(descending=True).tolist() == expected.argsort(descending=True).tolist()

    def test_chunks_a_unit_in_the_last_place_apart_keep_their_order(self):
        one = torch.tensor(1.0)
        above = torch.nextafter(one, torch.tensor(2.0))
        chunks = torch.stack([one, above, one, -one, -above, one])
        scores = score_given((chunks.repeat_interleave(20) / 2).expand(2, -1), 20)[0]
        order = scores.argsort(descending=True)
        assert order[::20].div(20, rounding_mode="floor").tolist() == [1, 0, 2, 5, 3, 4]
        assert scores.sort().values.diff().gt(0).all(), "a tie is broken by chance"
        torch.testing.assert_close(scores, chunks.repeat_interleave(20), rtol=1e-5, atol=0)

    def test_all_heads_rank_alike_although_the_other_policy_tells_them_apart(self):
        scores = torch.zeros(2, 100)
        scores[0, 25], scores[1, 70] = 3.0, 2.0
        one, other = score_given(scores, 20)
        assert one.equal(other)
        assert best(one, 40).tolist() == [*range(20, 40), *range(60, 80)]

    def test_first_tokens_of_the_chunk_at_the_cut_stay(self):
        scores = torch.zeros(2, 100)
        scores[:, 45], scores[:, 99] = 1.0, 9.0
        assert best(score_given(scores, 20)[0], 33).tolist() == [*range(40, 53), *range(80, 100)]

    def test_a_last_short_chunk_competes_with_its_own_mean(self):
        scores = torch.zeros(2, 50)
        scores[:, 3], scores[:, 45] = 10.0, 6.0  # means 0.5 of 20 tokens, 0.6 of 10
        assert best(score_given(scores, 20)[0], 30).tolist() == [*range(20), *range(40, 50)]

    def test_prompts_shorter_than_a_chunk_get_the_other_policys_scores(self):
        scores = torch.randn(2, 19)
        assert score_given(scores, 20).equal(scores)

    def test_what_it_asks_the_engine_for_is_what_the_other_policy_asks_for(self):
        policy = ChunkKV("given")
        assert (policy.query_window, policy.num_sink, policy.num_recent, policy.needs) == (3, 5, 7, Given.needs)
        assert policy.query_aware is False
        assert policy.state_bytes(8, 2, 32) == 852
        assert policy.scratch_bytes(8, 2, 32) == 1000
        assert policy.default_allocator == "uniform"

    def test_chunks_of_the_prompt_reach_the_other_policy(self):
        layer, policy = make_llama_layer(130, 0), ChunkKV("given")
        assert layer.inputs(policy, chunks=[50, 30]).state == 130
        assert layer.inputs(policy).weights != LayerWeights()


def test_the_other_policy_gets_its_options():
    policy = ChunkKV("snapkv", {"window": 48, "group": "max"})
    assert policy.wrapped == SnapKV(window=48, group="max")
    assert policy.query_window == policy.num_recent == 48
    assert policy.query_aware
    assert not ChunkKV("knorm").query_aware


@pytest.mark.parametrize("length", [1, 2, 20])
@pytest.mark.parametrize("num_tokens", [130, 333])
def test_chunks_of_one_token_rank_by_the_sum_over_heads(length, num_tokens):
    layer = make_llama_layer(num_tokens, 0)
    means = chunk_means_loop(score(Knorm(), layer), length)
    order = score(ChunkKV("knorm", chunk_length=length), layer)[0, ::length].argsort(descending=True)
    assert order.tolist() == sorted(range(len(means)), key=lambda chunk: -means[chunk])


@pytest.mark.parametrize("num_tokens", [320, 333])
@pytest.mark.parametrize("budget", [64, 160, 0.75])
def test_chunks_of_the_block_size_stay_or_go_with_their_block(kept_masks, num_tokens, budget):
    policy = ChunkKV("knorm", chunk_length=BLOCK_SIZE)
    layer = make_llama_layer(num_tokens, 0)
    plan = plan_eviction(num_tokens, budget, BLOCK_SIZE, 0)
    cache, block_ids = layer.cache()
    eviction = Eviction(Method(policy, Uniform(), 0, 0), plan, cache.pool, block_ids)
    eviction.score_layer(0, layer.query[:0], layer.module.scaling)
    eviction.finish()
    [mask] = kept_masks
    for head in mask[0]:
        cut = [block for block in head.split(BLOCK_SIZE) if block.any() and not block.all()]
        assert len(cut) == 0 if num_tokens == 320 else len(cut) <= 1
        assert head.sum() == plan.num_kept_tokens


def press_of(kvpress, policy, ratio):
    if policy == "snapkv":
        return kvpress.SnapKVPress(ratio, window_size=64, kernel_size=5)
    return {"knorm": kvpress.KnormPress, "keydiff": kvpress.KeyDiffPress}[policy](ratio)


# with SnapKV not 0.9: the chunks of its window are equal, and which of them is kept is chance
CASES = [
    ("snapkv", 0.25),
    ("snapkv", 0.5),
    *((name, ratio) for name in ("knorm", "keydiff") for ratio in (0.25, 0.5, 0.9)),
]


@pytest.mark.parametrize("policy, ratio", CASES)
@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
@pytest.mark.parametrize("length", [20, 16, 64])
@torch.no_grad()
def test_keeps_what_kvpress_keeps(kvpress, policy, ratio, num_tokens, length):
    """With the budget that kvpress keeps: whole chunks, of which the last one of the prompt may be short."""
    layer = make_llama_layer(num_tokens, 0)
    means = chunk_means_loop(press_of(kvpress, policy, ratio).score(*layer.press_arguments())[0], length)
    num_chunks = max(1, int(len(means) * (1 - ratio)))
    means.sort(reverse=True)
    assert means[num_chunks - 1] > means[num_chunks], "a tie at the cut: either choice would be right"
    # values that say which token they belong to
    named = replace(layer, values=torch.arange(num_tokens).float()[:, None].expand_as(layer.values))
    press = kvpress.ChunkKVPress(press_of(kvpress, policy, ratio), chunk_length=length)
    theirs = press.compress(*named.press_arguments())[1][0, :, :, 0].tolist()

    chunked = ChunkKV(policy, SNAPKV if policy == "snapkv" else {}, length)
    scores = score(chunked, layer)
    assert best(scores, len(theirs[0])).tolist() == theirs
    if len(theirs[0]) >= 2 * chunked.num_recent:
        # the chunks of the window rank first by themselves, so that protecting it changes nothing
        protected = protect(scores[None], chunked.num_sink, chunked.num_recent)
        mask = select(protected, torch.full((1, 2), len(theirs[0])))[0]
        assert mask.nonzero()[:, 1].view(2, -1).tolist() == theirs


@torch.no_grad()
def test_prompts_shorter_than_a_chunk_are_kvpress_s_too(kvpress):
    layer = make_llama_layer(19, 0)
    press = kvpress.ChunkKVPress(kvpress.KnormPress(0.5), chunk_length=20)
    named = replace(layer, values=torch.arange(19).float()[:, None].expand_as(layer.values))
    theirs = press.compress(*named.press_arguments())[1][0, :, :, 0].sort().values
    assert best(score(ChunkKV("knorm"), layer), theirs.shape[1]).tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunk_length": 0}, r"chunkkv\.chunk_length: expected a whole number of at least 1, got 0"),
        ({"chunk_length": 20.0}, r"chunkkv\.chunk_length: expected a whole number of at least 1, got 20\.0"),
        ({"chunk_length": True}, r"chunkkv\.chunk_length: expected a whole number of at least 1, got True"),
        ({"policy": "chunkkv"}, r"chunkkv\.policy: expected the name of another policy, got 'chunkkv'"),
        ({"policy": None}, r"chunkkv\.policy: expected the name of another policy, got None"),
        ({"policy": "snapk"}, r"unknown eviction policy 'snapk'\. Did you mean 'snapkv'\? Available: "),
        ({"policy_options": [1]}, r"chunkkv\.policy_options: expected options by name, got \[1\]"),
        ({"policy_options": {"windw": 3}}, r"chunkkv\.policy_options: expected window, .* of 'snapkv', got 'windw'"),
        ({"policy_options": {"window": 0}}, r"snapkv\.window: expected a whole number of at least 1, got 0"),
        ({"policy": "knorm", "policy_options": {"a": 1}}, r"policy_options: expected no options of 'knorm', got 'a'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChunkKV(**options)


def test_options_travel_as_json():
    options = {"policy": "lava", "policy_options": {"window": 40}, "chunk_length": 16}
    values = {"policy": "chunkkv", "budget": 64, "policy_options": options}
    config = EvictionConfig.parse(json.loads(json.dumps(values)))
    method = EvictionConfig.model_validate_json(config.model_dump_json()).method()
    assert method.policy == ChunkKV(**options)
    assert (method.num_recent, method.allocator) == (40, Uniform())
    with pytest.raises(
        ValueError, match=r"chunkkv\.policy_options: expected window, pool_kernel of 'lava', got 'pool'"
    ):
        EvictionConfig.parse({**values, "policy_options": {"policy": "lava", "policy_options": {"pool": "max"}}})


def test_it_can_be_compared_and_hashed():
    one, same, other = (ChunkKV("snapkv", {"window": window}) for window in (16, 16, 17))
    assert one == same != other
    assert hash(one) == hash(same)
