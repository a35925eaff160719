"""MorphKV, both of its public algorithms, against dense formulas in float64; and what it shares with TOVA."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.llama_layer import make_llama_layer
from vllm_kvevict.policies.morphkv import MorphKV
from vllm_kvevict.policies.tova import Tova


def dense(layer, policy):
    """[num_kv_heads, num_older] float64, one query and one query head after the other."""
    num_kv_heads, num_tokens = layer.keys.shape[:2]
    group, window = layer.query.shape[1] // num_kv_heads, min(policy.window, len(layer.query))
    num_older = num_tokens - window
    keys, queries, scale = layer.keys.double(), layer.query[-window:].double(), layer.module.scaling
    rows = torch.empty(window, num_kv_heads, group, num_older, dtype=torch.float64)
    for index, kv_head in itertools.product(range(window), range(num_kv_heads)):
        num_seen = num_older if policy.denominator == "older" else num_older + index + 1
        logits = torch.stack(
            [keys[kv_head] @ queries[index, kv_head * group + member] * scale for member in range(group)]
        )[:, :num_seen]
        if policy.variant == "logits":
            logits = logits.sum(dim=0, keepdim=True).expand(group, -1)
        rows[index, kv_head] = logits.softmax(-1)[:, :num_older]
    if policy.group == "layer":
        rows = rows.mean(dim=(1, 2), keepdim=True).expand(-1, num_kv_heads, group, -1)
    of_heads = rows.amax(dim=2) if policy.group == "max" else rows.mean(dim=2)
    return of_heads.sum(dim=0) if policy.fusion == "sum" else of_heads.amax(dim=0)


@pytest.mark.parametrize("denominator", ["older", "all"])
@pytest.mark.parametrize("group", ["max", "mean", "layer"])
@pytest.mark.parametrize("variant", ["probabilities", "logits"])
@pytest.mark.parametrize("fusion", ["sum", "max"])
@pytest.mark.parametrize(("window", "num_tokens"), [(1, 40), (8, 333), (40, 1025), (32, 1056), (33, 2100)])
@torch.no_grad()
def test_equals_the_formula(window, num_tokens, fusion, variant, group, denominator):
    policy = MorphKV(window, fusion, variant, group, denominator)
    layer = make_llama_layer(num_tokens, window)
    scores = policy.score(layer.inputs(policy))
    assert scores.shape == (2, num_tokens)
    assert scores.isfinite().all()
    # sums of logits over a group are larger, and so are their rounding errors
    tolerance = 2e-5 if variant == "probabilities" else 1e-4
    torch.testing.assert_close(scores[:, :-window], dense(layer, policy).float(), rtol=tolerance, atol=1e-9)
    assert (scores[:, -window:] == scores.amax()).all()


@pytest.mark.parametrize("num_tokens", [2, 130, 1500])
@torch.no_grad()
def test_one_query_and_the_mean_of_all_heads_is_tova(num_tokens):
    policy = MorphKV(window=1, group="layer", denominator="all")
    layer = make_llama_layer(num_tokens, 0)
    expected = Tova().score(layer.inputs(Tova()))
    torch.testing.assert_close(policy.score(layer.inputs(policy)), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("num_tokens", [1, 7, 32])
@torch.no_grad()
def test_nothing_is_judged_if_every_token_observes(num_tokens):
    layer = make_llama_layer(num_tokens, 0)
    assert not MorphKV().score(layer.inputs(MorphKV())).any()


def test_what_it_asks_the_engine_for():
    policy = MorphKV(window=9)
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.query_aware) == (9, 0, 9, True)
    assert policy.evicts_during_decode
    assert policy.supports_decode
    assert not policy.needs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "morphkv.window: expected a whole number of at least 1, got 0"),
        ({"window": 2.5}, "morphkv.window: expected a whole number of at least 1, got 2.5"),
        ({"fusion": "mean"}, "morphkv.fusion: expected 'sum' or 'max', got 'mean'"),
        ({"variant": "both"}, "morphkv.variant: expected 'probabilities' or 'logits', got 'both'"),
        ({"group": "sum"}, "morphkv.group: expected 'max', 'mean' or 'layer', got 'sum'"),
        ({"denominator": "none"}, "morphkv.denominator: expected 'older' or 'all', got 'none'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match="morphkv") as error:
        MorphKV(**options)
    assert str(error.value) == message
