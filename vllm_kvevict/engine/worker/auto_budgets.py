"""How much the requests of a step keep whose budget is "auto"."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_kvevict.engine.worker.agreement import Workers
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.likelihood import PromptLikelihood, mean_nlls
from vllm_kvevict.engine.worker.prefills import PrefillRow
from vllm_kvevict.engine.worker.watched import WatchedRequest
from vllm_kvevict.eviction.prompt import Eviction

_DOING = "choosing the budget"


class AutoBudgets:
    """Chooses them at the end of a prompt, by what was seen of it.

    Every worker takes part for the same requests, whether they have failed on it or not.
    """

    def __init__(self, runner: Any, failures: Failures, workers: Workers) -> None:
        self._likelihood = PromptLikelihood(runner)
        self._failures, self._workers = failures, workers

    def observe(self, rows: list[PrefillRow]) -> None:
        """See the chunks of this step."""
        if rows:
            with self._failures.of([row.request.req_id for row in rows], "the likelihood of prompts"):
                self._likelihood.observe(rows)

    def choose(self, evictions: dict[str, Eviction], watched: dict[str, WatchedRequest]) -> None:
        """Choose the plans of those that end in this step; for their likelihoods the host waits once."""
        chosen = [req_id for req_id in evictions if watched[req_id].auto_budget is not None]
        if not chosen:
            return
        nlls: dict[str, float | None] = {}

        def look(req_ids: list[str]) -> None:
            nlls.update(zip(req_ids, mean_nlls([watched[req_id] for req_id in req_ids]), strict=True))

        if not self._failures.together(_DOING, look, chosen):
            for req_id in chosen:
                self._failures.ask(req_id, _DOING, look, [req_id])
        sizes = []
        for req_id in chosen:
            auto, plan = watched[req_id].auto_budget, evictions[req_id].plan
            adapted = auto and self._failures.ask(req_id, _DOING, auto.choose, plan, nlls.get(req_id))
            sizes.append((adapted or plan).num_kept_blocks)
        for req_id, num_kept in zip(chosen, self._workers.told_by_first(sizes), strict=True):
            eviction = evictions[req_id]
            eviction.adopt(replace(eviction.plan, num_kept_blocks=num_kept))
