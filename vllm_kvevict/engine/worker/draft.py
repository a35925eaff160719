"""Eviction in the layers of a draft model, which share the blocks of the model they draft for."""

from __future__ import annotations

import logging
from collections.abc import Set
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.messages import PrefillEnd
from vllm_kvevict.engine.worker.agreement import Workers
from vllm_kvevict.engine.worker.bridge import EvictionBridge
from vllm_kvevict.engine.worker.prefills import PrefillRow
from vllm_kvevict.engine.worker.rows import StepRows
from vllm_kvevict.engine.worker.side_memory import Held
from vllm_kvevict.engine.worker.step import Step
from vllm_kvevict.eviction.prompt import Eviction

logger = logging.getLogger("vllm.kvevict")


class DraftBridge(EvictionBridge):
    """Evicts what a draft model has cached of a prompt, by scores of its own, into the same blocks as the target's.

    The drafter runs when the target's layers are through: first over the step's tokens and the one that was sampled
    after them, then token by token. What it keeps decides how many drafts are accepted, never what is answered: where
    it cannot be scored, its last tokens stay.
    """

    num_extra_tokens: ClassVar[int] = 1

    def __init__(self, runner: Any, pool: PagePool, layer_names: list[str], held: Held, target: EvictionBridge) -> None:
        super().__init__(runner, pool, layer_names, held)
        self._workers = Workers()  # what one of them keeps is nothing to the others
        self._target = target
        self._is_first_pass = True

    def begin_step(self, output: SchedulerOutput) -> None:
        super().begin_step(output)
        self._is_first_pass = True

    def _failed_before(self) -> Set[str]:
        return self._target.failures.known_to_all

    def rows(self, common: CommonAttentionMetadata) -> StepRows | None:
        rows = super().rows(common)
        self._is_first_pass = False
        return rows

    def _row_req_ids(self, common: CommonAttentionMetadata) -> list[str]:
        return self._target.step.req_ids

    def _check_lengths(self, common: CommonAttentionMetadata) -> None:
        """The target has: a drafter's passes run over other tokens than the step's."""

    def _prefill_rows(self, common: CommonAttentionMetadata, step: Step) -> list[PrefillRow]:
        return super()._prefill_rows(common, step) if self._is_first_pass else []

    def _choose_budgets(self, step: Step) -> None:
        """What the target has chosen: both keep the same blocks."""
        for req_id, eviction in step.evictions.items():
            eviction.adopt(self._target.step.evictions[req_id].plan)

    def evict(self) -> dict[str, float]:
        """After the drafter's last pass: as ``end_step``, and return the seconds that each request took."""
        ending = {} if self.step.is_over else dict(self.step.decisions.ending)
        for req_id in ending:
            if (failure := self._target.failures.get(req_id)) is not None:
                self.failures.note(req_id, failure)
        reports = self.end_step()
        seconds = {req_id: reports[req_id].seconds for req_id in ending}
        for req_id, end in ending.items():
            if req_id not in self.page_table and req_id not in self._target.failures:
                seconds[req_id] += self._keep_last(req_id, end)
        return seconds

    def _keep_last(self, req_id: str, end: PrefillEnd) -> float:
        """The drafter sat out, which vLLM has it do near the longest length it can take, or a policy failed."""
        logger.warning("request %s: the draft model keeps its last tokens, it could not be scored", req_id)
        method = EvictionConfig(policy="streaming_llm", budget=end.config.most_kept).method()
        target = self._target.step.evictions[req_id]
        eviction = Eviction(method, target.plan, self.pool, target.block_ids, target.fresh_block_ids, end.spans)
        no_query = torch.empty(0, self.pool.num_kv_heads, self.pool.head_size, device=target.block_ids.device)
        for layer in range(self.pool.num_layers):
            eviction.score_layer(layer, no_query, scale=1.0)
        self.page_table.add([req_id], eviction.finish().pages, [target.plan], [eviction.full_block_ids])
        self._watched.pop(req_id, None)
        self.failures.forget(req_id)
        return eviction.seconds
