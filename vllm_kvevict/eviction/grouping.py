"""Which prompts that end in one step are evicted together."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_kvevict.budgets.batch import wishes_for_batches
from vllm_kvevict.eviction.method import are_equal
from vllm_kvevict.eviction.prompt import Eviction, Evictions
from vllm_kvevict.policies.batch import scores_batches

# Prompts of at most so many tokens share a group, whatever their lengths; of longer ones those that are less than twice
# as long as each other, so that tables of a group are at most twice what its prompts fill.
_SHORT = 1 << 12


def scored_together(evictions: Sequence[Eviction]) -> list[Evictions]:
    """Return groups whose layers are scored together; no eviction has been scored yet.

    Those of policies and allocators that see one request at a time are not among them: they go by their own methods.
    """
    batched = [eviction for eviction in evictions if scores_batches(type(eviction.method.policy)) and _shares(eviction)]
    return [Evictions(group) for group in _grouped(batched)]


def chosen_together(evictions: Sequence[Eviction]) -> list[Evictions]:
    """Return groups of evictions that have been scored by their own methods, no two of whose allocators see one request
    at a time.
    """
    alone = [eviction.alone for eviction in evictions if not _shares(eviction)]
    return alone + [Evictions.joined(group) for group in _grouped(list(filter(_shares, evictions)))]


def _shares(eviction: Eviction) -> bool:
    return wishes_for_batches(type(eviction.method.allocator))


def _grouped(evictions: Sequence[Eviction]) -> list[list[Eviction]]:
    groups: list[list[Eviction]] = []
    for eviction in evictions:
        fitting = next((group for group in groups if _fit(group[0], eviction)), None)
        if fitting is None:
            groups.append([eviction])
        else:
            fitting.append(eviction)
    return groups


def _fit(one: Eviction, other: Eviction) -> bool:
    kinds = [
        (eviction.plan.per_token, eviction.fresh_block_ids is None, _length_class(eviction.plan.num_tokens))
        for eviction in (one, other)
    ]
    return kinds[0] == kinds[1] and are_equal(one.method, other.method)


def _length_class(num_tokens: int) -> int:
    return max(num_tokens - 1, _SHORT - 1).bit_length()
