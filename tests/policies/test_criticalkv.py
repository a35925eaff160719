"""CriticalKV against its formula and against kvpress's own implementation, over the policies that it may wrap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.compactions import kv_lens_of
from tests.llama_layer import BLOCK_SIZE, make_llama_layer
from tests.policies.test_contract import HeldBytes
from vllm_kvevict.budgets.adakv import AdaKV
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.policies import POLICIES, Need
from vllm_kvevict.policies.criticalkv import CriticalKV, projected_value_norms
from vllm_kvevict.policies.inputs import ScoreInputs

NUM_KV_HEADS, GROUP, HEAD_SIZE = 2, 4, 32
KVPRESS_SNAPKV = {"window": 64, "pool": "avg", "pool_kernel": 5}


def dense_norm(layer):
    """[num_kv_heads, num_tokens] float64: for each query head, the whole of W_O times a vector that only it fills."""
    projection = layer.module.o_proj.weight.double()
    norms = torch.zeros(NUM_KV_HEADS, layer.num_tokens, dtype=torch.float64)
    for head in range(NUM_KV_HEADS * GROUP):
        filled = torch.zeros(layer.num_tokens, projection.shape[1], dtype=torch.float64)
        filled[:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE] = layer.values[head // GROUP]
        norms[head // GROUP] += (filled @ projection.T).abs().sum(1) / GROUP
    return norms


@pytest.mark.parametrize("num_tokens", [33, 130, 1100])
@torch.no_grad()
def test_the_norm_equals_the_formula(num_tokens):
    layer = make_llama_layer(num_tokens, seed=0)
    norm = projected_value_norms(ScoreInputs.together([layer.inputs(CriticalKV())]))
    torch.testing.assert_close(norm, dense_norm(layer).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("num_tokens", [130, 1100])
@torch.no_grad()
def test_without_a_budget_only_the_second_stage_applies(num_tokens, epsilon):
    policy, layer = CriticalKV(epsilon=epsilon), make_llama_layer(num_tokens, seed=0)
    inputs = layer.inputs(policy)
    expected = (policy.wrapped.score(inputs) + epsilon) * dense_norm(layer)
    torch.testing.assert_close(policy.score(inputs), expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_kept, ratio, num_first", [
    (96, 0.5, 48), (97, 0.5, 48), (96, 0.25, 24), (1, 0.5, 1), (96, 0, 0), (130, 1, 130), (200, 1, 130),
])  # fmt: skip
@torch.no_grad()
def test_the_first_stage_is_above_the_second(num_kept, ratio, num_first):
    policy, layer = CriticalKV(first_stage_ratio=ratio), make_llama_layer(130, seed=0)
    inputs = layer.inputs(policy)
    second = policy.score(inputs)
    scores = policy.score(replace(inputs, num_kept=num_kept))
    best = policy.wrapped.score(inputs).sort(descending=True, stable=True)
    for head in range(NUM_KV_HEADS):
        # the window and the best token before it tie in SnapKV; any of them may come first
        lifted = set((scores[head] > second[head]).nonzero()[:, 0].tolist())
        assert len(lifted) == num_first
        if 0 < num_first < 130:
            lowest = best.values[head, num_first - 1]
            assert all(policy.wrapped.score(inputs)[head, token] >= lowest for token in lifted)
        rest = [token for token in range(130) if token not in lifted]
        if lifted and rest:
            assert scores[head, sorted(lifted)].amin() >= second.amax()
        assert scores[head, rest].equal(second[head, rest])
    assert torch.isfinite(scores).all()


def test_the_second_stage_changes_the_choice():
    layer = make_llama_layer(333, seed=0)
    inputs = layer.inputs(CriticalKV())
    ours, host = (
        policy.score(inputs)[:, :-32].topk(50).indices.sort().values for policy in (CriticalKV(), CriticalKV().wrapped)
    )
    assert not ours.equal(host)


@pytest.mark.parametrize("host", [name for name in POLICIES.names() if name != "criticalkv"])
@pytest.mark.parametrize("num_kept", [None, 96])
@torch.no_grad()
def test_wraps_every_policy(host, num_kept):
    policy, layer = CriticalKV(policy=host), make_llama_layer(200, seed=0)
    cls = POLICIES.get(host)
    assert policy.needs == cls().needs | {Need.OUTPUT_PROJECTION}
    for name in ("query_window", "query_aware", "num_sink", "num_recent", "default_allocator"):
        assert getattr(policy, name) == getattr(cls(), name)
    assert policy.state_bytes(8, 2, 32) == cls().state_bytes(8, 2, 32)
    assert policy.scratch_bytes(8, 2, 32) >= cls().scratch_bytes(8, 2, 32)
    inputs = replace(layer.inputs(policy, chunks=[64]), num_kept=num_kept)
    second = (cls().score(inputs) + 1e-4) * dense_norm(layer)
    scores = policy.score(inputs)
    assert torch.isfinite(scores).all()
    if num_kept is None:
        torch.testing.assert_close(scores, second.float(), rtol=1e-5, atol=1e-6 * float(second.abs().amax()))
    else:
        first = scores.topk(48).indices.sort().values
        ties = cls().score(inputs).topk(49).values
        for head in (head for head in range(NUM_KV_HEADS) if ties[head, 47] > ties[head, 48]):
            assert first[head].equal(cls().score(inputs).topk(48).indices.sort().values[head])


@torch.no_grad()
def test_a_joint_ranking_leaves_every_head_its_first_stage():
    """One head's values are tiny: by their norms alone it would keep next to nothing."""
    policy, layer = CriticalKV(), make_llama_layer(640, seed=0)
    layer = replace(layer, values=layer.values * torch.tensor([1.0, 1e-6])[:, None, None])
    plan = plan_eviction(640, 128, BLOCK_SIZE, 32)
    kept = {}
    for ratio in (0.5, 0.0):
        cache, block_ids = layer.cache()
        inputs = layer.inputs(policy)
        method = Method(replace(policy, first_stage_ratio=ratio), AdaKV(alpha=0.0), 0, 32)
        eviction = Eviction(method, plan, cache.pool, block_ids)
        eviction.score_layer(0, inputs.query, inputs.scale, None, inputs.weights)
        kept[ratio] = kv_lens_of(eviction.finish(), plan)[0].tolist()
    assert kept == {0.5: [192, 64], 0.0: [224, 32]}


@torch.no_grad()
def test_scratch_with_a_budget():
    """The contract's test knows no budget; here the first stage takes all of the prompt, which is the most."""
    policy, held = CriticalKV(first_stage_ratio=1.0), []
    for num_tokens in (6144, 12288):
        layer = make_llama_layer(64, seed=0)
        repeats = num_tokens // 64
        layer = replace(layer, keys=layer.keys.repeat(1, repeats, 1), values=layer.values.repeat(1, repeats, 1))
        inputs = replace(layer.inputs(policy), query=layer.query[-32:], num_kept=num_tokens)
        with HeldBytes() as bytes_held:
            policy.score(inputs)
        held.append(bytes_held.most)
    assert held[1] - held[0] <= 6144 * policy.scratch_bytes(8, NUM_KV_HEADS, HEAD_SIZE)


def test_options_come_from_the_command_line():
    options = {"policy": "snapkv", "policy_options": {"window": 64}, "first_stage_ratio": 0.25}
    config = EvictionConfig.parse({"policy": "criticalkv", "budget": 256, "policy_options": options})
    method = config.method()
    assert method.policy.wrapped == POLICIES.get("snapkv")(window=64)
    assert method.query_window == method.num_recent == 64
    assert config.allocator_name == "uniform"
    assert isinstance(hash(method), int)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": "criticalkv"}, r"criticalkv\.policy: expected the name of another policy, got 'criticalkv'"),
        ({"policy": None}, r"criticalkv\.policy: expected the name of another policy, got None"),
        ({"policy": "snapkvv"}, r"unknown eviction policy 'snapkvv'\. Did you mean 'snapkv'\?"),
        ({"policy_options": {"windw": 3}}, r"criticalkv\.policy_options: expected window, .* of 'snapkv', got 'windw'"),
        ({"policy_options": {"window": 0}}, r"snapkv\.window: expected a whole number of at least 1, got 0"),
        ({"policy_options": [64]}, r"criticalkv\.policy_options: expected options by name, got \[64\]"),
        ({"first_stage_ratio": 1.5}, r"criticalkv\.first_stage_ratio: expected a number from 0 to 1, got 1\.5"),
        ({"first_stage_ratio": True}, r"criticalkv\.first_stage_ratio: expected a number from 0 to 1, got True"),
        ({"first_stage_ratio": None}, r"criticalkv\.first_stage_ratio: expected a number from 0 to 1, got None"),
        ({"epsilon": -1}, r"criticalkv\.epsilon: expected a number of at least 0, got -1"),
        ({"epsilon": "1e-4"}, r"criticalkv\.epsilon: expected a number of at least 0, got '1e-4'"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CriticalKV(**options)
    with pytest.raises(ValueError, match=message):
        EvictionConfig.parse({"policy": "criticalkv", "budget": 256, "policy_options": options})


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [333, 1000])
@pytest.mark.parametrize("budget", [160, 0.5, 0.75])
class TestAgainstKvpress:
    @torch.no_grad()
    def test_scores_and_kept_tokens(self, kvpress, num_tokens, seed, budget):
        """What is left in our pages after a whole eviction is what kvpress's ``compress`` returns, token by token."""
        plan = plan_eviction(num_tokens, budget, BLOCK_SIZE, 64)
        policy = CriticalKV(policy_options=KVPRESS_SNAPKV)
        layer = make_llama_layer(num_tokens, seed)
        ratio = 1 - (plan.num_kept_tokens + 0.5) / num_tokens
        press = kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio, window_size=64, kernel_size=5))
        theirs = press.score(*layer.press_arguments())[0]
        inputs = replace(layer.inputs(policy), num_kept=plan.num_kept_tokens)
        scores = policy.score(inputs)
        first = theirs == torch.finfo(torch.float32).max
        assert first.sum(1).tolist() == [plan.num_kept_tokens // 2] * NUM_KV_HEADS
        assert first[:, -64:].all(), "so small a budget that kvpress drops a part of the window"
        assert (scores > policy.score(replace(inputs, num_kept=None))).equal(first)
        torch.testing.assert_close(scores[~first], theirs[~first], rtol=1e-4, atol=1e-9)

        ranked = theirs.sort(descending=True).values
        at_cut = ranked[:, plan.num_kept_tokens - 1] - ranked[:, plan.num_kept_tokens]
        assert (at_cut > 1e-5 * ranked[:, plan.num_kept_tokens]).all(), "a tie at the cut: either choice would be right"
        kept_values = press.compress(*layer.press_arguments())[1][0]
        cache, block_ids = layer.cache()
        eviction = Eviction(Method(policy, Uniform(), 0, 64), plan, cache.pool, block_ids)
        eviction.score_layer(0, inputs.query, inputs.scale, None, inputs.weights)
        compaction = eviction.finish()
        for head, pages in enumerate(compaction.page_table[0]):
            values = cache.read(pages, int(kv_lens_of(compaction, plan)[0, head]))[1]
            assert values.shape == kept_values[head].shape
            assert sorted(values.tolist()) == sorted(kept_values[head].tolist())
