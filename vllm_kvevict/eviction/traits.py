"""What policies and allocators say of themselves. They are asked once, when they are built: those of a third party may
raise, or say something else the next time, and the engine asks at places where nothing may raise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_kvevict.budgets import BudgetAllocator
from vllm_kvevict.foreign.code import contained
from vllm_kvevict.foreign.values import quoted
from vllm_kvevict.policies import POLICIES
from vllm_kvevict.policies.base import EvictionPolicy, Need


@dataclass(frozen=True)
class PolicyTraits:
    """The properties of an ``EvictionPolicy``, under their names."""

    query_window: int
    needs: frozenset[Need]
    num_sink: int
    num_recent: int
    evicts_during_decode: bool
    num_deferred: int
    num_pseudo_tokens: int
    supports_decode: bool
    supports_per_token: bool
    default_allocator: str
    layers_at_once: int

    @classmethod
    def of(cls, policy: EvictionPolicy) -> PolicyTraits:
        """Raises ValueError for a property that is none of its kind, and whatever the policy raises."""
        needs = policy.needs
        if not isinstance(needs, frozenset) or not all(isinstance(need, Need) for need in needs):
            raise _wrong(policy, "needs", "a frozenset of Need", needs)
        default_allocator = policy.default_allocator
        if not isinstance(default_allocator, str):
            raise _wrong(policy, "default_allocator", "the name of an allocator", default_allocator)
        return cls(
            query_window=_number(policy, "query_window"),
            needs=needs,
            num_sink=_number(policy, "num_sink"),
            num_recent=_number(policy, "num_recent"),
            evicts_during_decode=bool(policy.evicts_during_decode),
            num_deferred=_number(policy, "num_deferred"),
            num_pseudo_tokens=_number(policy, "num_pseudo_tokens"),
            supports_decode=bool(policy.supports_decode),
            supports_per_token=bool(policy.supports_per_token()),
            default_allocator=default_allocator,
            layers_at_once=_number(policy, "layers_at_once", least=1),
        )


@dataclass(frozen=True)
class AllocatorTraits:
    """The properties of a ``BudgetAllocator``, under their names."""

    query_window: int

    @classmethod
    def of(cls, allocator: BudgetAllocator) -> AllocatorTraits:
        """Raises ValueError for a property that is none of its kind, and whatever the allocator raises."""
        return cls(_number(allocator, "query_window"))


def per_token_policies() -> list[str]:
    """Return the names of the policies that can evict token by token with their default options."""
    return [name for name in POLICIES.names() if _is_per_token(name)]


def _is_per_token(name: str) -> bool:
    with contained():  # a third party's: it cannot be imported, or does not say
        return bool(POLICIES.get(name).supports_per_token())
    return False


# by identity: an option of a third party's class may be a list, which has no hash
_known: dict[int, tuple[object, Any]] = {}


def settle(built: Any) -> None:
    """Ask a policy or an allocator, which is never forgotten from now on. What it says stays.

    Raises ValueError for a property that is none of its kind, and whatever it raises.
    """
    kind = PolicyTraits if isinstance(built, EvictionPolicy) else AllocatorTraits
    _known[id(built)] = built, kind.of(built)


def traits_of(policy: EvictionPolicy) -> PolicyTraits:
    """Return what a policy said when it was settled; one that was not is asked."""
    known = _known.get(id(policy))
    return PolicyTraits.of(policy) if known is None else known[1]


def allocator_traits_of(allocator: BudgetAllocator) -> AllocatorTraits:
    """Return what an allocator said when it was settled; one that was not is asked."""
    known = _known.get(id(allocator))
    return AllocatorTraits.of(allocator) if known is None else known[1]


def _number(owner: object, name: str, least: int = 0) -> int:
    value = getattr(owner, name)
    if type(value) is not int or value < least:
        raise _wrong(owner, name, f"a whole number of at least {least}", value)
    return value


def _wrong(owner: object, name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{type(owner).__name__}.{name}: expected {expected}, got {quoted(value)}")
