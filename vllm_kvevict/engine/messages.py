"""What scheduler and workers tell each other in every step, as attributes on vLLM's own messages."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.config import EvictionConfig

STEP = "kv_eviction_step"
REPORTS = "kv_eviction_reports"


@dataclass(frozen=True)
class PrefillEnd:
    """A request whose prefill ends in a step, or a chunk of it, to be evicted at its end.

    fresh_block_ids: where its kept tokens go, as many as the plan has full blocks; None for its own last blocks
    is_late:         some way into its answer, which has filled the budget or is what the policy waited for
    goes_on:         whether it will be evicted again
    """

    config: EvictionConfig
    plan: EvictionPlan
    fresh_block_ids: list[int] | None
    is_late: bool = False
    goes_on: bool = False


@dataclass(frozen=True)
class ChunkEnd:
    """A request that was evicted before, to be evicted again at the end of a chunk of its prompt.

    goes_on: as in ``PrefillEnd``
    """

    plan: EvictionPlan
    goes_on: bool


@dataclass(frozen=True)
class StepEvictions:
    """Rides on a SchedulerOutput: scheduler and workers cannot disagree, since only one of them decides.

    prefilling: requests of this step that will be evicted, still in the middle of their prompt
    ending:     requests whose prefill ends in this step
    growing:    requests not evicted yet whose answer fills a block in this step -> tokens
    shrinking:  requests evicted before whose answer fills a block, to be emptied at the end of this step -> tokens
    chunks:     requests evicted before of whose prompt this step computes a chunk, to be evicted again
    """

    prefilling: dict[str, EvictionConfig] = field(default_factory=dict)
    ending: dict[str, PrefillEnd] = field(default_factory=dict)
    growing: dict[str, int] = field(default_factory=dict)
    shrinking: dict[str, int] = field(default_factory=dict)
    chunks: dict[str, ChunkEnd] = field(default_factory=dict)


@dataclass(frozen=True)
class EvictionReport:
    """Rides back on a ModelRunnerOutput: what a worker did.

    plan:    the one it has carried out; None if it emptied a block of the answer
    failure: what the policy or the allocator raised; nothing was evicted then, and the request must end
    """

    plan: EvictionPlan | None
    seconds: float
    failure: str | None = None
