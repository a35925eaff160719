"""Which requests are evicted together, of those that are due in a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from vllm_kvevict.budgets.batch import wishes_for_batches
from vllm_kvevict.eviction.method import Method, are_equal
from vllm_kvevict.eviction.prompt import Eviction, Evictions
from vllm_kvevict.eviction.traits import traits_of
from vllm_kvevict.foreign.code import contained
from vllm_kvevict.policies import scratch
from vllm_kvevict.policies.base import Need
from vllm_kvevict.policies.batch import observes_chunks, preselects_batches, scores_batches

# Prompts of at most so many tokens share a group, whatever their lengths; of longer ones those that are less than twice
# as long as each other, so that tables of a group are at most twice what its prompts fill.
_SHORT = 1 << 12
# What is held at once by each score of a layer.
_BYTES_PER_SCORE = 16

_T = TypeVar("_T")


def scored_together(evictions: Mapping[str, Eviction]) -> list[tuple[list[str], Evictions]]:
    """Return groups whose layers are scored together, each with the names of its members; none has been scored yet.

    Who is the only one of a kind is not among them, nor are those of policies and allocators that see one request at a
    time: they go by their own methods.
    """
    batched = {
        name: eviction for name, eviction in evictions.items() if _judges_several(eviction.method) and _shares(eviction)
    }
    groups = [names for names in _grouped(batched, _fit, _have_room) if len(names) > 1]
    return [(names, Evictions([batched[name] for name in names])) for names in groups]


def chosen_together(evictions: Mapping[str, Eviction]) -> list[list[str]]:
    """Return groups of evictions that have been scored by their own methods: the names of the members of each.

    Allocators that see one request at a time have groups of one, as have prompts whose scores wait on the host.
    """
    return _grouped(evictions, lambda one, other: _shares(one) and _fit(one, other), _have_room)


def observed_together(
    chunks: Mapping[str, tuple[Method, int]], num_heads: int, num_kv_heads: int, head_size: int
) -> list[list[str]]:
    """Return the names of prompts whose chunks a policy observes together.

    chunks: of each prompt its method, and the tokens in the cache behind the chunk
    """

    def have_room(together: list[tuple[Method, int]]) -> bool:
        with contained():  # a third party's
            kept = together[0][0].policy.observed_bytes(num_heads, num_kv_heads, head_size)
            # what is kept of each is put together first, and taken apart again
            return _fit_into_scratch([num_tokens for _, num_tokens in together], num_kv_heads, 2 * kept)
        return False

    return _grouped(
        chunks, lambda one, other: observes_chunks(one[0].policy) and are_equal(one[0], other[0]), have_room
    )


def scored_again_together(due: Mapping[str, tuple[Method, int]]) -> list[list[str]]:
    """Return the names of requests that are scored together while they decode.

    due: of each its method and how many tokens it has had since its last eviction
    """
    return _grouped(due, _fit_again)


def _grouped(
    members: Mapping[str, _T],
    fit: Callable[[_T, _T], bool],
    have_room: Callable[[list[_T]], bool] = lambda together: True,
) -> list[list[str]]:
    groups: list[list[str]] = []

    def takes(group: list[str], member: _T) -> bool:
        return fit(members[group[0]], member) and have_room([*(members[name] for name in group), member])

    for name, member in members.items():
        fitting = next((group for group in groups if takes(group, member)), None)
        if fitting is None:
            groups.append([name])
        else:
            fitting.append(name)
    return groups


def _judges_several(method: Method) -> bool:
    looks_ahead = traits_of(method.policy).num_pseudo_tokens > 0
    return scores_batches(method.policy) and (not looks_ahead or preselects_batches(method.policy))


def _shares(eviction: Eviction) -> bool:
    return wishes_for_batches(type(eviction.method.allocator))


def _observes(method: Method) -> bool:
    return Need.ALL_QUERIES in traits_of(method.policy).needs


def _fit(one: Eviction, other: Eviction) -> bool:
    kinds = [
        (eviction.plan.per_token, eviction.fresh_block_ids is None, _length_class(eviction.plan.num_tokens))
        for eviction in (one, other)
    ]
    return kinds[0] == kinds[1] and are_equal(one.method, other.method)


def _have_room(together: list[Eviction]) -> bool:
    if any(eviction.is_scored_on_host for eviction in together):
        return False
    return _fit_into_scratch([eviction.plan.num_tokens for eviction in together], together[0].pool.num_kv_heads)


def _fit_into_scratch(num_tokens: list[int], num_kv_heads: int, bytes_of_each: int = 0) -> bool:
    """Whether one layer of these prompts does: all requests of a group are in each tile."""
    return scratch.fits(len(num_tokens) * (max(num_tokens) * num_kv_heads * _BYTES_PER_SCORE + bytes_of_each))


def _length_class(num_tokens: int) -> int:
    return max(num_tokens - 1, _SHORT - 1).bit_length()


def _fit_again(one: tuple[Method, int], other: tuple[Method, int]) -> bool:
    if not scores_batches(one[0].policy) or not are_equal(one[0], other[0]):
        return False
    return one[1] == other[1] or not _observes(one[0])
