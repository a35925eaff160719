"""Layers of a prompt are scored together as far as the scratch memory allows, and as they would be alone."""

from __future__ import annotations

import pytest
import torch

from tests.paged import make_pool, random_kv, scrambled_blocks
from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.prompt import Eviction
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.snapkv import SnapKV

LAYERS, HEADS, SIZE, BLOCK, TOKENS = 5, 2, 16, 16, 300


@pytest.mark.parametrize(("most", "together"), [(2**25, [5]), (2 * 8 * TOKENS, [2, 2, 1]), (1, [1] * 5)])
def test_as_many_layers_are_scored_together_as_fit(
    most: int, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bytes a token: a float for each of two KV heads."""
    generator = torch.Generator().manual_seed(0)
    plan = EvictionPlan(TOKENS, 6, BLOCK)
    cache = make_pool(LAYERS, HEADS, plan.num_blocks + 2, BLOCK, SIZE, "interleaved", "LBHNC")
    block_ids = scrambled_blocks(cache, plan.num_blocks, generator)
    cache.write(*random_kv(LAYERS, HEADS, TOKENS, SIZE, generator), block_ids)
    query = torch.randn(LAYERS, 32, 2 * HEADS, SIZE, generator=generator)
    scores, found, score = [], [], SnapKV.score_batch

    def recorded(policy: SnapKV, batch: ScoreBatch) -> torch.Tensor:
        found.append(batch.shape[1])
        return score(policy, batch)

    monkeypatch.setattr(SnapKV, "score_batch", recorded)
    for limit in (1, most):
        monkeypatch.setattr(scratch, "_most_bytes", limit)
        found.clear()
        eviction = Eviction(Method(SnapKV(), Uniform(), 4, 32), plan, cache.pool, block_ids)
        for layer in range(LAYERS):
            eviction.score_layer(layer, query[layer], 0.25)
        eviction.choose()
        scores.append(eviction.alone._scores.scores.of_layers(0, LAYERS))
    assert found == together
    assert scores[0].equal(scores[1])
