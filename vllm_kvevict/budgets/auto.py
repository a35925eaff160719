"""The budget of a prompt that is chosen when its end is known: between two bounds, by a calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_kvevict.budgets.curve import Calibration
from vllm_kvevict.cache.plan import EvictionPlan, budget_blocks, cdiv


@dataclass(frozen=True)
class AutoBudget:
    """How a prompt's budget is chosen. The scheduler plans for the most; the workers choose when they know the prompt.

    target:     quality that shall be left, see ``Calibration``
    least:      fraction of the prompt that is kept at least
    most:       and at most
    min_tokens: a budget never keeps fewer blocks than these tokens need
    """

    calibration: Calibration
    target: float
    least: float
    most: float
    min_tokens: int

    def plan_most(self, num_tokens: int, block_size: int) -> EvictionPlan | None:
        """Return the plan for the most that a prompt of ``num_tokens`` may keep, None if the least is all of it."""
        least, most = (self._num_blocks(num_tokens, fraction, block_size) for fraction in (self.least, self.most))
        num_blocks = cdiv(num_tokens, block_size)
        return None if least >= num_blocks else EvictionPlan(num_tokens, min(most, num_blocks), block_size)

    def choose(self, plan: EvictionPlan, nll: float | None) -> EvictionPlan:
        """Return ``plan`` with as many blocks as the prompt needs, or all that it has.

        nll: mean negative log-likelihood of the prompt's tokens; None if none was looked at
        """
        if nll is None:
            return plan
        fraction = max(self.calibration.fraction(self.target, nll), self.least)
        num_kept = self._num_blocks(plan.num_tokens, fraction, plan.block_size)
        return replace(plan, num_kept_blocks=min(num_kept, plan.num_kept_blocks))

    def _num_blocks(self, num_tokens: int, fraction: float, block_size: int) -> int:
        return budget_blocks(num_tokens, fraction, block_size, self.min_tokens, during_decode=False)
