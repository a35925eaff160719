"""A policy and an allocator, made from the names and options that users give, and when both are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from inspect import isabstract
from typing import Any, NoReturn

from vllm_kvevict.budgets import ALLOCATORS, BudgetAllocator
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.schedule import DuringDecode, Schedule
from vllm_kvevict.eviction.traits import per_token_policies, settle, traits_of
from vllm_kvevict.foreign.code import apart, contained, said
from vllm_kvevict.foreign.values import suggestion
from vllm_kvevict.options.names import ALLOCATOR, DURING_DECODE, DURING_PREFILL, INTERVAL, POLICY
from vllm_kvevict.policies import POLICIES, EvictionPolicy
from vllm_kvevict.registry import Registry


def build_method(
    policy_name: str,
    policy_options: Mapping[str, Any],
    allocator_name: str | None,
    allocator_options: Mapping[str, Any],
    *,
    num_sink: int | None,
    num_recent: int | None,
    during_decode: bool | None,
    during_prefill: bool,
    interval: int | None,
) -> Method:
    """Return a policy, an allocator and when they are asked; the arguments are fields of an ``EvictionConfig``.

    Raises ValueError for options and schedules that the policy or the allocator does not take.
    """
    policy = policy_named(policy_name, policy_options)
    traits = traits_of(policy)
    evicts_answer = traits.evicts_during_decode if during_decode is None else during_decode
    if (evicts_answer or during_prefill) and not traits.supports_decode:
        option = DURING_DECODE if evicts_answer else DURING_PREFILL
        raise ValueError(
            f"{option}: policy {policy_name!r} ranks the tokens of a whole prompt, once; say {option} false, or "
            f"choose another policy"
        )
    per_token = interval == 1
    if per_token and not evicts_answer:
        raise ValueError(
            f"{INTERVAL}: counts tokens of the answer, and policy {policy_name!r} does not evict answers by "
            f"itself; say {DURING_DECODE} true, or leave the option out"
        )
    if per_token and not traits.supports_per_token:
        raise ValueError(
            f"{INTERVAL}: policy {policy_name!r} evicts from an answer a block at a time; leave the option "
            f"out, or choose one of {', '.join(per_token_policies())}"
        )
    if during_prefill and traits.num_deferred:
        raise ValueError(
            f"{DURING_PREFILL}: does not work with policy {policy_name!r}, which holds the whole prompt "
            f"until it has seen the answer; choose another policy"
        )
    decode = DuringDecode.NOT
    if evicts_answer:
        decode = DuringDecode.BY_TOKEN if per_token else DuringDecode.BY_BLOCK
    schedule = Schedule(traits.num_deferred, during_prefill, decode)
    num_recent = traits.num_recent if num_recent is None else num_recent
    return Method(
        policy,
        allocator_named(allocator_name or traits.default_allocator, allocator_options),
        traits.num_sink if num_sink is None else num_sink,
        # to a policy the last tokens are those of the last queries, which an earlier eviction must not have taken away
        max(num_recent, traits.query_window) if schedule.is_bounded else num_recent,
        schedule,
    )


def policy_named(name: str, options: Mapping[str, Any]) -> EvictionPolicy:
    """Return a policy, one and the same for the same name and options: some try things out when they are made.

    Raises ValueError for a name that is unknown and for an option that the policy does not take.
    """
    policy: EvictionPolicy = _named(POLICIES, name, options, "policy_options")
    return policy


def allocator_named(name: str, options: Mapping[str, Any]) -> BudgetAllocator:
    """Return an allocator, one and the same for the same name and options: some read files when they are made.

    Raises ValueError for a name that is unknown and for an option that the allocator does not take.
    """
    allocator: BudgetAllocator = _named(ALLOCATORS, name, options, "allocator_options")
    return allocator


def _named(registry: Registry[Any], name: str, options: Mapping[str, Any], field_name: str) -> Any:
    try:
        options_json = json.dumps(options, sort_keys=True) if options else "{}"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field_name}: expected plain JSON, {error}") from None
    cls: Any = registry.get(name)
    return _made(registry, cls, name, options_json, field_name)


@cache
def _made(registry: Registry[Any], cls: Any, name: str, options_json: str, field_name: str) -> Any:
    what = f"{registry.kind} {name!r}"
    named_by = POLICY if registry is POLICIES else ALLOCATOR
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ValueError(f"{named_by}: {what} must be a dataclass, whose fields are its options")
    if isabstract(cls):
        raise ValueError(
            f"{named_by}: {what} has no {', '.join(sorted(cls.__abstractmethods__))}, which it must define"
        )
    options = json.loads(options_json)
    allowed = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    if unknown := [option for option in options if option not in allowed]:
        takes, hint = ", ".join(allowed) or "no options", suggestion(unknown[0], allowed)
        raise ValueError(f"{field_name}: {what} takes {takes}; got {unknown[0]!r}{hint and f'.{hint}'}")
    for option, is_required in allowed.items():
        if is_required and option not in options:
            where = f"{field_name} of --kv-eviction-config"
            raise ValueError(f"{named_by}: {what} needs {option!r}, which is given when the server starts, in {where}")
    with contained(lambda error: _refuse(f"{field_name}: {what}", error)), apart:
        built = cls(**options)
        settle(built)
    return built


def _refuse(named: str, error: BaseException) -> NoReturn:
    """Raise ValueError with what a class, which may be another package's, says of its options."""
    if isinstance(error, ValueError):
        raise error
    raise ValueError(f"{named}: {said(error)}") from None
