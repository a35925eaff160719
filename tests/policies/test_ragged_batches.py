"""Policies that judge tile by tile: heads of any lengths are scored together as each is alone, bit by bit."""

from __future__ import annotations

import pytest
import torch

from vllm_kvevict.policies import EvictionPolicy, Need, ScoreInputs
from vllm_kvevict.policies.batch import ScoreBatch
from vllm_kvevict.policies.laq_deferred import LookaheadDeferred
from vllm_kvevict.policies.obcache import OBCacheJoint, OBCacheKey, OBCacheValue

# from a head of one token to one of three tiles; those of one layer stand in a row
LENGTHS = torch.tensor([[[1, 5], [17, 1100]], [[16, 2050], [333, 15]], [[1024, 70], [2, 11]]])
GROUP, HEAD_SIZE, BLOCK_SIZE, SCALE = 3, 24, 16, 0.3
POLICIES = [
    LookaheadDeferred(window=0),
    LookaheadDeferred(window=8, pool_kernel=41),
    *(kind(group=group, pool=pool) for kind in (OBCacheValue, OBCacheKey, OBCacheJoint)
      for group, pool in (("sum", "max"), ("pre", "avg"))),
    OBCacheJoint(window=5, group="max", pool_kernel=1),
]  # fmt: skip


def ragged_batch(policy: EvictionPolicy) -> ScoreBatch:
    """What nobody holds is NaN: pages, slots behind the last token of a head, and what its table names behind them."""
    generator = torch.Generator().manual_seed(0)
    num_pages = -(-LENGTHS // BLOCK_SIZE)
    width = int(num_pages.max()) + 1
    keys, values = torch.full((2, LENGTHS.numel() * width, BLOCK_SIZE, HEAD_SIZE), float("nan"))
    page_table = torch.randperm(len(keys), generator=generator).view(*LENGTHS.shape, width)
    for pages, kv_len in zip(page_table.flatten(0, 2), LENGTHS.flatten().tolist(), strict=True):
        for part in (keys, values):
            of_head = part[pages].flatten(0, 1)
            of_head[:kv_len] = torch.randn(kv_len, HEAD_SIZE, generator=generator)
            part[pages] = of_head.view(width, BLOCK_SIZE, HEAD_SIZE)
    shape = *LENGTHS.shape[:2], policy.query_window, LENGTHS.shape[2] * GROUP, HEAD_SIZE
    query, output = torch.randn(2, *shape, generator=generator)
    asks_for_outputs = Need.OUTPUTS in policy.needs
    max_kv_len = int(LENGTHS.max()) + 3
    return ScoreBatch(
        query, keys, lambda: values, page_table, LENGTHS, max_kv_len, SCALE, output=output if asks_for_outputs else None
    )


def alone(policy: EvictionPolicy, batch: ScoreBatch, req: int, layer: int, head: int) -> torch.Tensor:
    """[kv_len], what the policy says of a layer that has this head only, and no more queries than tokens."""
    kv_len = int(batch.kv_lens[req, layer, head])

    def of_head(part: torch.Tensor) -> torch.Tensor:
        return part[req, layer, -kv_len:, head * GROUP : (head + 1) * GROUP]

    inputs = ScoreInputs(
        of_head(batch.query),
        batch.keys,
        batch.values,
        batch.page_table[req, layer, head, None, : -(-kv_len // BLOCK_SIZE)],
        kv_len,
        SCALE,
        None if batch.output is None else of_head(batch.output),
    )
    return policy.score(inputs)[0]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_each_head_is_judged_as_if_alone(policy: EvictionPolicy) -> None:
    batch, window = ragged_batch(policy), policy.query_window
    scores = policy.score_batch(batch)
    assert scores.shape == batch.shape
    for (req, layer, head), kv_len in zip(torch.cartesian_prod(*map(torch.arange, LENGTHS.shape)).tolist(),
                                          LENGTHS.flatten().tolist(), strict=True):  # fmt: skip
        of_head, num_judged = scores[req, layer, head, :kv_len], max(kv_len - window, 0)
        assert of_head[:num_judged].equal(alone(policy, batch, req, layer, head)[:num_judged])
        if num_judged:
            of_layer = [scores[req, layer, other, : LENGTHS[req, layer, other]] for other in range(LENGTHS.shape[2])]
            assert (of_head[num_judged:] == torch.cat(of_layer).amax()).all()
        else:
            assert not of_head.any()
