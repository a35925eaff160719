"""The deferred lookahead against a dense formula in float64: the answer's queries, the prompt's keys."""

from __future__ import annotations

import pytest
import torch

from tests.llama_layer import make_llama_layer
from vllm_kvevict.policies.laq_deferred import LookaheadDeferred


def dense(layer, policy):
    """[num_kv_heads, num_judged] float64, one query and one query head after the other."""
    num_kv_heads, num_tokens = layer.keys.shape[:2]
    num_keys = num_tokens - policy.num_lookahead
    group = layer.query.shape[1] // num_kv_heads
    sums = torch.zeros(num_kv_heads, num_keys, dtype=torch.float64)
    for position in range(num_keys - policy.window, num_tokens):
        for head in range(layer.query.shape[1]):
            keys = layer.keys[head // group, : min(position + 1, num_keys)].double()
            logits = keys @ layer.query[position - num_tokens, head].double() * layer.module.scaling
            sums[head // group, : len(keys)] += logits.softmax(0) / group
    judged = sums[:, : num_keys - policy.window]
    half = policy.pool_kernel // 2
    neighbours = [judged[:, max(0, token - half) : token + half + 1].amax(1) for token in range(judged.shape[1])]
    return torch.stack(neighbours, dim=1)


@pytest.mark.parametrize(("window", "num_lookahead", "pool_kernel"), [(0, 8, 7), (8, 8, 7), (3, 1, 1), (0, 40, 3)])
@pytest.mark.parametrize("num_tokens", [60, 333, 1060])
@torch.no_grad()
def test_equals_the_formula(window, num_lookahead, pool_kernel, num_tokens):
    policy = LookaheadDeferred(window=window, num_lookahead=num_lookahead, pool_kernel=pool_kernel)
    layer = make_llama_layer(num_tokens, 0)
    scores = policy.score(layer.inputs(policy))
    judged = num_tokens - policy.query_window
    assert scores.shape == (2, num_tokens)
    torch.testing.assert_close(scores[:, :judged], dense(layer, policy).float(), rtol=2e-5, atol=1e-9)
    assert (scores[:, judged:] == scores.amax()).all()


@pytest.mark.parametrize("num_tokens", [8, 15, 16])
@torch.no_grad()
def test_nothing_is_judged_if_every_token_observes(num_tokens):
    policy = LookaheadDeferred(window=8)
    layer = make_llama_layer(num_tokens, 0)
    assert not policy.score(layer.inputs(policy)).any()


def test_what_it_asks_the_engine_for():
    policy = LookaheadDeferred(window=8)
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.num_deferred) == (16, 0, 16, 8)
    assert policy.query_aware
    assert not policy.needs
    assert not policy.evicts_during_decode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "laq_deferred.window: expected a whole number of at least 0, got -1"),
        ({"num_lookahead": 0}, "laq_deferred.num_lookahead: expected a whole number of at least 1, got 0"),
        ({"pool_kernel": 2}, "laq_deferred.pool_kernel: expected an odd number of at least 1, got 2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match="laq_deferred") as error:
        LookaheadDeferred(**options)
    assert str(error.value) == message
