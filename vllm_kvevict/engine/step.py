"""What scheduler and workers tell each other in every step, as attributes on vLLM's own messages."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.config import EvictionConfig

STEP = "kv_eviction_step"
REPORTS = "kv_eviction_reports"


@dataclass(frozen=True)
class PrefillEnd:
    """A request whose prefill ends in a step, to be evicted at its end.

    fresh_block_ids: where its kept tokens go, as many as the plan has full blocks; None for its own last blocks
    """

    config: EvictionConfig
    plan: EvictionPlan
    fresh_block_ids: list[int] | None


@dataclass(frozen=True)
class StepEvictions:
    """Rides on a SchedulerOutput: scheduler and workers cannot disagree, since only one of them decides.

    prefilling: requests of this step that will be evicted, still in the middle of their prompt
    ending:     requests whose prefill ends in this step
    """

    prefilling: dict[str, EvictionConfig]
    ending: dict[str, PrefillEnd]


@dataclass(frozen=True)
class EvictionReport:
    """Rides back on a ModelRunnerOutput: what a worker did.

    failure: what the policy or the allocator raised; nothing was evicted then, and the request must end
    """

    plan: EvictionPlan
    seconds: float
    failure: str | None = None
