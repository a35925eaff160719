"""The arithmetic of blocks: what the scheduler and the workers compute apart from each other."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvevict.cache.plan import (
    EvictionPlan,
    cdiv,
    min_kept_blocks,
    plan_eviction,
    plan_first_eviction,
    plan_per_token,
)

properties = settings(max_examples=300, deadline=None, derandomize=True)
block_sizes = st.sampled_from([1, 16, 32, 64])
prompt_lengths = st.integers(1, 2000)
token_budgets = st.integers(1, 2500)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
protections = st.integers(0, 300)


def fewest_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks that hold the tokens, by trying."""
    return next(n for n in range(num_tokens + 1) if n * block_size >= num_tokens)


def at_least(tokens: Fraction) -> int:
    """Return the next whole number; what is less than a millionth above one is what a float made of it."""
    return -int(-(tokens - Fraction(1, 2_000_000)) // 1)


@properties
@given(prompt_lengths, token_budgets | fractions, block_sizes, protections)
def test_parts_of_a_plan_add_up(num_tokens, budget, block_size, num_protected):
    plan = plan_eviction(num_tokens, budget, block_size, num_protected)
    if plan is None:
        return
    assert plan.num_blocks == fewest_blocks(num_tokens, block_size)
    assert 1 <= plan.first_kept_block == plan.num_blocks - plan.num_kept_blocks
    assert plan.num_kept_blocks >= 1
    assert plan.num_full_blocks >= 0
    assert 0 <= plan.num_tail_tokens < block_size
    # what is kept fits the kept blocks, and is evicted in whole blocks
    assert plan.num_kept_tokens + plan.num_evicted_tokens == num_tokens
    assert plan.num_evicted_tokens == plan.first_kept_block * block_size
    assert fewest_blocks(plan.num_kept_tokens, block_size) == plan.num_kept_blocks


@properties
@given(prompt_lengths, token_budgets | fractions, block_sizes, protections)
def test_protected_tokens_always_fit(num_tokens, budget, block_size, num_protected):
    plan = plan_eviction(num_tokens, budget, block_size, num_protected)
    kept = num_tokens if plan is None else plan.num_kept_tokens
    assert kept >= min(num_protected, num_tokens)


@properties
@given(prompt_lengths, token_budgets | fractions, block_sizes, protections)
def test_keeps_the_fewest_blocks_that_do_and_none_is_freed_in_vain(num_tokens, budget, block_size, num_protected):
    """The budget rounded up to blocks, more only if the tail could leave too little for the protected tokens."""
    budget_tokens = budget if isinstance(budget, int) else at_least(Fraction(budget) * num_tokens)
    wanted = max(
        fewest_blocks(budget_tokens, block_size),
        next(n for n in range(1, num_protected + 2) if (n - 1) * block_size + 1 >= num_protected),
    )
    plan = plan_eviction(num_tokens, budget, block_size, num_protected)
    if wanted >= fewest_blocks(num_tokens, block_size):
        assert plan is None
    else:
        assert plan == EvictionPlan(num_tokens, wanted, block_size)


@properties
@given(prompt_lengths, token_budgets | fractions, block_sizes, protections)
def test_during_decode_a_request_never_needs_more_than_its_first_blocks(num_tokens, budget, block_size, num_protected):
    """The full pages and one that the answer fills: as many blocks, whether the prompt or the answer is too long."""
    plan = plan_eviction(num_tokens, budget, block_size, num_protected, during_decode=True)
    is_late = plan is None
    if is_late:
        plan = plan_first_eviction(num_tokens, budget, block_size, num_protected)
        assert num_tokens < plan.num_tokens
        assert plan.num_tail_tokens == 0
        assert plan.first_kept_block == 1
    most = plan.num_full_blocks + 1
    assert plan.num_kept_blocks == most - (plan.num_tail_tokens == 0)
    assert plan.num_full_blocks * block_size >= num_protected
    budget_tokens = budget if isinstance(budget, int) else at_least(Fraction(budget) * num_tokens)
    assert most == max(fewest_blocks(budget_tokens, block_size), fewest_blocks(max(num_protected, 1), block_size) + 1)
    whole = plan_eviction(num_tokens, budget, block_size, num_protected)
    if whole is not None and plan.num_tail_tokens > 0 and not is_late:
        assert plan.num_kept_blocks >= whole.num_kept_blocks


@properties
@given(prompt_lengths, token_budgets | fractions, block_sizes, protections)
def test_token_by_token_a_request_holds_full_blocks_and_one_that_is_written_to(num_tokens, budget, block_size, needed):
    plan = plan_per_token(num_tokens, budget, block_size, needed)
    blockwise = plan_eviction(num_tokens, budget, block_size, needed, during_decode=True)
    if blockwise is None:
        blockwise = plan_first_eviction(num_tokens, budget, block_size, needed)
    assert plan.num_full_blocks == blockwise.num_full_blocks
    assert plan.num_kept_tokens == plan.num_full_blocks * block_size >= needed
    assert plan.num_tokens == max(num_tokens, plan.num_kept_tokens)
    assert plan.num_tail_tokens == 0
    assert plan.num_evicted_tokens == plan.num_tokens - plan.num_kept_tokens >= 0
    assert plan.num_kept_blocks == plan.num_full_blocks + (plan.num_tokens % block_size > 0)


@properties
@given(token_budgets, block_sizes, protections, st.integers(1, 2000))
def test_first_kept_block_never_falls_as_a_prompt_grows(budget, block_size, num_protected, num_tokens):
    first = [
        0 if plan is None else plan.first_kept_block
        for length in range(num_tokens, num_tokens + 2 * block_size + 2)
        for plan in [plan_eviction(length, budget, block_size, num_protected)]
    ]
    assert first == sorted(first)


@properties
@given(protections, block_sizes)
def test_min_kept_blocks_holds_whatever_the_tail(num_protected, block_size):
    blocks = min_kept_blocks(num_protected, block_size)
    assert blocks >= 1
    assert (blocks - 1) * block_size + 1 >= num_protected  # a tail of one token
    if blocks > 1:
        assert (blocks - 2) * block_size + 1 < num_protected


@pytest.mark.parametrize(
    "num_tokens, budget, num_protected, kept_blocks, kept_tokens",
    [
        (100, 48, 0, 3, 36),  # the tail of 4 takes the last of 3 blocks
        (96, 48, 0, 3, 48),
        (96, 33, 0, 3, 48),
        (96, 32, 0, 2, 32),
        (96, 1, 0, 1, 16),
        (97, 1, 0, 1, 1),
        (97, 1, 1, 1, 1),
        (97, 1, 2, 2, 17),
        (97, 1, 18, 3, 33),
        (100, 0.5, 0, 4, 52),
        (96, 0.5, 0, 3, 48),
        (100, 1e-9, 40, 4, 52),
    ],
)
def test_worked_examples(num_tokens, budget, num_protected, kept_blocks, kept_tokens):
    plan = plan_eviction(num_tokens, budget, 16, num_protected)
    assert plan is not None
    assert (plan.num_kept_blocks, plan.num_kept_tokens) == (kept_blocks, kept_tokens)


@pytest.mark.parametrize(
    "num_tokens, budget, num_protected",
    [(96, 96, 0), (96, 81, 0), (97, 97, 0), (97, 0.99, 0), (33, 1, 33), (16, 1, 0), (96, 2**40, 0)],
)
def test_nothing_to_free(num_tokens, budget, num_protected):
    assert plan_eviction(num_tokens, budget, 16, num_protected) is None


@pytest.mark.parametrize(
    "a, b, expected", [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (2**60 + 1, 2, 2**59 + 1)]
)
def test_cdiv(a, b, expected):
    assert cdiv(a, b) == expected
