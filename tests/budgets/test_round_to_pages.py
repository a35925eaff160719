"""Wishes become whole pages that add up, and nobody gets more than the limits or less than their share."""

import random
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvevict.budgets import round_to_pages

properties = settings(max_examples=120, deadline=None, derandomize=True)


@dataclass
class Case:
    wish: torch.Tensor
    total: int
    minimum: int
    maximum: int

    def round(self) -> torch.Tensor:
        return round_to_pages(self.wish, self.total, self.minimum, self.maximum)


def random_case(kind: str, seed: int) -> Case:
    """Wishes by kind, and limits that leave room for the total, often none to spare."""
    rng = random.Random(seed)
    shape = (rng.randint(1, 5), rng.randint(1, 4))
    count = shape[0] * shape[1]
    draw = {
        "distinct": rng.random,
        "skewed": lambda: rng.random() ** 4,
        "whole": lambda: float(rng.randint(0, 5)),
        "sparse": lambda: rng.choice([0.0, 0.0, 0.0, rng.random()]),
        "equal": lambda: 3.7,
        "zero": lambda: 0.0,
    }[kind]
    wish = torch.tensor([draw() for _ in range(count)], dtype=torch.float64).reshape(shape)
    minimum = rng.choice([0, 0, 1, 3])
    maximum = minimum + rng.choice([0, 1, 5, 40])
    total = rng.choice([minimum * count, rng.randint(minimum * count, maximum * count), maximum * count])
    return Case(wish, total, minimum, maximum)


def cases(*kinds: str) -> st.SearchStrategy[Case]:
    every = ("distinct", "skewed", "whole", "sparse", "equal", "zero")
    return st.builds(random_case, st.sampled_from(kinds or every), st.integers(0, 2**32 - 1))


def exact_pages(wish: list[int], total: int) -> list[int]:
    """Largest remainders in exact arithmetic, ties to the first, for limits that do not bind."""
    shares = [Fraction(one * total, sum(wish)) for one in wish]
    pages = [int(share) for share in shares]
    by_remainder = sorted(range(len(wish)), key=lambda head: (pages[head] - shares[head], head))
    for head in by_remainder[: total - sum(pages)]:
        pages[head] += 1
    return pages


@properties
@given(cases())
def test_pages_add_up_within_the_limits(case):
    before = case.wish.clone()
    pages = case.round()
    assert pages.dtype == torch.int64
    assert pages.shape == case.wish.shape
    assert int(pages.sum()) == case.total
    assert case.minimum <= int(pages.min())
    assert int(pages.max()) <= case.maximum
    assert case.wish.equal(before)


@properties
@given(cases())
def test_a_larger_wish_never_gets_fewer_pages(case):
    wish, pages = case.wish.flatten(), case.round().flatten()
    wishes_more = wish[:, None] > wish
    assert (pages[:, None] >= pages)[wishes_more].all()


@properties
@given(cases())
def test_equal_wishes_differ_by_at_most_one_page(case):
    wish, pages = case.wish.flatten(), case.round().flatten()
    same = wish[:, None] == wish
    assert ((pages[:, None] - pages).abs() <= 1)[same].all()


@properties
@given(cases("distinct", "skewed"), st.randoms(use_true_random=False))
def test_order_of_heads_does_not_matter(case, rng):
    """Random wishes have no ties, so the pages follow their heads."""
    order = list(range(case.wish.numel()))
    rng.shuffle(order)
    permuted = Case(case.wish.flatten()[order].reshape(case.wish.shape), case.total, case.minimum, case.maximum)
    assert permuted.round().flatten().equal(case.round().flatten()[order])


@properties
@given(cases("distinct", "whole", "sparse"), st.integers(0, 50))
def test_pages_are_the_share_rounded_when_no_limit_binds(case, total):
    if case.wish.sum() == 0:
        return
    pages = round_to_pages(case.wish, total, 0, total)
    share = case.wish / case.wish.sum() * total
    assert ((pages - share).abs() < 1 + 1e-9).all()


@properties
@given(cases("distinct", "skewed"))
def test_what_the_limits_cut_off_is_shared_in_proportion(case):
    """Heads that no limit touches have pages in one ratio to their wishes, up to a page of rounding."""
    wish, pages = case.wish.flatten(), case.round().flatten().double()
    free = (pages > case.minimum + 1) & (pages < case.maximum - 1)
    # some scale puts every free head within one page of scale * wish
    lowest, highest = (pages - 1)[free] / wish[free], (pages + 1)[free] / wish[free]
    if free.any():
        assert lowest.max() < highest.min()
        # and a head at a limit would be there, up to that page, at the same scale
        assert (wish[pages == case.maximum] * highest.min() > case.maximum - 1).all()
        assert (wish[pages == case.minimum] * lowest.max() < case.minimum + 1).all()


def test_worked_examples():
    wish = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert round_to_pages(wish, 10, 0, 10).tolist() == [[1, 2], [3, 4]]
    assert round_to_pages(wish, 20, 0, 10).tolist() == [[2, 4], [6, 8]]
    # the last is cut to 12; the rest, 6, is shared 1 : 2 : 3
    assert round_to_pages(torch.tensor([[1.0, 2.0, 3.0, 40.0]]), 18, 0, 12).tolist() == [[1, 2, 3, 12]]
    # the first is raised to 2; the rest, 8, is shared 1 : 3
    assert round_to_pages(torch.tensor([[0.0, 1.0, 3.0]]), 10, 2, 10).tolist() == [[2, 2, 6]]


@pytest.mark.parametrize("count, total", [(1, 5), (4, 8), (4, 7), (6, 1), (3, 0)])
def test_no_wishes_at_all_share_equally(count, total):
    pages = round_to_pages(torch.zeros(1, count), total, 0, 5)[0].tolist()
    assert pages == [total // count + (head < total % count) for head in range(count)]


def test_heads_without_a_wish_take_what_the_others_cannot_hold():
    assert round_to_pages(torch.tensor([[0.0, 7.0, 0.0]]), 9, 0, 5).tolist() == [[2, 5, 2]]
    assert round_to_pages(torch.tensor([[0.0, 7.0, 0.0]]), 5, 0, 5).tolist() == [[0, 5, 0]]


@pytest.mark.parametrize("wish", [[1, 2, 5], [17, 34, 85], [47, 94, 235], [14, 8, 14], [16, 40, 8], [3, 9, 3, 9]])
@pytest.mark.parametrize("total", [5, 6, 7, 12])
def test_ties_go_to_the_first_head(wish, total):
    pages = round_to_pages(torch.tensor([wish], dtype=torch.float64), total, 0, 99)
    assert pages[0].tolist() == exact_pages(wish, total)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_any_scale_of_wishes_gives_the_same_pages(scale):
    wish = torch.tensor([[0.0, 2.0, 5.0, 7.0]], dtype=torch.float64)
    pages = round_to_pages(wish * scale, 13, 0, 6)
    assert pages.equal(round_to_pages(wish, 13, 0, 6))
    assert int(pages.sum()) == 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_wishes_of_any_dtype(dtype):
    assert round_to_pages(torch.tensor([[1, 2, 5]]).to(dtype), 16, 0, 16).tolist() == [[2, 4, 10]]


@pytest.mark.parametrize("total", [-1, 5, 13, 100])
def test_totals_outside_the_limits_are_refused(total):
    with pytest.raises(ValueError, match=f"total: expected between 6 and 12 pages for 6 heads, got {total}"):
        round_to_pages(torch.ones(2, 3), total, 1, 2)


@pytest.mark.parametrize("wrong", [-1e-9, float("nan"), float("inf"), -float("inf")])
def test_wishes_that_are_no_amounts_are_refused(wrong):
    with pytest.raises(ValueError, match="wish: expected finite numbers of at least 0, got"):
        round_to_pages(torch.tensor([[1.0, wrong]]), 4, 0, 4)
