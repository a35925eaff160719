"""Expected Attention against its formula, dense and in float64, and against kvpress's own implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.compactions import kv_lens_of
from tests.llama_layer import BLOCK_SIZE, make_llama_layer
from tests.tiny_llama import tiny_llama_config
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.expected_attention import ExpectedAttention, _average_rotations, _bytes_of_head
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 8, 2, 32

# Logits of up to some 50 are off by 1e-6 of that in float32, which the softmax makes relative.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-8}
THEIR_NAMES = {"num_sink": "n_sink", "num_future_positions": "n_future_positions"}


def long_rotary(num_positions=2048):
    """The rotary table of a model, which goes on behind the prompt; that of ``LlamaLayer`` ends with it."""
    cos, sin = LlamaRotaryEmbedding(tiny_llama_config())(torch.zeros(1), torch.arange(num_positions)[None])
    half = HEAD_SIZE // 2
    return Rotary(torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1), is_neox_style=True)


def make_inputs(layer, policy, chunks=(), num_positions=2048):
    return replace(layer.inputs(policy, chunks), weights=LayerWeights(long_rotary(num_positions)))


def rotation(position, base=10000.0):
    """[head_size, head_size] float64, the rotation of pairs (i, i + head_size / 2) by the model's float32 angles."""
    angles = position * (1.0 / base ** (torch.arange(0, HEAD_SIZE, 2).float() / HEAD_SIZE))
    cos, sin = angles.double().cos().diag(), angles.double().sin().diag()
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


@torch.no_grad()
def formula(policy, layer, num_future=None):
    """[num_kv_heads, num_tokens - num_sink] float64, one query head after the other."""
    num_tokens, sink = layer.num_tokens, policy.num_sink
    queries = layer.module.q_proj(layer.hidden_states)[0].unflatten(1, (-1, HEAD_SIZE)).double()[sink:]
    positions = range(num_tokens, num_tokens + (num_future or policy.num_future_positions))
    turn = torch.stack([rotation(position) for position in positions]).mean(0)
    keys, values = layer.keys[:, sink:].double(), layer.values[:, sink:].double()
    scores = torch.zeros(NUM_KV_HEADS, num_tokens - sink, dtype=torch.float64)
    for head in range(NUM_HEADS):
        mean, covariance = turn @ queries[:, head].mean(0), turn @ queries[:, head].T.cov(correction=0) @ turn.T
        key = keys[head // 4]
        logits = key @ mean / HEAD_SIZE**0.5
        if policy.use_covariance:
            logits += torch.stack([k @ covariance @ k for k in key]) / HEAD_SIZE / 2
        scores[head // 4] += logits.softmax(0) / 4
    return (scores + policy.epsilon) * values.norm(dim=-1) if policy.use_vnorm else scores


@pytest.mark.parametrize("num_tokens", [5, 6, 130, 333, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_covariance": False},
        {"use_vnorm": False},
        {"epsilon": 0.02},
        {"num_sink": 0, "num_future_positions": 1},
        {"num_future_positions": 37},
    ],
    ids=str,
)
def test_equals_the_formula(options, num_tokens):
    policy = ExpectedAttention(**options)
    layer = make_llama_layer(num_tokens, seed=0)
    scores = policy.score(make_inputs(layer, policy, chunks=[64]))
    expected = formula(policy, layer).float()
    torch.testing.assert_close(scores[:, policy.num_sink :], expected, **TOLERANCE)
    assert (scores[:, : policy.num_sink] == scores[:, policy.num_sink :].amax()).all()


@pytest.mark.parametrize("num_left, num_future", [(100, 100), (1, 1), (512, 512), (513, 512)])
def test_positions_past_the_table_do_not_count(num_left, num_future):
    policy, layer = ExpectedAttention(), make_llama_layer(200, seed=0)
    scores = policy.score(make_inputs(layer, policy, num_positions=200 + num_left))
    torch.testing.assert_close(scores[:, 4:], formula(policy, layer, num_future).float(), **TOLERANCE)


def test_a_prompt_that_fills_the_table_is_judged_by_its_last_position():
    policy = ExpectedAttention(num_future_positions=3)
    layer = make_llama_layer(200, seed=0)
    inputs = make_inputs(layer, policy, num_positions=200)
    rotary = inputs.weights.rotary
    repeated = Rotary(torch.cat([rotary.cos_sin, rotary.cos_sin[-1:].expand(3, -1)]), True)
    scores = policy.score(inputs)
    torch.testing.assert_close(scores, policy.score(replace(inputs, weights=LayerWeights(repeated))))


@pytest.mark.parametrize("neox", [True, False])
def test_partial_rotary_with_magnitude_and_either_pairing(neox):
    """Against rotations as matrices, of 6 dimensions out of 32, for queries that were rotated so themselves."""
    policy, layer = ExpectedAttention(num_future_positions=5), make_llama_layer(130, seed=0)
    angles = torch.arange(140)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    rotary = Rotary(1.3 * torch.cat([angles.cos(), angles.sin()], dim=1), is_neox_style=neox)
    raw = layer.query.transpose(0, 1)
    layer = replace(layer, query=rotary.rotate(raw, torch.arange(130)).transpose(0, 1).contiguous())
    pairs = [(0, 3), (1, 4), (2, 5)] if neox else [(0, 1), (2, 3), (4, 5)]
    turn = torch.eye(HEAD_SIZE, dtype=torch.float64)
    for index, (first, second) in enumerate(pairs):
        cos, sin = (1.3 * function(angles[130:135, index].double()).mean() for function in (torch.cos, torch.sin))
        turn[[first, first, second, second], [first, second, first, second]] = torch.stack([cos, -sin, sin, cos])
    inputs = replace(layer.inputs(policy), state=None, weights=LayerWeights(rotary))
    inputs = replace(inputs, state=policy.observe(None, replace(inputs, query=layer.query)))
    batch = ScoreInputs.together([inputs])
    mean, covariance = policy._future_queries(batch, _average_rotations(batch, 5), slice(0, NUM_KV_HEADS))
    for head in range(NUM_HEADS):
        queries = raw[head, 4:].double()
        at = head // 4, head % 4
        torch.testing.assert_close(mean[at][0], (turn @ queries.mean(0)).float(), rtol=1e-5, atol=1e-5)
        expected = turn @ queries.T.cov(correction=0) @ turn.T
        torch.testing.assert_close(covariance[at], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [333, 1003])
def test_chunks_of_the_prefill_do_not_matter(num_tokens):
    policy, layer = ExpectedAttention(), make_llama_layer(num_tokens, seed=0)
    whole = policy.score(make_inputs(layer, policy))
    kept = torch.full((1, NUM_KV_HEADS), 96)
    expected = select(protect(whole[None], 4, 0), kept)
    for chunks in ([64], [256], [1000], [7], [3, 300, 90]):
        scores = policy.score(make_inputs(layer, policy, chunks))
        torch.testing.assert_close(scores, whole, rtol=1e-5, atol=0)
        assert select(protect(scores[None], 4, 0), kept).equal(expected)


def test_a_large_mean_does_not_drown_the_covariance():
    """Biases of 300 times the spread, as in Qwen2: squares of them are subtracted."""
    policy, layer = ExpectedAttention(num_sink=0), make_llama_layer(500, seed=0)
    rotary = long_rotary()
    raw = torch.randn(NUM_HEADS, 500, HEAD_SIZE) + 300
    query = rotary.rotate(raw, torch.arange(500)).transpose(0, 1)
    inputs = replace(make_inputs(layer, policy), query=query)
    sums = policy.observe(None, inputs)
    mean = sums.total / sums.count
    covariance = sums.moment / sums.count - mean.mT @ mean
    expected = torch.stack([head.double().T.cov(correction=0) for head in raw])
    # un-rotating in float32 is off by 1e-7 of the mean
    torch.testing.assert_close(covariance, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [100, 1000])
def test_the_state_does_not_grow_with_the_prompt(num_tokens):
    policy, layer = ExpectedAttention(), make_llama_layer(num_tokens, seed=0)
    state = layer.inputs(policy, chunks=[64]).state
    assert state.count == num_tokens - 4
    assert state.total.untyped_storage().nbytes() == 8 * NUM_HEADS * HEAD_SIZE
    assert state.moment.untyped_storage().nbytes() == 8 * NUM_HEADS * HEAD_SIZE**2
    assert policy.state_bytes(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE) == 0


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 7])
def test_tiny_prompts(num_tokens):
    policy = ExpectedAttention()
    scores = policy.score(make_llama_layer(num_tokens, seed=0).inputs(policy, chunks=[1]))
    assert scores.shape == (NUM_KV_HEADS, num_tokens)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("num_future_positions", 0, "a whole number of at least 1"),
        ("num_future_positions", 512.0, "a whole number of at least 1"),
        ("num_sink", -1, "a whole number of at least 0"),
        ("num_sink", True, "a whole number of at least 0"),
        ("use_covariance", 1, "true or false"),
        ("use_vnorm", None, "true or false"),
        ("epsilon", -0.1, "a number of at least 0"),
        ("epsilon", float("inf"), "a number of at least 0"),
        ("epsilon", "0", "a number of at least 0"),
    ],
)
def test_wrong_options_are_refused(option, value, expected):
    with pytest.raises(ValueError, match=rf"expected_attention\.{option}: expected {expected}, got {value!r}"):
        ExpectedAttention(**{option: value})


def test_what_it_asks_the_engine_for():
    policy = ExpectedAttention(num_sink=9)
    assert (policy.num_sink, policy.num_recent, policy.query_window) == (9, 0, 0)
    assert not policy.query_aware
    assert policy.layers_at_once == 1, "layers may differ in their rotary table"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
class TestAgainstKvpress:
    def layer(self, num_tokens, seed):
        layer = make_llama_layer(num_tokens, seed)
        layer.module.rotary_emb = LlamaRotaryEmbedding(tiny_llama_config())  # as kvpress's hooks do
        return layer

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_covariance": False},
            {"use_vnorm": False},
            {"epsilon": 0.02, "num_sink": 7, "num_future_positions": 99},
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_scores(self, kvpress, num_tokens, seed, options):
        policy, layer = ExpectedAttention(**options), self.layer(num_tokens, seed)
        press = kvpress.ExpectedAttentionPress(**{THEIR_NAMES.get(name, name): options[name] for name in options})
        theirs = press.score(*layer.press_arguments())[0]
        scores = policy.score(make_inputs(layer, policy, chunks=[64]))
        torch.testing.assert_close(scores[:, policy.num_sink :], theirs[:, policy.num_sink :], **TOLERANCE)

    @pytest.mark.parametrize("budget", [66, 96, 0.5, 0.75])
    @torch.no_grad()
    def test_kept_tokens(self, kvpress, num_tokens, seed, budget):
        """What is left in our pages after a whole eviction is what kvpress's ``compress`` returns, token by token."""
        plan = plan_eviction(num_tokens, budget, BLOCK_SIZE, 4)
        policy, layer = ExpectedAttention(), self.layer(num_tokens, seed)
        # values that say which token they belong to, and whose norms differ little
        marks = torch.arange(num_tokens).float()[:, None].expand_as(layer.values)
        layer = replace(layer, values=marks + 1000)
        press = kvpress.ExpectedAttentionPress(1 - (plan.num_kept_tokens + 0.5) / num_tokens)
        scores = press.score(*layer.press_arguments())[0].sort(descending=True).values
        at_cut = scores[:, plan.num_kept_tokens - 1] - scores[:, plan.num_kept_tokens]
        assert (at_cut > 1e-5 * scores[:, plan.num_kept_tokens]).all(), "a tie at the cut: either choice would be right"
        theirs = press.compress(*layer.press_arguments())[1][0, :, :, 0].sort().values

        inputs = make_inputs(layer, policy, chunks=[64])
        cache, block_ids = layer.cache()
        eviction = Eviction(Method(policy, Uniform(), policy.num_sink, policy.num_recent), plan, cache.pool, block_ids)
        eviction.score_layer(0, inputs.query, inputs.scale, None, inputs.weights, inputs.state)
        compaction = eviction.finish()
        for head, pages in enumerate(compaction.page_table[0]):
            kept = cache.read(pages, int(kv_lens_of(compaction, plan)[0, head]))[1][:, 0].sort().values
            assert kept.tolist() == theirs[head].tolist()


def test_logits_of_a_long_prompt_are_computed_twice(monkeypatch):
    """Rather than held; the scores are the same, bit by bit."""
    policy, layer = ExpectedAttention(), make_llama_layer(1500, seed=0)
    inputs = make_inputs(layer, policy, [700])
    found, logits = [], ExpectedAttention._logits

    def recorded(self, batch, heads, mean, covariance, start, end):
        found.append((start, end))
        return logits(self, batch, heads, mean, covariance, start, end)

    monkeypatch.setattr(ExpectedAttention, "_logits", recorded)
    expected = policy.score(inputs)
    tiles = [(4, 1028), (1028, 1500)]
    assert found == tiles
    of_head = _bytes_of_head(ScoreInputs.together([inputs])) + 4 * 1500 * NUM_HEADS // NUM_KV_HEADS
    for num_bytes, num_visits in ((of_head, 1), (of_head - 1, 2)):
        found.clear()
        monkeypatch.setattr(scratch, "_most_bytes", num_bytes)
        assert policy.score(inputs).equal(expected)
        assert found == NUM_KV_HEADS * num_visits * tiles
