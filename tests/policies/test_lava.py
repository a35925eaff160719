"""LAVa's score against a dense formula from the paper, and what its norm does and does not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.paged import PACKINGS, make_pool, random_kv, scrambled_blocks
from vllm_kvevict.policies import ScoreInputs
from vllm_kvevict.policies.inputs import LayerWeights
from vllm_kvevict.policies.lava import Lava

HEADS, GROUP, HEAD_SIZE = 2, 3, 16
UNSCALED = LayerWeights()


def make_inputs(kv_len, packing="transposed", value_scale=1.0, seed=0, dtype=torch.float32, scales=UNSCALED):
    """Inputs, and the dense K and V that they stand for; a cache of an 8-bit ``dtype`` holds these by ``scales``."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = random_kv(1, HEADS, kv_len, HEAD_SIZE, generator)
    keys, values = keys.to(dtype), (values * value_scale).to(dtype)
    query = 3 * torch.randn(32, HEADS * GROUP, HEAD_SIZE, generator=generator)
    num_blocks = -(-kv_len // 16)
    cache = make_pool(1, HEADS, num_blocks + 3, 16, HEAD_SIZE, packing, dtype=dtype)
    block_ids = scrambled_blocks(cache, num_blocks, generator)
    cache.write(keys, values, block_ids)
    table = cache.pool.layer_page_ids(0, block_ids)
    pool = cache.pool
    inputs = ScoreInputs(query, *pool.readable(table), kv_len, HEAD_SIZE**-0.5, weights=scales)
    return inputs, keys[0].float() * scales.key_scale, values[0].float() * scales.value_scale


def dense(query, keys, values, kernel=7):
    """[num_kv_heads, kv_len - window] scores, one query head after the other."""
    window, kv_len = len(query), keys.shape[1]
    hidden = torch.ones(window, kv_len, dtype=torch.bool).triu(kv_len - window + 1)
    scores = torch.full((len(keys), kv_len - window), float("-inf"))
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // len(keys))
        logits = (query[:, head] @ keys[group].T / HEAD_SIZE**0.5).masked_fill(hidden, float("-inf"))
        attention = logits.softmax(-1)[:, : kv_len - window].mean(0)
        pooled = F.max_pool1d(attention[None], kernel, stride=1, padding=kernel // 2)[0]
        norm = max(float(value.abs().sum()) for value in values[group, : kv_len - window])
        scores[group] = torch.maximum(scores[group], pooled * norm)
    return scores


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kv_len", [33, 64, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_equals_the_formula(packing, kv_len, dtype):
    scales = UNSCALED if dtype == torch.float32 else LayerWeights(key_scale=0.3, value_scale=7.0)
    inputs, keys, values = make_inputs(kv_len, packing, dtype=dtype, scales=scales)
    # float32, another order of sums
    torch.testing.assert_close(Lava().score(inputs)[:, :-32], dense(inputs.query, keys, values), rtol=1e-4, atol=1e-7)


def test_the_norm_scales_heads_and_leaves_the_order_inside_a_head():
    plain = Lava().score(make_inputs(200)[0])[:, :-32]
    scale = torch.tensor([1.0, 5.0])[:, None, None]
    scaled = Lava().score(make_inputs(200, value_scale=scale)[0])[:, :-32]
    torch.testing.assert_close(scaled, plain * scale[:, :, 0], rtol=1e-5, atol=0)


def test_values_of_the_window_do_not_count():
    inputs, _, _ = make_inputs(200)
    before = Lava().score(inputs)
    page, slot = inputs.page_table[:, 199 // 16], 199 % 16
    inputs.values[page, slot] = 1e6
    assert Lava().score(inputs).equal(before)
