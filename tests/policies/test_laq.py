"""Lookahead Q-Cache against a dense formula in float64: pseudo tokens behind the prompt, and SnapKV without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.llama_layer import LlamaLayer, make_llama_layer
from vllm_kvevict.eviction.selection import protect, select
from vllm_kvevict.policies import POLICIES, ScoreInputs
from vllm_kvevict.policies.laq import LookaheadQCache, LookaheadQCachePlus
from vllm_kvevict.policies.snapkv import SnapKV

NUM_PSEUDO = 8


def inputs_of(layer: LlamaLayer, policy: LookaheadQCache) -> ScoreInputs:
    """The layer's last eight tokens stand for pseudo tokens: the cache ends before them."""
    num_tokens = layer.num_tokens - NUM_PSEUDO
    prompt = replace(
        layer, query=layer.query[:num_tokens], keys=layer.keys[:, :num_tokens], values=layer.values[:, :num_tokens]
    )
    return replace(prompt.inputs(policy), pseudo_query=layer.query[num_tokens:])


def dense(layer: LlamaLayer, policy: LookaheadQCache) -> torch.Tensor:
    """[num_kv_heads, num_judged] float64, one query and one query head after the other."""
    num_kv_heads, num_keys = len(layer.keys), layer.num_tokens - NUM_PSEUDO
    group = layer.query.shape[1] // num_kv_heads
    sums = torch.zeros(num_kv_heads, num_keys, dtype=torch.float64)
    for position in range(num_keys - policy.window, layer.num_tokens):
        num_seen = min(position + 1, num_keys)
        if policy.misplaced_mask:
            num_seen = position + 1 - NUM_PSEUDO
        for head in range(layer.query.shape[1]):
            keys = layer.keys[head // group, :num_seen].double()
            logits = keys @ layer.query[position, head].double() * layer.module.scaling
            sums[head // group, :num_seen] += logits.softmax(0) / group
    judged = sums[:, : num_keys - policy.window]
    half = policy.pool_kernel // 2
    neighbours = [judged[:, max(0, token - half) : token + half + 1].amax(1) for token in range(judged.shape[1])]
    return torch.stack(neighbours, dim=1)


@pytest.mark.parametrize("misplaced_mask", [False, True])
@pytest.mark.parametrize(("window", "pool_kernel"), [(0, 7), (8, 7), (3, 1)])
@pytest.mark.parametrize("num_tokens", [60, 333, 1060])
@torch.no_grad()
def test_equals_the_formula(num_tokens: int, window: int, pool_kernel: int, misplaced_mask: bool) -> None:
    policy = LookaheadQCache(window=window, pool_kernel=pool_kernel, misplaced_mask=misplaced_mask)
    layer = make_llama_layer(num_tokens + NUM_PSEUDO, 0)
    scores = policy.score(inputs_of(layer, policy))
    assert scores.shape == (2, num_tokens)
    judged = num_tokens - window
    torch.testing.assert_close(scores[:, :judged], dense(layer, policy).float(), rtol=2e-5, atol=1e-9)
    assert (scores[:, judged:] == scores.amax()).all()


@pytest.mark.parametrize("num_tokens", [40, 333, 1060])
@torch.no_grad()
def test_without_pseudo_tokens_it_is_snapkv(num_tokens: int) -> None:
    layer, num_kept = make_llama_layer(num_tokens, 1), torch.full((1, 2), num_tokens // 2 + 16)
    kept = []
    for policy in (LookaheadQCache(num_lookahead=0, window=32), SnapKV()):
        scores = policy.score(layer.inputs(policy))
        kept.append(select(protect(scores[None], policy.num_sink, policy.num_recent), num_kept))
    assert kept[0].equal(kept[1])


@pytest.mark.parametrize(("capacity", "num_kept", "expected"), [(None, 100, 100), (64, 100, 64), (None, 8, 32)])
@torch.no_grad()
def test_pseudo_tokens_see_what_snapkv_keeps(capacity: int | None, num_kept: int, expected: int) -> None:
    layer, policy = make_llama_layer(400, 2), LookaheadQCache(capacity=capacity)
    tokens = policy.preselect(replace(layer.inputs(policy), num_kept=num_kept)).sort(dim=1).values
    assert tokens.shape == (2, expected)
    assert tokens[:, -32:].equal(torch.arange(368, 400).expand(2, -1))
    snapkv = SnapKV()
    scores = snapkv.score(layer.inputs(snapkv))
    best = scores[:, :368].sort(dim=1, descending=True).values[:, : expected - 32]
    chosen = scores.gather(1, tokens[:, :-32]).sort(dim=1, descending=True).values
    assert chosen.equal(best)


@torch.no_grad()
def test_prompts_shorter_than_the_windows() -> None:
    policy = LookaheadQCache(window=16)
    layer = make_llama_layer(10 + NUM_PSEUDO, 0)
    inputs = inputs_of(layer, policy)
    assert policy.preselect(inputs).sort(dim=1).values.equal(torch.arange(10).expand(2, -1))
    assert not policy.score(inputs).any()


@torch.no_grad()
def test_a_query_that_the_misplaced_mask_leaves_nothing_pays_nothing() -> None:
    """Of eight pseudo tokens the last five stand on the five tokens of the prompt."""
    policy = LookaheadQCache(pool_kernel=1, misplaced_mask=True)
    layer = make_llama_layer(5 + NUM_PSEUDO, 0)
    scores = policy.score(inputs_of(layer, policy))
    torch.testing.assert_close(scores.sum(dim=1), torch.full((2,), 5.0))


@torch.no_grad()
def test_without_queries_no_token_is_better_than_another() -> None:
    policy = LookaheadQCache()
    inputs = replace(inputs_of(make_llama_layer(60, 0), policy), pseudo_query=None)
    assert policy.score(inputs).equal(torch.zeros(2, 60 - NUM_PSEUDO))


def test_what_they_ask_the_engine_for() -> None:
    for policy, window in ((LookaheadQCache(), 0), (LookaheadQCachePlus(), 8)):
        assert (policy.query_window, policy.num_recent, policy.num_pseudo_tokens) == (32, window, 8)
        assert not policy.needs
        assert not policy.supports_decode
    assert LookaheadQCache(num_lookahead=0, window=48).query_window == 48
    assert POLICIES.get("laq++") is LookaheadQCachePlus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "laq.window: expected a whole number of at least 0, got -1"),
        ({"num_lookahead": 0}, "laq.num_lookahead: expected a whole number of at least 1 with a window of 0, got 0"),
        ({"first_window": 0}, "laq.first_window: expected a whole number of at least 1, got 0"),
        ({"capacity": 16}, "laq.capacity: expected at least 32 tokens (first_window), got 16"),
        ({"misplaced_mask": 1}, "laq.misplaced_mask: expected true or false, got 1"),
        ({"pool_kernel": 2}, "laq.pool_kernel: expected an odd number of at least 1, got 2"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="laq") as error:
        LookaheadQCache(**options)  # type: ignore[arg-type]
    assert str(error.value) == message
