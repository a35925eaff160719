"""What every registered allocator must do, and what each of them says it does."""

import pytest
import torch

from vllm_kvevict.budgets import ALLOCATORS, round_to_pages
from vllm_kvevict.budgets.uniform import Uniform


@pytest.fixture(params=ALLOCATORS.names())
def allocator(request):
    return ALLOCATORS.get(request.param)()


@pytest.fixture
def scores():
    """[3 layers, 4 heads, 50 tokens], the ends protected."""
    scores = torch.rand(3, 4, 50)
    scores[..., :2] = scores[..., -8:] = float("inf")
    return scores


def test_wishes_are_amounts_for_every_layer_and_head(allocator, scores):
    before = scores.clone()
    wish = allocator.wish(scores, 20.0)
    assert wish.shape == (3, 4)
    assert wish.dtype == torch.float64
    assert torch.isfinite(wish).all()
    assert (wish >= 0).all()
    assert scores.equal(before)


def test_wishes_can_be_rounded(allocator, scores):
    assert int(round_to_pages(allocator.wish(scores, 20.0), 12, 1, 3).sum()) == 12


@pytest.mark.parametrize("num_tokens", [1, 20.0, 36.5])
def test_uniform_wishes_the_average_everywhere(scores, num_tokens):
    assert (Uniform().wish(scores, num_tokens) == num_tokens).all()


def test_uniform_gives_equal_pages(scores):
    assert (round_to_pages(Uniform().wish(scores, 32), 24, 0, 3) == 2).all()
