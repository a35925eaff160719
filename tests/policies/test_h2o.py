"""H2O against kvpress's own implementation and against a dense formula, however the prompt is cut into chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.llama_layer import make_llama_layer
from vllm_kvevict.policies import Need, h2o
from vllm_kvevict.policies.h2o import H2O

# Sums of float32 probabilities whose logits, a few tens, are off by some 1e-6: the exponential makes that relative.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-9}
CHUNKS = {"64": [64], "256": [256], "1000": [1000], "whole": [], "uneven": [1, 300, 7, 257]}


@pytest.fixture(scope="module")
def layer():
    return make_llama_layer(1300, 3)


def dense(layer, normalize):
    """[num_kv_heads, num_tokens] float64, one query head after the other, each with its own matrix."""
    num_tokens, num_heads, _ = layer.query.shape
    group = num_heads // len(layer.keys)
    hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    scores = torch.zeros(len(layer.keys), num_tokens, dtype=torch.float64)
    for head in range(num_heads):
        logits = layer.query[:, head].double() @ layer.keys[head // group].double().T * layer.module.scaling
        scores[head // group] += logits.masked_fill(hidden, float("-inf")).softmax(1).sum(0) / group
    return scores / torch.arange(num_tokens, 0, -1) if normalize else scores


def kept(scores, num_kept):
    """The highest of each head, none of which ties with the next one."""
    ranked = scores.sort(descending=True)
    last, first_out = ranked.values[:, num_kept - 1], ranked.values[:, num_kept]
    assert (last - first_out > 1e-5 * last).all(), "a tie at the cut: either choice would be right"
    return ranked.indices[:, :num_kept].sort().values


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@torch.no_grad()
def test_equals_the_formula_in_any_chunks(layer, chunks, normalize):
    policy = H2O(normalize=normalize)
    expected = dense(layer, normalize)
    scores = policy.score(layer.inputs(policy, chunks))
    torch.testing.assert_close(scores, expected.float(), **TOLERANCE)
    for num_kept in (100, 400, 1000):
        assert kept(scores, num_kept).equal(kept(expected, num_kept))


@torch.no_grad()
def test_every_query_hands_out_one(layer):
    sums = H2O().score(layer.inputs(H2O(), [100])).double().sum(1)
    torch.testing.assert_close(sums, torch.full((2,), 1300.0, dtype=torch.float64), rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_chunk_is_looked_at_in_one_go(layer, monkeypatch):
    seen = []

    def record(batch, sums):
        seen.append((len(batch.query), sums.shape[1]))

    monkeypatch.setattr(h2o, "streaming_sums", record)
    layer.inputs(H2O(), [700, 600])
    assert seen == [(700, 700), (600, 1300)]


@torch.no_grad()
def test_an_earlier_state_is_not_changed(layer):
    policy = H2O()
    inputs = layer.inputs(policy, [650])
    state = torch.ones(2, 1200)
    policy.observe(state, replace(inputs, query=layer.query[1200:]))
    assert state.equal(torch.ones(2, 1200))


@torch.no_grad()
def test_state_is_as_large_as_it_says(layer):
    policy = H2O()
    state = layer.inputs(policy, [500]).state
    assert state.untyped_storage().nbytes() == 1300 * policy.state_bytes(8, 2, 32)


def test_what_it_asks_the_engine_for():
    policy = H2O()
    assert policy.needs == {Need.ALL_QUERIES}
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.query_aware) == (0, 0, 32, False)
    assert H2O(num_recent=0).num_recent == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"normalize": 1}, r"h2o\.normalize: expected true or false, got 1"),
        ({"normalize": "yes"}, r"h2o\.normalize: expected true or false, got 'yes'"),
        ({"num_recent": -1}, r"h2o\.num_recent: expected a whole number of at least 0, got -1"),
        ({"num_recent": 32.0}, r"h2o\.num_recent: expected a whole number of at least 0, got 32\.0"),
        ({"num_recent": True}, r"h2o\.num_recent: expected a whole number of at least 0, got True"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        H2O(**options)


@pytest.mark.parametrize("chunks", [[], [64], [256]], ids=["whole", "64", "256"])
@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
@torch.no_grad()
def test_equals_kvpress(kvpress, num_tokens, chunks):
    layer, policy = make_llama_layer(num_tokens, 0), H2O(normalize=True)
    theirs = kvpress.ObservedAttentionPress(0.5).score(*layer.press_arguments(attentions=True))[0]
    ours = policy.score(layer.inputs(policy, chunks))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)
    for fraction in (0.1, 0.5, 0.8):
        assert kept(ours, int(num_tokens * fraction)).equal(kept(theirs, int(num_tokens * fraction)))
