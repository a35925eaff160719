"""How much the requests of a step keep whose budget is "auto"."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.likelihood import PromptLikelihood
from vllm_kvevict.engine.worker.watched import PrefillRow, WatchedRequest
from vllm_kvevict.eviction.prompt import Eviction


class AutoBudgets:
    """Chooses them at the end of a prompt, by what was seen of it.

    Every worker takes part for the same requests, whether they have failed on it or not.
    """

    def __init__(self, runner: Any, failures: Failures) -> None:
        self._likelihood = PromptLikelihood(runner)
        self._failures = failures

    def observe(self, rows: list[PrefillRow]) -> None:
        """See the chunks of this step."""
        if rows:
            with self._failures.of([row.request.req_id for row in rows], "the likelihood of prompts"):
                self._likelihood.observe(rows)

    def choose(self, evictions: dict[str, Eviction], watched: dict[str, WatchedRequest]) -> None:
        """Choose the plans of those that end in this step."""
        chosen = {}
        for req_id, eviction in evictions.items():
            auto, nll = watched[req_id].auto_budget, watched[req_id].nll
            if auto is not None:
                plan = self._failures.ask(req_id, "choosing the budget", auto.choose, eviction.plan, nll)
                chosen[req_id] = plan or eviction.plan
        if chosen:
            # all workers free the same blocks, whatever the last digits of their sums are
            device = next(iter(evictions.values())).block_ids.device
            sizes = torch.tensor([plan.num_kept_blocks for plan in chosen.values()], device=device)
            sizes = get_tp_group().broadcast(sizes, src=0)
            for (req_id, plan), num_kept in zip(chosen.items(), sizes.tolist(), strict=True):
                evictions[req_id].adopt(replace(plan, num_kept_blocks=num_kept))
