"""What scheduler and workers tell each other in every step, on vLLM's own messages, and what front ends hear."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.eviction.protection import Spans

STEP = "kv_eviction_step"
REPORTS = "kv_eviction_reports"
PAYLOAD = "kv_eviction"


@dataclass(frozen=True)
class PrefillEnd:
    """A request whose prefill ends in a step, or a chunk of it, to be evicted at its end.

    fresh_block_ids: where its kept tokens go, as many as the plan has full blocks; None for its own last blocks
    is_late:         some way into its answer, which has filled the budget or is what the policy waited for
    goes_on:         whether it will be evicted again
    spans:           what is protected beside both ends of its prompt
    """

    config: EvictionConfig
    plan: EvictionPlan
    fresh_block_ids: list[int] | None
    is_late: bool = False
    goes_on: bool = False
    spans: Spans = ()


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

    @property
    def answers(self) -> dict[str, int]:
        """Requests whose answer is looked at behind this step -> tokens."""
        late = {req_id: end.plan.num_tokens for req_id, end in self.ending.items() if end.is_late}
        return {**self.growing, **self.shrinking, **late}

    @property
    def planned(self) -> dict[str, int]:
        """Requests with a decision about how many tokens they have behind this step -> tokens."""
        plans = [(req_id, end.plan) for req_id, end in self.ending.items()]
        plans += [(req_id, end.plan) for req_id, end in self.chunks.items()]
        return self.answers | {req_id: plan.num_tokens for req_id, plan in plans}


@dataclass(frozen=True)
class EvictionReport:
    """Rides back on a ModelRunnerOutput: what a worker did.

    plan:    the one it has carried out; None if it emptied a block of the answer
    failure: what the policy or the allocator raised; nothing was evicted then, and the request must end
    """

    plan: EvictionPlan | None
    seconds: float
    failure: str | None = None


@dataclass
class EvictionRecord:
    """What one eviction did; plain JSON so that it fits into vLLM's stats.

    during_decode:  whether a block of the answer was evicted, and not a prompt: only its tokens are counted

    evicted_tokens: tokens dropped, averaged over layers and KV heads
    freed_blocks:   blocks given back to vLLM's pool
    kept_fraction:  tokens kept / tokens of the prompt
    seconds:        score + allocate + select + compact, in the worker; None for a record of freed blocks
    """

    policy: str
    allocator: str
    evicted_tokens: int = 0
    freed_blocks: int = 0
    kept_fraction: float = 0.0
    seconds: float | None = None
    during_decode: bool = False


@dataclass
class Gauges:
    """What all evicted requests together hold of their prompts.

    kept_tokens: tokens per KV head and layer
    kept_pages:  pages of one worker
    """

    kept_tokens: int = 0
    kept_pages: int = 0


def pack(records: list[EvictionRecord], gauges: Gauges, num_cut_short: int = 0) -> dict[str, Any]:
    """Return the payload in which records travel from the engine to the front end.

    num_cut_short: answers that ended since the cache could hold no more of them
    """
    return {PAYLOAD: [asdict(record) for record in records], "gauges": asdict(gauges), "cut_short": num_cut_short}
