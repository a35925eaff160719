"""The worker's side of eviction: which rows of a batch are evicted, which are to be, and where their pages are."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvevict.cache.page_table import FoldedBatch, PageTable
from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.cache.plan import cdiv
from vllm_kvevict.engine.model import ModelWeights
from vllm_kvevict.engine.prefill import Prefill, PrefillRow
from vllm_kvevict.engine.step import STEP, EvictionReport, PrefillEnd, StepEvictions
from vllm_kvevict.evictor import Eviction

logger = logging.getLogger("vllm.kvevict")


@dataclass(frozen=True)
class RowSplit:
    """A batch as attention must see it.

    whole:        rows [num_whole] int64 whose cache is complete
    evicted:      rows [num_evicted] int64 that read their own page tables
    whole_tokens: tokens [*] int64 of the whole rows, None if that is all of them
    """

    whole: torch.Tensor
    evicted: torch.Tensor
    whole_tokens: torch.Tensor | None


@dataclass(frozen=True)
class FoldedQueries:
    """The query tokens of evicted rows, sorted by row, then KV head, then position.

    index:           [num_queries] int64 into the batch's queries seen as [num_tokens * num_kv_heads, group, head_size]
    query_start_loc: [num_evicted * num_kv_heads + 1] int32, where the queries of each row and head begin
    max_query_len:   most queries of a row of the batch, evicted or not
    """

    index: torch.Tensor
    query_start_loc: torch.Tensor
    max_query_len: int


@dataclass(frozen=True)
class StepRows:
    """One step's batch: how it splits, what its evicted rows ask and read, and which of its rows are to be scored."""

    split: RowSplit
    queries: FoldedQueries | None
    folded: FoldedBatch | None
    prefills: list[PrefillRow]


class EvictionBridge:
    """Knows, in every step, the requests behind the rows. One per model; its attention builder asks it.

    row_req_ids: of the last batch that was not all stock attention's
    evictions:   of the requests whose prefill ended in the last step

    num_extra_tokens: tokens of a row beyond those that the scheduler counts
    """

    num_extra_tokens: ClassVar[int] = 0

    def __init__(self, runner: Any, pool: PagePool, layer_names: list[str], max_num_reqs: int) -> None:
        self._runner = runner
        self._layer_names = layer_names
        self.forget_weights()
        self.pool = pool
        self.layer_index = {name: index for index, name in enumerate(layer_names)}
        self.page_table = PageTable(pool, max_num_reqs)
        self._prefills: dict[str, Prefill] = {}
        self._step: StepEvictions | None = None
        self.row_req_ids: list[str] = []
        self.evictions: dict[str, Eviction] = {}
        self._row_slots: tuple[list[str], int, torch.Tensor] = ([], -1, torch.empty(0, dtype=torch.int64))

    def forget_weights(self) -> None:
        """The model has new weights: what policies read of the old ones is of no use any more."""
        self._weights = ModelWeights(self._model(), self._layer_names)

    def _model(self) -> Any:
        return self._runner.get_model()

    def begin_step(self, output: SchedulerOutput) -> None:
        """Forget the requests that ended, and take over the scheduler's decisions for this step."""
        for req_id in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.page_table.remove(req_id)
            self._prefills.pop(req_id, None)
        self._step = getattr(output, STEP)
        self.evictions = {}

    def end_step(self) -> dict[str, EvictionReport]:
        """After the last layer: allocate, select and compact what the layers have scored."""
        reports = {}
        for req_id, eviction in self.evictions.items():
            prefill = self._prefills.pop(req_id)
            failure = prefill.failure or self._finish(req_id, eviction)
            seconds = eviction.seconds + prefill.seconds
            reports[req_id] = EvictionReport(eviction.plan, seconds, None if failure is None else repr(failure))
        self._step = None
        return reports

    def _finish(self, req_id: str, eviction: Eviction) -> Exception | None:
        """Evict, or return what the allocator raised. Tokens move only into blocks that no other request reads."""
        try:
            compaction = eviction.finish()
        except Exception as error:
            logger.exception("the eviction of request %s failed", req_id)
            return error
        self.page_table.add(req_id, compaction, eviction.plan)
        return None

    def rows(self, common: CommonAttentionMetadata) -> StepRows | None:
        """Return what is special about this batch, None if stock attention serves all of it."""
        step = self._step
        if step is None or not (len(self.page_table) or step.prefilling or step.ending):
            return None
        req_ids = self.row_req_ids = self._row_req_ids(common)
        slots = self._slots(req_ids)
        split = _split(slots, common)
        prefills = self._prefill_rows(req_ids, common, step)
        if not len(split.evicted) and not prefills:
            return None
        if not len(split.evicted):
            return StepRows(split, None, None, prefills)
        evicted = split.evicted
        query_lens = common.naive_query_lens().to(torch.int64)[evicted]
        folded = self.page_table.fold(
            slots[evicted], common.seq_lens[evicted], query_lens, common.block_table_tensor[evicted].to(torch.int64)
        )
        first_tokens = common.query_start_loc[:-1].to(torch.int64)[evicted]
        queries = _fold_queries(first_tokens, query_lens, self.pool.num_kv_heads, common.max_query_len)
        return StepRows(split, queries, folded, prefills)

    def _row_req_ids(self, common: CommonAttentionMetadata) -> list[str]:
        if common.req_idx is not None:  # model runner V2
            return [self._runner.req_states.index_to_req_id[index] for index in common.req_idx.tolist()]
        return list(self._runner.input_batch.req_ids[: common.num_reqs])

    def _slots(self, req_ids: list[str]) -> torch.Tensor:
        """Return [num_reqs] int64 page-table slots, -1 for whole rows; found again only when the batch changes."""
        known_ids, generation, slots = self._row_slots
        if generation != self.page_table.generation or known_ids != req_ids:
            found = [self.page_table.slot(req_id) for req_id in req_ids]
            slots = torch.tensor([-1 if slot is None else slot for slot in found], device=self.pool.pages.device)
            self._row_slots = (req_ids, self.page_table.generation, slots)
        return slots

    def _prefill_rows(
        self, req_ids: list[str], common: CommonAttentionMetadata, step: StepEvictions
    ) -> list[PrefillRow]:
        if not (step.prefilling or step.ending):
            return []
        bounds = common.query_start_loc_cpu.tolist()
        rows = []
        for row, req_id in enumerate(req_ids):
            if req_id in step.prefilling:
                config, end = step.prefilling[req_id], None
            elif req_id in step.ending:
                config, end = step.ending[req_id].config, step.ending[req_id]
            else:
                continue
            kv_len = int(common.seq_lens[row]) - self.num_extra_tokens
            block_ids = common.block_table_tensor[row, : cdiv(kv_len, self.pool.block_size)].to(torch.int64)
            if req_id not in self._prefills:
                self._prefills[req_id] = Prefill(config.method(), self.pool.num_layers)
            prefill = self._prefills[req_id]
            eviction = None
            if end is not None:
                if kv_len != end.plan.num_tokens:
                    raise RuntimeError(
                        f"request {req_id}: the scheduler ends its prefill at {end.plan.num_tokens} tokens, "
                        f"the worker holds {kv_len}"
                    )
                eviction = Eviction(prefill.method, end.plan, self.pool, block_ids, self._fresh(end))
                self.evictions[req_id] = eviction
            end_token = bounds[row + 1] - self.num_extra_tokens
            rows.append(PrefillRow(prefill, bounds[row], end_token, block_ids, kv_len, eviction))
        return rows

    def _fresh(self, end: PrefillEnd) -> torch.Tensor | None:
        ids = end.fresh_block_ids
        return None if ids is None else torch.tensor(ids, dtype=torch.int64, device=self.pool.pages.device)

    def observe(self, row: PrefillRow, layer: int, query: torch.Tensor, output: torch.Tensor, scale: float) -> None:
        """Show a layer's queries and outputs [num_tokens, num_heads, head_size] to one row of the batch.

        Whatever a policy raises, maybe one of a third party, ends its request and not the engine.
        """
        prefill = row.prefill
        if prefill.failure is not None:
            return
        try:
            row.observe(self.pool, layer, query, output, scale, self._weights.of(layer, prefill.needs))
        except Exception as error:
            prefill.failure = error
            logger.exception("a policy failed in layer %d", layer)


def _split(slots: torch.Tensor, common: CommonAttentionMetadata) -> RowSplit:
    is_evicted = slots >= 0
    evicted = is_evicted.nonzero()[:, 0]
    whole = (~is_evicted).nonzero()[:, 0]
    if not len(evicted):
        return RowSplit(whole, evicted, None)
    token_is_whole = torch.repeat_interleave(~is_evicted, common.naive_query_lens().to(torch.int64))
    return RowSplit(whole, evicted, token_is_whole.nonzero()[:, 0])


def _fold_queries(
    first_tokens: torch.Tensor, query_lens: torch.Tensor, num_kv_heads: int, max_query_len: int
) -> FoldedQueries:
    """first_tokens, query_lens: [num_evicted] int64, where the tokens of each row begin, and how many there are."""
    lens = query_lens.repeat_interleave(num_kv_heads)
    query_start_loc = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    head = torch.arange(num_kv_heads, device=lens.device).repeat(len(query_lens))
    # a query's place in the batch, less its place in the folded order: the same for all queries of one row and head
    shift = first_tokens.repeat_interleave(num_kv_heads) - query_start_loc[:-1]
    place = torch.arange(int(query_start_loc[-1]), device=lens.device)
    tokens = place + shift.repeat_interleave(lens)
    index = tokens * num_kv_heads + head.repeat_interleave(lens)
    return FoldedQueries(index, query_start_loc.to(torch.int32), max_query_len)
