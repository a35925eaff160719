"""What policies say of single steps, of tokens in no order, against dense formulas in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from vllm_kvevict.policies import morphkv as morphkv_module
from vllm_kvevict.policies.base import EvictionPolicy
from vllm_kvevict.policies.h2o import H2O
from vllm_kvevict.policies.inputs import LayerWeights, StepInputs
from vllm_kvevict.policies.morphkv import MorphKV
from vllm_kvevict.policies.tova import Tova

REQS, KV_HEADS, GROUP, HEAD_SIZE, BLOCK, PAGES, WINDOW = 2, 2, 3, 16, 16, 5, 9
NUM_TOKENS = [130, 97]
HELD = [[80, 48], [64, 80]]  # slots of each head, whole pages
KEY_SCALE = 0.5
# logits of a few tens in float32 are off by some 1e-6, which the exponential makes relative; sums over a group by more
TOLERANCE = {"rtol": 1e-4, "atol": 1e-9}


@pytest.fixture(scope="module")
def inputs() -> StepInputs:
    """Heads of several lengths, all of which hold the newest tokens; what nobody holds is NaN."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.full((40, HEAD_SIZE, BLOCK), float("nan")).transpose(1, 2)
    free = iter((torch.randperm(39, generator=generator) + 1).tolist())
    page_table = torch.zeros(REQS, KV_HEADS, PAGES, dtype=torch.int64)
    positions = torch.full((REQS, KV_HEADS, PAGES * BLOCK), -1)
    for req, head in product(range(REQS), range(KV_HEADS)):
        held, newest = HELD[req][head], torch.arange(NUM_TOKENS[req] - WINDOW, NUM_TOKENS[req])
        older = torch.randperm(NUM_TOKENS[req] - WINDOW, generator=generator)[: held - WINDOW]
        tokens = torch.cat([older, newest])
        positions[req, head, :held] = tokens[torch.randperm(held, generator=generator)]
        for page in range(held // BLOCK):
            page_table[req, head, page] = next(free)
            keys[page_table[req, head, page]] = torch.randn(BLOCK, HEAD_SIZE, generator=generator)
    query = torch.randn(REQS, WINDOW, KV_HEADS * GROUP, HEAD_SIZE, generator=generator)
    state = torch.rand(positions.shape, generator=generator)
    lens = torch.tensor(NUM_TOKENS)
    return StepInputs(
        query, keys, page_table, positions, lens, 140, HEAD_SIZE**-0.5, LayerWeights(key_scale=KEY_SCALE), state
    )


def logits_of(inputs: StepInputs) -> torch.Tensor:
    """[num_reqs, num_tokens, num_kv_heads, group, num_queries] by position, -inf where a head does not hold a token."""
    logits = torch.full((REQS, 140, KV_HEADS, GROUP, WINDOW), -torch.inf, dtype=torch.float64)
    for req, head, slot in product(range(REQS), range(KV_HEADS), range(PAGES * BLOCK)):
        position = int(inputs.positions[req, head, slot])
        if position >= 0:
            key = inputs.keys[inputs.page_table[req, head, slot // BLOCK], slot % BLOCK].double() * KEY_SCALE
            queries = inputs.query[req, :, head * GROUP : (head + 1) * GROUP].double()
            logits[req, position, head] = (queries @ key * inputs.scale).T
    return logits


def check(policy: EvictionPolicy, inputs: StepInputs, of_tokens: torch.Tensor, added: float | torch.Tensor = 0) -> None:
    """of_tokens: [num_reqs, num_tokens, num_kv_heads]"""
    index = inputs.positions.clamp(min=0).transpose(1, 2)
    expected = of_tokens.gather(1, index).transpose(1, 2).float() + added
    scores = policy.score_step(inputs)
    assert scores.shape == inputs.positions.shape
    torch.testing.assert_close(scores[inputs.is_held], expected[inputs.is_held], **TOLERANCE)


def test_h2o(inputs):
    attention = logits_of(inputs)[..., -1].softmax(1)
    check(H2O(), inputs, attention.mean(3), inputs.state)


def test_tova(inputs):
    attention = logits_of(inputs)[..., -1].softmax(1)
    check(Tova(), inputs, attention.mean(3).sum(2, keepdim=True).expand(-1, -1, KV_HEADS))


OPTIONS = [*product(("sum", "max"), ("probabilities", "logits"), ("max", "mean", "layer"), ("older", "all"))]


@pytest.mark.parametrize("at_once", [1 << 22, 1])
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_morphkv(inputs, options, at_once, monkeypatch):
    monkeypatch.setattr(morphkv_module, "_MAX_SCORES", at_once)
    policy = MorphKV(WINDOW, *options)
    logits = logits_of(inputs)
    if policy.variant == "logits":
        logits = logits.sum(3, keepdim=True)
    for req, query in product(range(REQS), range(WINDOW)):
        first_query = NUM_TOKENS[req] - WINDOW
        first_hidden = first_query if policy.denominator == "older" else first_query + query + 1
        logits[req, first_hidden:, :, :, query] = -torch.inf
    attention = logits.softmax(1)
    of_heads = attention.amax(3) if policy.group == "max" else attention.mean(3)
    if policy.group == "layer":
        of_heads = of_heads.sum(2, keepdim=True).expand(-1, -1, KV_HEADS, -1)
    check(policy, inputs, of_heads.sum(3) if policy.fusion == "sum" else of_heads.amax(3))
