"""Tokens between the ends of a prompt that stay: how many they are, and that no score is above theirs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvevict.budgets.uniform import Uniform
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.protection import marks_of, num_protected, raised
from vllm_kvevict.eviction.selection import select
from vllm_kvevict.policies.knorm import Knorm

SPANS = ((3, 7), (9, 10), (20, 30))


@given(num_sink=st.integers(0, 12), num_recent=st.integers(0, 25), num_tokens=st.integers(1, 40))
def test_no_token_is_counted_twice(num_sink: int, num_recent: int, num_tokens: int) -> None:
    within = {token for start, end in SPANS for token in range(start, end)}
    protected = {*range(num_sink), *range(num_tokens - num_recent, num_tokens), *within} & {*range(num_tokens)}
    assert num_protected(Method(Knorm(), Uniform(), num_sink, num_recent), SPANS, num_tokens) == len(protected)


def test_nothing_is_marked_behind_the_tokens_of_a_request() -> None:
    marks = marks_of([SPANS, (), ((0, 1),)], [22, 30, 5], 30, torch.device("cpu"))
    assert marks is not None
    assert [row.nonzero()[:, 0].tolist() for row in marks] == [[3, 4, 5, 6, 9, 20, 21], [], [0]]
    assert marks_of([(), ()], [22, 30], 30, torch.device("cpu")) is None


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_whatever_a_policy_says_marked_tokens_stay(value: float) -> None:
    marks = marks_of([((8, 10),)], [10], 10, torch.device("cpu"))
    scores = torch.full((1, 2, 10), value)
    before = scores.clone()
    assert marks is not None
    kept = select(raised(scores, marks[:, None]), torch.full((1, 2), 3))
    assert kept[..., 8:].all() and kept[..., 0].all() and int(kept.sum()) == 6
    assert scores.equal(before) or scores.isnan().all()  # those that are held stay as they are
