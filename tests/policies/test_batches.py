"""Heads that hold different numbers of tokens, scored in one call: each gets what it gets alone, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from unittest.mock import patch

import pytest
import torch

from vllm_kvevict.kernels.window_batch import Reduction
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.attention import attention_tiles
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.chunkkv import ChunkKV
from vllm_kvevict.policies.criticalkv import CriticalKV
from vllm_kvevict.policies.curdkv import CurDKV
from vllm_kvevict.policies.inputs import LayerWeights, ScoreInputs
from vllm_kvevict.policies.keydiff import KeyDiff
from vllm_kvevict.policies.knorm import Knorm
from vllm_kvevict.policies.laq_deferred import LookaheadDeferred
from vllm_kvevict.policies.obcache import OBCacheJoint, OBCacheKey, OBCacheValue
from vllm_kvevict.policies.snapkv import SnapKV
from vllm_kvevict.policies.stretches import products
from vllm_kvevict.policies.tova import Tova

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, KV_HEADS, GROUP, HEAD_SIZE, BLOCK, SCALE = 2, 6, 5, 16, 16, 0.25
SOFTCAP = 2.0
# of each request, by KV head: a chunk has 20 tokens, a tile 1,024
LENGTHS = [(7, 19, 7, 300, 300, 7), (333,) * KV_HEADS, (45, 1100, 45, 1100, 1100, 1100), (16,) * KV_HEADS]
POLICIES = [
    Knorm(),
    KeyDiff(),
    Tova(),
    CurDKV(),
    CurDKV(local_window=100, combine="value"),
    CurDKV(local_window=1500, combine="mean", projection_rank=20),
    CurDKV(measure="leverage", projection_rank=20, local_window=0),
    CurDKV(measure="leverage", combine="key"),
    ChunkKV("knorm"),
    ChunkKV("tova", chunk_length=1),
    ChunkKV(chunk_length=1050),
    CriticalKV(),
    CriticalKV("tova", first_stage_ratio=1.0),
    CriticalKV("chunkkv", {"policy": "keydiff"}, first_stage_ratio=0.0),
    LookaheadDeferred(window=0),
    LookaheadDeferred(window=8, pool_kernel=41),
    OBCacheValue(),
    OBCacheKey(group="pre", pool="avg"),
    OBCacheJoint(),
    OBCacheJoint(window=5, group="max", pool_kernel=1),
    CriticalKV("obcache_v"),
]


def batch_of(policy, lengths, transposed):
    """Layers hold what their KV heads say, the second one in the other order. What nobody holds is NaN."""
    generator = torch.Generator().manual_seed(0)
    kv_lens = torch.tensor([[of_request, of_request[::-1]] for of_request in lengths])
    max_pages = -(-max(map(max, lengths)) // BLOCK)
    num_pages = kv_lens.numel() * max_pages + 1
    page_table = torch.randperm(num_pages - 1, generator=generator).view(*kv_lens.shape, max_pages) + 1
    is_held = torch.arange(max_pages * BLOCK) < kv_lens[..., None]
    pages = []
    for _ in range(2):
        stored = torch.full((num_pages, HEAD_SIZE, BLOCK), float("nan")).transpose(1, 2)
        stored = stored if transposed else stored.contiguous()
        tokens = torch.randn(*is_held.shape, HEAD_SIZE, generator=generator)
        tokens = tokens.masked_fill(~is_held[..., None], float("nan"))
        stored[page_table] = tokens.unflatten(3, (max_pages, BLOCK))
        pages.append(stored)
    shape = len(lengths), LAYERS, policy.query_window, KV_HEADS * GROUP, HEAD_SIZE
    query, output = torch.randn(2, *shape, generator=generator)
    projections = torch.randn(LAYERS, 24, KV_HEADS * GROUP * HEAD_SIZE, generator=generator)
    return ScoreBatch(
        query,
        pages[0],
        lambda: pages[1],
        page_table,
        kv_lens,
        max_pages * BLOCK,
        SCALE,
        layers=range(LAYERS),
        projections=list(projections),
        num_kept=kv_lens // 2,
        output=output if Need.OUTPUTS in policy.needs else None,
        softcap=SOFTCAP,
        sinks=torch.randn(LAYERS, KV_HEADS * GROUP, generator=generator) * 3,
    )


def request_of(batch, req):
    only, max_kv_len = slice(req, req + 1), int(batch.kv_lens[req].max())
    return replace(
        batch,
        query=batch.query[only],
        page_table=batch.page_table[only],
        kv_lens=batch.kv_lens[only],
        max_kv_len=max_kv_len,
        num_kept=batch.num_kept[only],
        output=None if batch.output is None else batch.output[only],
    )


def of_heads(queries, heads):
    return queries.unflatten(1, (KV_HEADS, GROUP))[:, heads].flatten(1, 2)


def peers(batch, req, layer):
    """Yield the inputs of those heads of a layer that hold as many tokens, and which these are."""
    kv_lens = batch.kv_lens[req, layer]
    for kv_len in kv_lens.unique().tolist():
        heads = (kv_lens == kv_len).nonzero()[:, 0]
        weights = LayerWeights(output_projection=batch.projections[layer], softcap=SOFTCAP, sinks=batch.sinks[layer])
        yield (
            heads,
            ScoreInputs(
                of_heads(batch.query[req, layer], heads),
                batch.keys,
                batch.values,
                batch.page_table[req, layer, heads, : -(-kv_len // BLOCK)],
                kv_len,
                SCALE,
                output=None if batch.output is None else of_heads(batch.output[req, layer], heads),
                weights=weights.of_heads(heads, KV_HEADS),
                num_kept=kv_len // 2,
                layer=layer,
            ),
        )


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_each_head_gets_what_its_peers_get_alone(policy, transposed):
    """And its request alone, in tiles of one head."""
    batch = batch_of(policy, LENGTHS, transposed)
    together = policy.score_batch(batch)
    assert together.shape == batch.shape
    for req in range(len(LENGTHS)):
        with patch.object(scratch, "_most_bytes", 1):
            of_request = policy.score_batch(request_of(batch, req))[0]
        for layer in range(LAYERS):
            for heads, inputs in peers(batch, req, layer):
                alone = policy.score(inputs)
                assert alone.isfinite().all()
                assert together[req, layer, heads, : inputs.kv_len].equal(alone)
                assert of_request[layer, heads, : inputs.kv_len].equal(alone)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_prompts_of_equal_heads_get_what_each_gets_alone(policy):
    """As above, but the policy knows that the heads of a layer hold the same tokens."""
    batch = replace(batch_of(policy, [(length,) * KV_HEADS for length in (5, 19, 20, 1100, 333)], False), alike=True)
    together = policy.score_batch(batch)
    for req, layer in ((req, layer) for req in range(5) for layer in range(LAYERS)):
        ((_, inputs),) = peers(batch, req, layer)
        assert together[req, layer, :, : inputs.kv_len].equal(policy.score(inputs))


def test_attention_in_tiles_is_the_capped_one_with_sinks():
    """Over one tile and over several, of heads of all layers and requests at once."""
    policy = OBCacheValue(window=5)
    batch = batch_of(policy, [(300,) * KV_HEADS, (1200,) * KV_HEADS], False)
    places = list(product(range(2), range(LAYERS), range(KV_HEADS)))
    tiles = list(attention_tiles(batch, slice(0, len(places))))
    found = torch.cat([tile.probabilities for tile in tiles], dim=1)
    assert len(tiles) > 1
    for (req, layer, head), paid in zip(places, found.permute(0, 2, 3, 1), strict=True):
        kv_len = int(batch.kv_lens[req, layer, head])
        keys = batch.keys[batch.page_table[req, layer, head]].flatten(0, 1)[:kv_len].double()
        query = batch.query[req, layer].unflatten(1, (KV_HEADS, GROUP))[:, head].transpose(0, 1).double()
        hidden = torch.arange(kv_len) > torch.arange(kv_len - 5, kv_len)[:, None]
        logits = query @ keys.T * SCALE
        terms = (SOFTCAP * torch.tanh(logits / SOFTCAP)).masked_fill(hidden, -torch.inf).exp()
        sinks = batch.sinks[layer].view(KV_HEADS, GROUP, 1, 1)[head].double().exp()
        expected = terms / (terms.sum(-1, keepdim=True) + sinks)
        torch.testing.assert_close(paid[..., :kv_len].double(), expected, rtol=1e-4, atol=1e-8)


def test_one_request_s_window_scores_are_those_of_a_batch():
    batch = batch_of(SnapKV(), [(300,) * KV_HEADS], False)
    ((_, inputs),) = peers(batch, 0, 1)
    alone = inputs.window_scores(inputs.query, inputs.kv_len, Reduction())
    assert alone.equal(batch.window_scores(Reduction())[0, 1, :, : inputs.kv_len])


def test_heads_shorter_than_a_chunk_get_the_scores_of_the_other_policy():
    batch = batch_of(Knorm(), LENGTHS, False)
    chunked, unchanged = ChunkKV("knorm").score_batch(batch), Knorm().score_batch(batch)
    for place in (batch.kv_lens < 20).nonzero().tolist():
        held = (*place, slice(int(batch.kv_lens[tuple(place)])))
        assert chunked[held].equal(unchanged[held])
    ranks_alike = chunked[0, 0, 3:5, :300]
    assert ranks_alike[0].equal(ranks_alike[1])
    assert not unchanged[0, 0, 3, :300].equal(unchanged[0, 0, 4, :300])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_do_not_depend_on_how_many_rows_there_are(dtype):
    """As those of a BLAS do."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 200, 20, dtype=dtype, generator=generator)
    for matrices in (torch.randn(num, 20, 24, dtype=dtype, generator=generator) for num in (1, 3)):
        expected = products(rows, matrices)
        torch.testing.assert_close(expected, rows @ matrices)
        for num_tokens in (1, 7, 64, 130):
            assert products(rows[:, :num_tokens], matrices).equal(expected[:, :num_tokens])
            assert products(rows[:1, :num_tokens], matrices[:1]).equal(expected[:1, :num_tokens])
