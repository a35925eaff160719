"""Requests that are evicted for the first time in a step: who is scored with whom, and what each keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vllm_kvevict.cache.pages import PagePool
from vllm_kvevict.engine.worker.guard import Failures
from vllm_kvevict.engine.worker.prefills import ObservedChunks, Prefill, PrefillGroup, PrefillRow
from vllm_kvevict.engine.worker.step import Step
from vllm_kvevict.engine.worker.watched import WatchedRequest
from vllm_kvevict.eviction.grouping import chosen_together, observed_together, scored_together
from vllm_kvevict.eviction.prompt import Evictions
from vllm_kvevict.policies.base import Need

_DOING = "choosing what to keep"
# some requests, and their evictions, which go on together
Part = tuple[list[str], Evictions]


def in_groups(rows: list[PrefillRow], step: Step, pool: PagePool, num_heads: int) -> list[Prefill]:
    """Return ``rows``, as policies look at them: first those that they observe all queries of, then those in groups
    whose layers are scored together, which the step notes, then the others.
    """
    ending = {row.req_id: row for row in rows if row.eviction is not None}
    groups = [
        PrefillGroup([ending[req_id] for req_id in req_ids], evictions)
        for req_ids, evictions in scored_together({req_id: step.evictions[req_id] for req_id in ending})
    ]
    step.groups += groups
    grouped = {req_id for group in groups for req_id in group.req_ids}
    others = [row for row in rows if row.req_id not in grouped]
    scored: list[PrefillGroup | PrefillRow] = [*groups, *others]
    step.ahead += [prefill for prefill in scored if prefill.looks_ahead]
    return [*_observed(rows, pool, num_heads), *scored]


def _observed(rows: list[PrefillRow], pool: PagePool, num_heads: int) -> list[ObservedChunks]:
    asked = {row.req_id: row for row in rows if Need.ALL_QUERIES in row.request.needs and row.end > row.start}
    facts = {req_id: (row.request.method, row.kv_len) for req_id, row in asked.items()}
    groups = observed_together(facts, num_heads, pool.num_kv_heads, pool.head_size)
    together = [[asked[req_id] for req_id in group] for group in groups]
    return [ObservedChunks(group, pool.pages_of_each([row.block_ids for row in group])) for group in together]


def choose_kept(step: Step, watched: Mapping[str, WatchedRequest], pool: PagePool, failures: Failures) -> None:
    """Choose for all together that can, and one by one where that fails; the step notes who moves with whom.

    The host waits for the device once, whatever is due.
    """
    for req_id, eviction in step.evictions.items():  # first: what was summed up moves with those that keep something
        if watched[req_id].method.schedule.is_bounded:
            shape = pool.num_kv_heads, eviction.plan.num_tokens
            failures.ask(req_id, _DOING, watched[req_id].check_states, shape, pool.pages.device)
    parts = [part for whole in _together(step, failures) for part in _each(Evictions.summarise, whole, step, failures)]
    # where that fails each copies for itself when it chooses
    failures.together(_DOING, Evictions.fetch, [evictions for _, evictions in parts])
    step.chosen += [part for whole in parts for part in _each(Evictions.choose, whole, step, failures)]


def _together(step: Step, failures: Failures) -> list[Part]:
    """Return who is chosen for together."""
    for group in step.groups:
        if any(req_id in failures for req_id in group.req_ids):
            group.break_up()
    found: list[Part] = [(group.req_ids, group.evictions) for group in step.groups if not group.parts]
    grouped = {req_id for req_ids, _ in found for req_id in req_ids}
    alone = {req_id: eviction for req_id, eviction in step.evictions.items() if req_id not in grouped}
    for req_id, eviction in alone.items():
        failures.ask(req_id, _DOING, eviction.score_waiting)

    def join(req_ids: list[str]) -> None:
        found.append((req_ids, Evictions.joined([step.evictions[req_id] for req_id in req_ids])))

    for req_ids in chosen_together({req_id: one for req_id, one in alone.items() if req_id not in failures}):
        if not failures.together(_DOING, join, req_ids):
            found += [([req_id], step.evictions[req_id].alone) for req_id in req_ids]
    return found


def _each(verb: Callable[[Evictions], object], part: Part, step: Step, failures: Failures) -> list[Part]:
    """Do something for some requests together, for each by itself where that fails; return who went on with whom."""
    req_ids, evictions = part
    if len(req_ids) > 1 and failures.together(_DOING, verb, evictions):
        return [part]
    evictions.break_up()
    parts: list[Part] = [([req_id], step.evictions[req_id].alone) for req_id in req_ids]
    for (req_id,), alone in parts:
        failures.ask(req_id, _DOING, verb, alone)
    return parts
