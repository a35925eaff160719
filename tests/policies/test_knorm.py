"""Knorm against the norm, one token after the other in float64, and against kvpress."""

import math
from dataclasses import replace

import pytest
import torch

from tests.llama_layer import kept_by, kept_by_press, make_llama_layer
from vllm_kvevict.policies.knorm import Knorm


def formula(keys):
    """-||k||_2 [num_kv_heads, num_tokens] float64, one token after the other."""
    return torch.tensor([[-math.sqrt(sum(x * x for x in key)) for key in head.tolist()] for head in keys])


@pytest.mark.parametrize("num_tokens", [1, 130, 1024, 1025, 2050])  # tiles hold 1,024 tokens
def test_equals_the_formula(num_tokens):
    layer = make_llama_layer(num_tokens, 0)
    scores = Knorm().score(layer.inputs(Knorm()))
    # float32, another order of sums; cosines are near 0 for some tokens
    torch.testing.assert_close(scores, formula(layer.keys).float(), rtol=1e-5, atol=1e-6)


def test_short_keys_stay():
    layer = make_llama_layer(130, 0)
    keys = layer.keys.clone()
    keys[:, [3, 77]] *= 1e-3
    assert kept_by(Knorm(), replace(layer, keys=keys), 2).tolist() == [[3, 77], [3, 77]]


def test_rotating_the_keys_changes_nothing():
    layer = make_llama_layer(333, 0)
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    turned = replace(layer, keys=layer.keys @ turn)
    expected = Knorm().score(layer.inputs(Knorm()))
    torch.testing.assert_close(Knorm().score(turned.inputs(Knorm())), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
class TestAgainstKvpress:
    @torch.no_grad()
    def test_scores(self, kvpress, num_tokens, seed):
        layer = make_llama_layer(num_tokens, seed)
        theirs = kvpress.KnormPress(0.5).score(*layer.press_arguments())[0]
        torch.testing.assert_close(Knorm().score(layer.inputs(Knorm())), theirs, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
    @torch.no_grad()
    def test_kept_tokens(self, kvpress, num_tokens, seed, ratio):
        layer = make_llama_layer(num_tokens, seed)
        theirs = kept_by_press(kvpress.KnormPress(ratio), layer)
        assert kept_by(Knorm(), layer, theirs.shape[1]).equal(theirs)


def test_it_takes_no_options():
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Knorm(window=32)


def test_what_it_asks_the_engine_for():
    policy = Knorm()
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.needs) == (0, 0, 0, frozenset())
    assert not policy.query_aware
