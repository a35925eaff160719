"""TOVA against kvpress's own implementation, and against a dense formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.compactions import kv_lens_of
from tests.llama_layer import make_llama_layer
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.plan import plan_eviction
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.policies.tova import Tova

BLOCK_SIZE = 32


def dense(layer):
    """[num_tokens] float64, attention of the last query, one query head after the other."""
    group = layer.query.shape[1] // len(layer.keys)
    heads = [
        (layer.keys[head // group].double() @ query.double() * layer.module.scaling).softmax(0)
        for head, query in enumerate(layer.query[-1])
    ]
    return sum(heads) / len(heads)


@pytest.mark.parametrize("num_tokens", [2, 31, 130, 1000])
@torch.no_grad()
def test_equals_the_formula(num_tokens):
    layer = make_llama_layer(num_tokens, 0)
    scores = Tova().score(layer.inputs(Tova()))
    expected = dense(layer)[:-1].float().expand(2, -1)
    # logits of a few tens in float32 are off by some 1e-6, which the exponential makes relative
    torch.testing.assert_close(scores[:, :-1], expected, rtol=2e-5, atol=1e-9)


@torch.no_grad()
def test_all_heads_rank_alike_and_the_last_token_ranks_first():
    scores = Tova().score(make_llama_layer(300, 1).inputs(Tova()))
    assert scores[0].equal(scores[1])
    assert (scores[:, -1:] >= scores).all()


def test_what_it_asks_the_engine_for():
    policy = Tova()
    assert (policy.query_window, policy.num_sink, policy.num_recent, policy.query_aware) == (1, 0, 1, True)
    assert not policy.needs


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [130, 333, 1000])
class TestAgainstKvpress:
    @pytest.mark.parametrize("attentions", [False, True])
    @torch.no_grad()
    def test_scores(self, kvpress, num_tokens, seed, attentions):
        layer = make_llama_layer(num_tokens, seed)
        theirs = kvpress.TOVAPress(0.5).score(*layer.press_arguments(attentions))[0, :, :-1]
        torch.testing.assert_close(Tova().score(layer.inputs(Tova()))[:, :-1], theirs, rtol=1e-4, atol=1e-9)

    @pytest.mark.parametrize("budget", [34, 96, 0.5, 0.75])
    @torch.no_grad()
    def test_kept_tokens(self, kvpress, num_tokens, seed, budget):
        """What is left in our pages after a whole eviction is what kvpress's ``compress`` returns, token by token."""
        plan = plan_eviction(num_tokens, budget, BLOCK_SIZE, 1)
        assert plan is not None
        layer = make_llama_layer(num_tokens, seed)
        # values that say which token they belong to
        layer = replace(layer, values=torch.arange(num_tokens).float()[:, None].expand_as(layer.values))
        press = kvpress.TOVAPress(1 - (plan.num_kept_tokens + 0.5) / num_tokens)
        scores = press.score(*layer.press_arguments())[0].sort(descending=True).values
        at_cut = scores[:, plan.num_kept_tokens - 1] - scores[:, plan.num_kept_tokens]
        assert (at_cut > 1e-5 * scores[:, plan.num_kept_tokens]).all(), "a tie at the cut: either choice would be right"
        theirs = press.compress(*layer.press_arguments())[1][0, :, :, 0].sort().values

        cache, block_ids = layer.cache()
        eviction = Eviction(Method(Tova(), Uniform(), 0, 1), plan, cache.pool, block_ids)
        eviction.score_layer(0, layer.query[-1:].contiguous(), layer.module.scaling)
        compaction = eviction.finish()
        for head, pages in enumerate(compaction.page_table[0]):
            kept = cache.read(pages, int(kv_lens_of(compaction, plan)[0, head]))[1][:, 0].sort().values
            assert kept.tolist() == theirs[head].tolist()
