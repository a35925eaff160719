"""What third parties return is refused before it indexes memory."""

from __future__ import annotations

import re

import pytest
import torch

from vllm_kvevict.eviction.results import checked, checked_preselection, checked_tokens, checked_wish

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def test_what_is_right_passes_as_it_is():
    scores = torch.full((2, 5), NAN)
    assert checked("P.score", scores, (2, 5), CPU) is scores
    tokens = torch.tensor([[0, 4], [3, 3]])
    assert [part.tolist() for part in checked_tokens("P.preselect", tokens, 2, 5, CPU)] == [[[0, 4], [3, 3]], True]
    assert checked_wish("A.wish", torch.tensor([[0, 3]]), (1, 2)).tolist() == [[0.0, 3.0]]


@pytest.mark.parametrize(
    ("of_heads", "is_known"),
    [
        ([[0, 4, 2], [3, 3, 1]], True),
        ([[0, 4, -1], [3, 3, -1]], True),
        ([[0, -1, -1], [3, -1, -1]], True),
        ([[0, 5, 2], [3, 3, 1]], False),
        ([[0, 4, -2], [3, 3, -2]], False),
        ([[0, 4, -1], [3, 3, 1]], False),
        ([[0, 4, 1], [3, 3, -1]], False),
        ([[-1, -1, -1], [-1, -1, -1]], False),
    ],
    ids=str,
)
def test_tokens_that_a_prompt_does_not_have_are_noticed(of_heads, is_known):
    """The second prompt has five tokens, the others seven and two."""
    others = torch.tensor([[6, 5, -1], [0, 1, -1]]), torch.tensor([[1, -1, -1], [0, -1, -1]])
    selected = torch.stack([others[0], torch.tensor(of_heads), others[1]])
    tokens, are_known = checked_preselection("P.preselect_batch", selected[:, None], 2, torch.tensor([7, 5, 2]))
    assert are_known.tolist() == [True, is_known, True]
    assert tokens[0].equal(others[0]) and tokens[2].equal(others[1])
    assert not is_known or tokens[1].tolist() == of_heads
    assert ((tokens[1] >= -1) & (tokens[1] < 5)).all() and (tokens[1, :, 0] >= 0).all()


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 1, 2, 0), (3, 2, 2, 4), (2, 1, 2, 4)], ids=str)
def test_another_selection_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape("P.preselect_batch: expected [3, 1, 2, at least 1] int64 on cpu")):
        checked_preselection("P.preselect_batch", torch.zeros(shape, dtype=torch.int64), 2, torch.tensor([7, 5, 2]))


@pytest.mark.parametrize("result", [None, 3.0, [[1.0]]], ids=str)
def test_what_is_no_tensor_is_refused(result):
    message = rf"A\.b: expected a tensor, got {type(result).__name__}"
    for check in (
        lambda: checked("A.b", result, (1, 1), CPU),
        lambda: checked_tokens("A.b", result, 1, 1, CPU),
        lambda: checked_wish("A.b", result, (1, 1)),
    ):
        with pytest.raises(TypeError, match=message):
            check()


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.zeros(2, 4), "[2, 4] float32 on cpu"),
        pytest.param(torch.zeros(2, 5).to_sparse(), "[2, 5] float32 on cpu, sparse_coo", id="sparse"),
        (torch.zeros(1, 5), "[1, 5] float32 on cpu"),
        (torch.zeros(5), "[5] float32 on cpu"),
        (torch.zeros(2, 5, dtype=torch.float64), "[2, 5] float64 on cpu"),
        (torch.zeros(2, 5, dtype=torch.int64), "[2, 5] int64 on cpu"),
        (torch.zeros(2, 5, device="meta"), "[2, 5] float32 on meta"),
    ],
    ids=str,
)
def test_other_scores_are_refused(result, got):
    message = f"P.score: expected [2, 5] float32 on cpu, got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        checked("P.score", result, (2, 5), CPU)


@pytest.mark.parametrize(
    "result",
    [
        torch.tensor([[0, 1]]),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.int64, device="meta"),
        torch.zeros(2, 3, dtype=torch.int64).to_sparse(),
    ],
    ids=str,
)
def test_other_tokens_are_refused(result):
    message = r"P\.preselect: expected \[2, at least 1\] int64 on cpu, got"
    with pytest.raises(ValueError, match=message):
        checked_tokens("P.preselect", result, 2, 5, CPU)


@pytest.mark.parametrize("wrong", [5, 2**40, -1, -(2**40)])
def test_tokens_that_the_prompt_does_not_have_are_noticed_and_index_nothing(wrong):
    tokens, are_known = checked_tokens("P.preselect", torch.tensor([[0, wrong], [0, 1]]), 2, 5, CPU)
    assert not are_known
    assert tokens.tolist() == [[0, 4 if wrong > 0 else 0], [0, 1]]


@pytest.mark.parametrize("wish", [[[NAN, 1]], [[INF, 1]], [[-1, 2]], [[0, 0]], [[1e308, 1e308]]], ids=str)
def test_a_wish_that_cannot_be_shared_out_is_refused(wish):
    with pytest.raises(ValueError, match=r"A\.wish: expected finite numbers of at least 0, not all of them 0, got"):
        checked_wish("A.wish", torch.tensor(wish, dtype=torch.float64), (1, 2))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), ()], ids=str)
def test_a_wish_of_other_heads_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"A.wish: expected [1, 2], got {list(shape)}")):
        checked_wish("A.wish", torch.ones(shape), (1, 2))
