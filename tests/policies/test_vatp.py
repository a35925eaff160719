"""VATP against a dense formula in float64, and against kvpress's SnapKV times the value norms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.llama_layer import make_llama_layer
from vllm_kvevict.policies.snapkv import SnapKV
from vllm_kvevict.policies.vatp import Vatp

# Means of float32 probabilities whose logits, a few tens, are off by some 1e-6: the exponential makes that relative.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-9}


def pooled(scores, pool, width):
    """Slide a centred window of ``width`` tokens over a row; past its edges there is nothing."""
    half = width // 2
    around = [scores[max(token - half, 0) : token + half + 1] for token in range(len(scores))]
    return torch.stack([one.amax() if pool == "max" else one.sum() / width for one in around])


def dense(policy, layer):
    """[num_kv_heads, num_tokens - window] float64, one query head after the other."""
    before, group = layer.num_tokens - policy.window, layer.query.shape[1] // len(layer.keys)
    hidden = torch.ones(policy.window, layer.num_tokens, dtype=torch.bool).triu(before + 1)
    scores = torch.zeros(len(layer.keys), before, dtype=torch.float64)
    for head in range(layer.query.shape[1]):
        logits = layer.query[before:, head].double() @ layer.keys[head // group].double().T * layer.module.scaling
        attention = logits.masked_fill(hidden, float("-inf")).softmax(1).mean(0)[:before]
        scores[head // group] += attention / group
    norms = torch.tensor([[float(value.double().abs().sum()) for value in head[:before]] for head in layer.values])
    return torch.stack([pooled(row, policy.pool, policy.pool_kernel) for row in scores]) * norms


@pytest.mark.parametrize("num_tokens", [33, 130, 1100])
@pytest.mark.parametrize("pool, pool_kernel", [("max", 7), ("avg", 5), ("max", 1)])
@torch.no_grad()
def test_equals_the_formula(num_tokens, pool, pool_kernel):
    layer, policy = make_llama_layer(num_tokens, 0), Vatp(pool=pool, pool_kernel=pool_kernel)
    scores = policy.score(layer.inputs(policy))
    torch.testing.assert_close(scores[:, :-32], dense(policy, layer).float(), **TOLERANCE)
    assert scores[:, -32:].amin() >= scores[:, :-32].amax()


@torch.no_grad()
def test_a_token_without_a_value_is_worth_nothing_whatever_attends_to_it():
    layer, policy = make_llama_layer(300, 1), Vatp()
    token = int(SnapKV(pool_kernel=1).score(layer.inputs(SnapKV()))[:, :-32].sum(0).argmax())
    values = layer.values.clone()
    values[:, token] = 0
    assert (policy.score(layer.inputs(policy))[:, token] > 0).all()
    assert (policy.score(replace(layer, values=values).inputs(policy))[:, token] == 0).all()


@torch.no_grad()
def test_with_equal_values_it_ranks_like_snapkv():
    layer = make_llama_layer(300, 1)
    layer = replace(layer, values=torch.full_like(layer.values, -0.25))
    plain = SnapKV().score(layer.inputs(SnapKV()))[:, :-32]
    torch.testing.assert_close(Vatp().score(layer.inputs(Vatp()))[:, :-32], plain * 8, rtol=1e-6, atol=0)


def test_what_it_asks_the_engine_for():
    policy = Vatp(window=64)
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.query_aware) == (64, 20, 64, True)
    assert not policy.needs
    assert Vatp(num_sink=0).num_sink == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, r"vatp\.window: expected a whole number of at least 1, got 0"),
        ({"pool_kernel": 4}, r"vatp\.pool_kernel: expected an odd number of at least 1, got 4"),
        ({"pool": "min"}, r"vatp\.pool: expected 'max' or 'avg', got 'min'"),
        ({"num_sink": -1}, r"vatp\.num_sink: expected a whole number of at least 0, got -1"),
        ({"num_sink": True}, r"vatp\.num_sink: expected a whole number of at least 0, got True"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Vatp(**options)


@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
@torch.no_grad()
def test_equals_kvpress_with_norms(kvpress, num_tokens):
    """kvpress has no VATP, but it has the host, whose score VATP multiplies."""
    layer, policy = make_llama_layer(num_tokens, 0), Vatp(window=64, pool="avg", pool_kernel=5)
    host = kvpress.SnapKVPress(0.5, window_size=64, kernel_size=5).score(*layer.press_arguments())[0]
    theirs = (host * layer.values.norm(p=1, dim=-1))[:, :-64]
    torch.testing.assert_close(policy.score(layer.inputs(policy))[:, :-64], theirs, rtol=1e-4, atol=1e-9)
