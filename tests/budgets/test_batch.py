"""Requests of different lengths that are given budgets together get what each would get alone."""

import pytest
import torch

from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.budgets.adakv import AdaKV
from vllm_kvevict.budgets.batch import BatchAllocator, WishBatch, wishes_for_batches

LAYERS, HEADS, LENS, NUM_TOKENS, NUM_PROTECTED = 3, 4, [70, 41, 70, 56], [32, 20, 5, 33], 6
OPTIONS = {"global": {"head_floor": 0.2, "layer_floor": 0.5}, "lava": {"floor_alpha": 0.3}, "adakv": {"alpha": 0.3}}
NAMES = [name for name in ALLOCATORS.names() if name != "fixed"]  # which looks at nothing


def scores_of(kind: str, kv_len: int, seed: int) -> torch.Tensor:
    """Scores of one request; in those of a sparse one the budgets end among zeros, of which there are many."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(LAYERS, HEADS, kv_len, generator=generator) ** 8
    if kind == "sparse":
        scores = scores * (torch.rand(scores.shape, generator=generator) < 0.1)
    if kind == "signed":
        scores = scores - 0.5
    scores[..., :2] = scores[..., kv_len - 4 :] = float("inf")
    return scores


@pytest.mark.parametrize("kind", ["dense", "sparse", "signed"])
@pytest.mark.parametrize("name", NAMES)
def test_together_as_alone(name, kind):
    """Up to the rounding of float64: LAVa's entropies are summed up over tables of another width."""
    allocator = ALLOCATORS.get(name)(**OPTIONS.get(name, {}))
    alone = [scores_of(kind, kv_len, seed) for seed, kv_len in enumerate(LENS)]
    measures = torch.rand(len(LENS), LAYERS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    scores = torch.full((len(LENS), LAYERS, HEADS, max(LENS)), float("nan"))
    for req, of_request in enumerate(alone):
        scores[req, ..., : LENS[req]] = of_request
    batch = WishBatch.of(scores, LENS, NUM_TOKENS, [NUM_PROTECTED] * len(LENS), measures)
    summary = allocator.summarise(batch)
    for req, of_request in enumerate(alone):
        part = torch.empty(0) if summary is None else summary[req]
        expected = allocator.wish(of_request, NUM_TOKENS[req], measures[req])
        torch.testing.assert_close(allocator.share(part, batch.facts(req)), expected, rtol=1e-12, atol=1e-9)


def test_a_subclass_that_changes_wish_is_asked_for_it():
    class Changed(AdaKV):
        def wish(self, scores, num_tokens, measures):
            return super().wish(scores, num_tokens, measures)

    class Inherited(AdaKV):
        pass

    assert wishes_for_batches(Inherited)
    assert not wishes_for_batches(Changed)
    assert all(issubclass(ALLOCATORS.get(name), BatchAllocator) for name in ALLOCATORS.names())
