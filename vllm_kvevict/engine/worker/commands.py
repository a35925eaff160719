"""What the scheduler wants of the workers in one step."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields

from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.engine.messages import StepEvictions


class Commands:
    """The last step's, as they came, whatever has become of the requests meanwhile: the same on all workers.

    plans:     of what is to be evicted: the scheduler waits for a report of each; None for a block of an answer
    scheduled: the requests of the step
    """

    def __init__(self) -> None:
        self.plans: dict[str, EvictionPlan | None] = {}
        self.scheduled: Set[str] = set()
        self._per_token: set[str] = set()

    def take(self, step: StepEvictions, scheduled: Set[str]) -> None:
        """A step begins."""
        first = {req_id: end.plan for req_id, end in step.ending.items()}
        later = first | {req_id: chunk.plan for req_id, chunk in step.chunks.items()}
        self._per_token |= {req_id for req_id, plan in later.items() if plan.per_token}
        self.plans = {**later, **dict.fromkeys(step.shrinking)}
        self.scheduled = scheduled

    def forget(self, req_id: str) -> None:
        """A request has ended, or starts again."""
        self._per_token.discard(req_id)

    def evicted(self) -> list[str]:
        """Return the requests of which tokens go in this step, in an order that all workers have."""
        return sorted(self.plans.keys() | (self._per_token & self.scheduled))


def without(req_ids: Set[str], step: StepEvictions) -> StepEvictions:
    """Return ``step`` without its commands about these requests."""
    if not req_ids:
        return step
    commands = {f.name: getattr(step, f.name) for f in fields(step)}
    return StepEvictions(
        **{name: {key: value for key, value in of.items() if key not in req_ids} for name, of in commands.items()}
    )
