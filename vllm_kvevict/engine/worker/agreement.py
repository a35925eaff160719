"""What the workers that share requests tell each other, of failures and of budgets. None waits for a device over it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from vllm_kvevict.engine.worker.guard import Failures

_ELSEWHERE = "it failed on another worker, whose log says why"
# vLLM's own messages between the stages of a pipeline have none
_TAG = 0x6B76
# far more than there are steps in flight: what was sent before has long arrived
_MOST_SENDING = 64


class Workers:
    """Tensor-parallel workers, each with some of the heads of a request, and stages of a pipeline, with some layers.

    What they exchange follows from the scheduler's commands alone, so that all of them exchange it in the same steps.
    """

    def __init__(self, parallel: ParallelConfig | None = None) -> None:
        """parallel: None for a worker that need not agree with others."""
        self._num_ranks = 1 if parallel is None else parallel.tensor_parallel_size
        self._num_stages = 1 if parallel is None else parallel.pipeline_parallel_size
        self._sending: deque[tuple[Any, torch.Tensor]] = deque()

    @property
    def are_several(self) -> bool:
        return self._num_ranks > 1 or self._num_stages > 1

    def agree(self, failures: Failures, req_ids: Sequence[str]) -> None:
        """Agree with the tensor-parallel workers on which of these requests have failed on any of them."""
        if self._num_ranks == 1:
            failures.all_know()
        elif req_ids:
            failed = _flags(failures, req_ids)
            group = get_tp_group().cpu_group
            torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX, group=group)
            _note(failures, req_ids, failed)

    def told_by_first(self, numbers: Sequence[int]) -> list[int]:
        """Return what the first of the tensor-parallel workers has found, whatever the last digits of others' sums."""
        if self._num_ranks == 1:
            return list(numbers)
        told, group = torch.tensor(numbers), get_tp_group()
        torch.distributed.broadcast(told, src=group.first_rank, group=group.cpu_group)
        return told.tolist()

    def hand_on(self, failures: Failures, req_ids: Sequence[str]) -> None:
        """Tell the last stage, whose worker reports, which of these requests have failed on an earlier one.

        An earlier stage does not wait for it, nor hear of later ones: it may have moved tokens of a request that fails
        there. Such a request ends, and nobody else has the blocks that they went to.
        """
        if self._num_stages == 1 or not req_ids:
            return
        group = get_pp_group()
        if not group.is_last_rank:
            failed = _flags(failures, req_ids)
            work = torch.distributed.isend(failed, dst=group.last_rank, group=group.cpu_group, tag=_TAG)
            self._sending.append((work, failed))
            if len(self._sending) > _MOST_SENDING:
                self._sending.popleft()[0].wait()
            return
        for stage in group.ranks[:-1]:
            failed = torch.zeros(len(req_ids), dtype=torch.int32)
            torch.distributed.recv(failed, src=stage, group=group.cpu_group, tag=_TAG)
            _note(failures, req_ids, failed)


def _flags(failures: Failures, req_ids: Sequence[str]) -> torch.Tensor:
    return torch.tensor([req_id in failures for req_id in req_ids], dtype=torch.int32)


def _note(failures: Failures, req_ids: Sequence[str], failed: torch.Tensor) -> None:
    for req_id, has_failed in zip(req_ids, failed.tolist(), strict=True):
        if has_failed:
            failures.note(req_id, _ELSEWHERE)
    failures.all_know(req_ids)
