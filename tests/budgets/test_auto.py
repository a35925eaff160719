"""The arithmetic of a budget that is chosen: bounds, blocks, and prompts too short to lose one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvevict.budgets.auto import AutoBudget
from vllm_kvevict.budgets.curve import Calibration
from vllm_kvevict.cache.plan import EvictionPlan


def auto(beta: float = -8.0, least: float = 0.05, most: float = 0.95, min_tokens: int = 32) -> AutoBudget:
    return AutoBudget(Calibration(alpha=0.0, beta=beta), 0.95, least, most, min_tokens)


@given(
    num_tokens=st.integers(1, 20_000),
    least=st.floats(0.01, 0.99),
    most=st.floats(0.01, 0.99),
    beta=st.floats(-60, 20),
    block_size=st.sampled_from([16, 32]),
)
def test_what_is_chosen_is_inside_the_bounds(
    num_tokens: int, least: float, most: float, beta: float, block_size: int
) -> None:
    least, most = min(least, most), max(least, most)
    budget = auto(beta, least, most)
    plan = budget.plan_most(num_tokens, block_size)
    if plan is None:
        return
    chosen = budget.choose(plan, nll=3.0)
    assert chosen == EvictionPlan(num_tokens, chosen.num_kept_blocks, block_size)
    assert chosen.num_kept_blocks <= plan.num_kept_blocks <= plan.num_blocks
    assert chosen.num_kept_tokens >= min(32, num_tokens)
    assert chosen.num_kept_blocks * block_size >= min(least * num_tokens, num_tokens) - 1e-3
    assert budget.choose(plan, nll=None) is plan


def test_the_fraction_in_blocks() -> None:
    plan = auto().plan_most(3200, 32)
    assert plan == EvictionPlan(3200, 95, 32)
    assert auto().choose(plan, nll=3.0).num_kept_blocks == 38  # 0.374 of 100 blocks
    assert auto(least=0.5).choose(plan, nll=3.0).num_kept_blocks == 50
    assert auto(beta=9.0).choose(plan, nll=3.0).num_kept_blocks == 95


@pytest.mark.parametrize(("num_tokens", "is_evicted"), [(30, False), (64, False), (65, True), (150, True)])
def test_a_prompt_of_as_many_blocks_as_must_stay_is_whole(num_tokens: int, is_evicted: bool) -> None:
    assert (auto().plan_most(num_tokens, 32) is not None) == is_evicted
