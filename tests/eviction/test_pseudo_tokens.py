"""Attention of pseudo tokens over what was selected of prompts, and over each other, against a dense one."""

from __future__ import annotations

import pytest
import torch

from tests.implementations import hard_sinks, probabilities
from tests.paged import PACKINGS, make_pool, random_kv, scrambled_blocks
from vllm_kvevict.cache.pages import Packing
from vllm_kvevict.eviction.pseudo_tokens import PseudoDecode
from vllm_kvevict.policies.inputs import LayerWeights

LAYERS, KV_HEADS, GROUP, HEAD_SIZE, BLOCK, SCALE = 2, 2, 3, 16, 32, 0.25
LENGTHS, COUNTS, PASSES = (70, 200, 129), (40, 64, 7), 4


SINKS, SOFTCAP = hard_sinks(KV_HEADS * GROUP), 2.0


def dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """query: [num_heads, head_size]; keys, values: [num_kv_heads, num_tokens, head_size]."""
    logits = query.unflatten(0, (KV_HEADS, GROUP)) @ keys.transpose(1, 2) * SCALE
    return (probabilities(logits, SOFTCAP, SINKS.view(KV_HEADS, GROUP, 1)) @ values).flatten(0, 1)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_equals_dense_attention(dtype: torch.dtype, packing: Packing) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = {"key_scale": 0.5, "value_scale": 2.0} if dtype.itemsize == 1 else {}
    weights = LayerWeights(**scales, softcap=SOFTCAP, sinks=SINKS)
    cache = make_pool(LAYERS, KV_HEADS, 20, BLOCK, HEAD_SIZE, packing, dtype=dtype)
    blocks = scrambled_blocks(cache, 15, generator).split([-(-length // BLOCK) for length in LENGTHS])
    slots, seen = [], []
    for length, count, block_ids in zip(LENGTHS, COUNTS, blocks, strict=True):
        keys, values = (kv.to(dtype) for kv in random_kv(LAYERS, KV_HEADS, length, HEAD_SIZE, generator))
        cache.write(keys, values, block_ids)
        tokens = torch.rand(LAYERS, KV_HEADS, length, generator=generator).argsort(-1)[..., :count]
        own = cache.pool.page_ids(block_ids).gather(2, tokens // BLOCK) * BLOCK + tokens % BLOCK
        own[1, :, count - 2 :] = -1  # the second layer sees fewer
        slots.append(torch.nn.functional.pad(own, (0, max(COUNTS) - count), value=-1))
        index = tokens[..., None].expand(-1, -1, -1, HEAD_SIZE)
        scaled = (keys.float() * weights.key_scale, values.float() * weights.value_scale)
        first, second = zip(*(kv.gather(2, index) for kv in scaled), strict=True)
        seen.append([first, tuple(kv[:, : count - 2] for kv in second)])
    before = cache.pool.pages.clone()
    decode = PseudoDecode(cache.pool, torch.stack(slots, dim=1))

    queries = torch.randn(PASSES, LAYERS, len(LENGTHS), KV_HEADS * GROUP, HEAD_SIZE, generator=generator)
    own_keys, own_values = torch.randn(2, PASSES, LAYERS, len(LENGTHS), KV_HEADS, HEAD_SIZE, generator=generator)
    for number in range(PASSES):
        for layer in range(LAYERS):
            # copies that are overwritten afterwards: the engine reuses its buffers
            step = [tensor[number, layer].clone() for tensor in (queries, own_keys, own_values)]
            attended = decode.attend(layer, *step, SCALE, weights)
            for row, of_layers in enumerate(seen):
                so_far = [kv[: number + 1, layer, row].transpose(0, 1) for kv in (own_keys, own_values)]
                context = [torch.cat([kv, new], 1) for kv, new in zip(of_layers[layer], so_far, strict=True)]
                torch.testing.assert_close(attended[row], dense(queries[number, layer, row], *context))
            for tensor in step:
                tensor.fill_(float("nan"))
    assert decode.queries(layer=1).equal(queries[:, 1].transpose(0, 1))
    assert cache.pool.pages.view(torch.uint8).equal(before.view(torch.uint8)), "the cache has changed"
