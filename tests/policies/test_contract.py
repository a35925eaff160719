"""What every registered policy must do, whatever it computes."""

from dataclasses import replace

import pytest
import torch

from benchmarks.held_bytes import HeldBytes
from tests.gpu import HAS_GPU, on_gpu
from tests.paged import LAYOUTS, PACKINGS, make_pool, random_kv, scrambled_blocks
from vllm_kvevict.kernels.rotary import Rotary
from vllm_kvevict.policies import POLICIES, Need, ScoreInputs, scratch
from vllm_kvevict.policies.inputs import LayerWeights

KV_HEADS, GROUP, HEAD_SIZE, LAYER = 2, 3, 16, 1
LENGTHS = [100, 160, 257]


@pytest.fixture(params=POLICIES.names())
def policy(request):
    return POLICIES.get(request.param)()


def make_inputs(policy, kv_len, block_size=32, packing="transposed", layout="LBHNC", content_seed=0, block_seed=0):
    """The last queries, K and V come from one seed, the places of the blocks from the other; the rest is NaN."""
    content = torch.Generator().manual_seed(content_seed)
    keys, values = random_kv(2, KV_HEADS, kv_len, HEAD_SIZE, content)
    query = torch.randn(policy.query_window, KV_HEADS * GROUP, HEAD_SIZE, generator=content)
    num_blocks = -(-kv_len // block_size)
    cache = make_pool(2, KV_HEADS, num_blocks + 5, block_size, HEAD_SIZE, packing, layout)
    block_ids = scrambled_blocks(cache, num_blocks, torch.Generator().manual_seed(block_seed))
    cache.write(keys, values, block_ids)
    pool = cache.pool
    page_table = pool.layer_page_ids(LAYER, block_ids)
    inputs = ScoreInputs(query, *pool.readable(page_table), kv_len, HEAD_SIZE**-0.5)
    return with_needs(policy, inputs, content), cache


def with_needs(policy, inputs, generator):
    """Add what else the policy asks for, and nothing that it does not."""
    heads = KV_HEADS * GROUP
    angles = torch.arange(inputs.kv_len)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=1), is_neox_style=True)  # of 6 dimensions out of 16
    projection = torch.randn(24, heads * HEAD_SIZE, generator=generator)
    output = torch.randn(inputs.query.shape, generator=generator)
    needs = policy.needs
    weights = replace(
        inputs.weights,
        rotary=rotary if Need.ROTARY in needs else None,
        output_projection=projection if Need.OUTPUT_PROJECTION in needs else None,
    )
    inputs = replace(inputs, output=output if Need.OUTPUTS in needs else None, weights=weights)
    if policy.num_pseudo_tokens:
        pseudo_query = torch.randn(policy.num_pseudo_tokens, heads, HEAD_SIZE, generator=generator)
        inputs = replace(inputs, pseudo_query=pseudo_query)
    if Need.ALL_QUERIES not in needs:
        return inputs
    return observed(policy, inputs, torch.randn(inputs.kv_len, heads, HEAD_SIZE, generator=generator))


def observed(policy, inputs, queries):
    """Add what the policy has learned from the queries of the whole prompt, chunk by chunk."""
    state, seen = None, 0
    for chunk in queries.split(100):
        seen += len(chunk)
        state = policy.observe(state, replace(inputs, query=chunk, kv_len=seen, output=None))
    return replace(inputs, state=state)


# every two of a length, a block size and a packing meet once
SHAPES = [
    (kv_len, block_size, PACKINGS[(row + column) % 3])
    for row, kv_len in enumerate(LENGTHS)
    for column, block_size in enumerate((16, 32, 64))
]


@pytest.mark.parametrize(("kv_len", "block_size", "packing"), SHAPES)
def test_scores_are_finite_numbers_for_every_token_and_rank_them(policy, kv_len, block_size, packing):
    """NaN fills what no request owns and the slots past the last token, so none of it reached a score."""
    inputs, _ = make_inputs(policy, kv_len, block_size, packing)
    scores = policy.score(inputs)
    assert scores.shape == (KV_HEADS, kv_len)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert (scores.amax(1) > scores.amin(1)).all()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_places_of_blocks_do_not_matter(policy, packing, layout):
    expected = policy.score(make_inputs(policy, 257, packing=packing)[0])
    for block_seed in (1, 2):
        inputs, _ = make_inputs(policy, 257, packing=packing, layout=layout, block_seed=block_seed)
        assert policy.score(inputs).equal(expected)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_an_fp8_cache_is_read_as_the_numbers_that_it_stands_for(policy, dtype, packing):
    """Scores are those of a float32 cache that holds these numbers, bit for bit with scales that are powers of two."""
    scales = LayerWeights(key_scale=0.25, value_scale=2.0)
    for kv_len in LENGTHS:
        content = torch.Generator().manual_seed(0)
        keys, values = (kv.to(dtype) for kv in random_kv(2, KV_HEADS, kv_len, HEAD_SIZE, content))
        query = 3 * torch.randn(policy.query_window, KV_HEADS * GROUP, HEAD_SIZE, generator=content)
        state = content.get_state()
        cache = make_pool(2, KV_HEADS, 15, 32, HEAD_SIZE, packing, dtype=dtype)
        dense = make_pool(2, KV_HEADS, 15, 32, HEAD_SIZE, packing)
        block_ids = scrambled_blocks(cache, -(-kv_len // 32), torch.Generator().manual_seed(1))
        cache.write(keys, values, block_ids)
        dense.write(keys.float() * scales.key_scale, values.float() * scales.value_scale, block_ids)
        scores = []
        for pool, weights in ((cache.pool, scales), (dense.pool, LayerWeights())):
            table = pool.layer_page_ids(LAYER, block_ids)
            inputs = ScoreInputs(query, *pool.readable(table), kv_len, HEAD_SIZE**-0.5, weights=weights)
            scores.append(policy.score(with_needs(policy, inputs, content.set_state(state))))
        assert torch.isfinite(scores[0]).all()
        assert scores[0].equal(scores[1])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_gpu_scores_as_the_cpu_does(policy, packing):
    def score(inputs, queries):
        if Need.ALL_QUERIES in policy.needs:
            inputs = observed(policy, inputs, queries)
        return policy.score(inputs)

    inputs = replace(make_inputs(policy, 257, packing=packing)[0], state=None)
    queries = torch.randn(257, KV_HEADS * GROUP, HEAD_SIZE)
    # sums of float32 in another order
    torch.testing.assert_close(on_gpu(score)(inputs, queries), score(inputs, queries), rtol=1e-4, atol=1e-6)
    if policy.num_pseudo_tokens:
        seen = replace(inputs, pseudo_query=None, num_kept=100)
        assert on_gpu(policy.preselect)(seen).sort().values.equal(policy.preselect(seen).sort().values)


def test_memory_of_others_does_not_matter(policy):
    inputs, cache = make_inputs(policy, 257)
    expected = policy.score(inputs)
    unowned = cache.pool.pages.isnan()
    assert unowned.any()
    cache.pool.pages[unowned] = 1e30
    assert policy.score(inputs).equal(expected)


def test_entries_past_the_prompt_do_not_matter(policy):
    inputs, cache = make_inputs(policy, 257)
    wide = torch.nn.functional.pad(inputs.page_table, (0, 3), value=cache.pool.pages.shape[0] - 1)
    assert policy.score(replace(inputs, page_table=wide)).equal(policy.score(inputs))


@pytest.mark.parametrize("name", [name for name in POLICIES.names() if POLICIES.get(name)().num_pseudo_tokens])
def test_pseudo_tokens_see_tokens_of_the_prompt(name):
    policy = POLICIES.get(name)()
    inputs, _ = make_inputs(policy, 257)
    tokens = policy.preselect(replace(inputs, pseudo_query=None, num_kept=100))
    assert tokens.shape == (KV_HEADS, 100)
    assert all(len(set(head.tolist()) & set(range(257))) == 100 for head in tokens)


@pytest.mark.parametrize("packing", PACKINGS)
def test_inputs_are_only_read(policy, packing):
    inputs, cache = make_inputs(policy, 257, packing=packing)
    before = [inputs.query.clone(), cache.pool.pages.clone(), inputs.page_table.clone()]
    policy.score(inputs)
    for tensor, copy in zip([inputs.query, cache.pool.pages, inputs.page_table], before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def held_bytes(policy, kv_len):
    """By ``score``, and by ``observe`` for a chunk of 100 tokens at the end."""
    inputs, _ = make_inputs(policy, kv_len)
    with HeldBytes() as held:
        policy.score(inputs)
    if Need.ALL_QUERIES not in policy.needs:
        return held.most
    query = torch.randn(100, KV_HEADS * GROUP, HEAD_SIZE)
    earlier = inputs.state
    with HeldBytes() as observing:
        policy.observe(earlier, replace(inputs, query=query, output=None))
    return max(held.most, observing.most)


def test_scoring_holds_no_more_bytes_per_token_than_it_says(policy, monkeypatch):
    """The growth between two lengths, both long enough for what does not depend on the prompt to be little of it."""
    monkeypatch.setattr(scratch, "_most_bytes", 2**10)
    stated = policy.scratch_bytes(KV_HEADS * GROUP, KV_HEADS, HEAD_SIZE)
    # observing takes time that grows with the square of the length
    length = 3_072 if Need.ALL_QUERIES in policy.needs else 15_360
    grown = held_bytes(policy, 2 * length) - held_bytes(policy, length)
    assert grown <= length * stated
    # nor does it state much more than that, and far less than a row of attention for each query
    assert stated <= 2 * grown / length + 16 * KV_HEADS
    assert stated < 4 * KV_HEADS * GROUP * max(policy.query_window, 8)


def test_what_a_policy_asks_for_is_a_number_of_tokens(policy):
    for value in (policy.query_window, policy.num_sink, policy.num_recent):
        assert isinstance(value, int)
        assert value >= 0


@pytest.mark.parametrize("kv_len", [1, 2, 7])
def test_prompts_shorter_than_the_window(policy, kv_len):
    """Possible where num_recent is set below the window; the engine then holds fewer queries than it was asked for."""
    inputs, _ = make_inputs(policy, kv_len, block_size=16)
    output = None if inputs.output is None else inputs.output[:kv_len]
    short = replace(inputs, query=inputs.query[:kv_len], output=output)
    scores = policy.score(short)
    assert scores.shape == (KV_HEADS, kv_len)
    assert torch.isfinite(scores).all()


def test_layers_that_are_scored_together_get_the_scores_that_each_gets_alone(policy):
    layers = [replace(make_inputs(policy, 257, content_seed=seed)[0], layer=seed) for seed in range(3)]
    pool = torch.cat([inputs.keys for inputs in layers]), torch.cat([inputs.values for inputs in layers])
    first_pages = [sum(len(inputs.keys) for inputs in layers[:place]) for place in range(3)]
    # as in an engine they share a pool, and in the end one has another scale, as an fp8 cache may have
    layers = [
        replace(inputs, keys=pool[0], values=pool[1], page_table=inputs.page_table + first)
        for inputs, first in zip(layers, first_pages, strict=True)
    ]
    scaled = [*layers[:2], replace(layers[2], scale=0.1)]
    for together in (layers, scaled):
        assert all(
            scores.equal(policy.score(inputs))
            for scores, inputs in zip(policy.score_layers(together), together, strict=True)
        )
