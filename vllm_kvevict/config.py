"""What a user may set: checked once, at start-up, the same in every process; and per request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from inspect import isabstract
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.budgets.auto import AutoBudget
from vllm_kvevict.budgets.curve import Calibration
from vllm_kvevict.cache.plan import min_kept_blocks
from vllm_kvevict.eviction.method import Method
from vllm_kvevict.eviction.schedule import DuringDecode, Schedule
from vllm_kvevict.eviction.traits import per_token_policies, settle, traits_of
from vllm_kvevict.foreign.code import apart, ends_process, said
from vllm_kvevict.foreign.values import quoted
from vllm_kvevict.options.limits import (
    ALL,
    AUTO,
    NONE,
    REQUEST_ALLOCATOR,
    REQUEST_BUDGET,
    REQUEST_BUDGET_MAX,
    REQUEST_BUDGET_MIN,
    REQUEST_DURING_DECODE,
    REQUEST_DURING_PREFILL,
    REQUEST_INTERVAL,
    REQUEST_OPTIONS,
    REQUEST_POLICY,
    Budget,
    Fraction,
    RequestOptions,
    check_names,
    checked_name,
)
from vllm_kvevict.policies import POLICIES
from vllm_kvevict.registry import Registry

__all__ = ["AUTO", "EvictionConfig"]


class EvictionConfig(BaseModel):
    """How the prompts of a server are evicted. Travels as JSON in ``additional_config["kv_eviction"]``.

    policy:            how tokens rank, a name of the registry of policies
    budget:            what a prompt keeps: tokens per KV head and layer (int), or a fraction of it (0 < float < 1);
                       rounded up to whole blocks, of which the last one is filled as far as the prompt fills it; or
                       "auto", for what a calibration says of each prompt
    calibration:       policy -> constants that ``python -m vllm_kvevict calibrate`` has fitted, for "auto"
    budget_target:     quality that "auto" shall leave: log-likelihood of the answer with all of the prompt over the
                       one with what is kept, 0 < float < 1
    budget_min:        the smallest fraction of a prompt that "auto" keeps
    budget_max:        the largest one
    allocator:         how the budget is shared among layers and heads, a name of the registry of allocators;
                       None: what the policy's paper says
    num_sink:          tokens at the start that always stay; None: what the policy's paper says
    num_recent:        tokens at the end that always stay; None: what the policy's paper says
    policy_options:    parameters of the policy
    allocator_options: parameters of the allocator
    during_decode:     whether eviction goes on while the answer grows, so that a request holds its budget and no more;
                       None: what the policy's paper says
    during_prefill:    whether each chunk of a prompt is evicted before the next one, so that a prompt of any length
                       needs the memory of its budget and of a chunk
    interval:          tokens of the answer from one eviction to the next: 1, so that each new token takes the slot of
                       one that goes, or the size of a block; None: the size of a block
    log_requests:      write one JSON line to the log for every prompt that is evicted
    request_options:   what requests may choose: "all", "none", or the limits of an operator
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    policy: str
    budget: Budget | Literal["auto"]
    calibration: dict[str, Calibration] = {}
    budget_target: Fraction = 0.95
    budget_min: Fraction = 0.05
    budget_max: Fraction = 0.95
    allocator: str | None = None
    num_sink: Annotated[int, Field(ge=0)] | None = None
    num_recent: Annotated[int, Field(ge=0)] | None = None
    policy_options: dict[str, Any] = {}
    allocator_options: dict[str, Any] = {}
    during_decode: bool | None = None
    during_prefill: bool = False
    interval: Annotated[int, Field(ge=1)] | None = None
    log_requests: bool = False
    request_options: Literal["all", "none"] | RequestOptions = "all"

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        POLICIES.get(name)
        return name

    @field_validator("allocator")
    @classmethod
    def _known_allocator(cls, name: str | None) -> str | None:
        if name is not None:
            ALLOCATORS.get(name)
        return name

    @field_validator("request_options", mode="before")
    @classmethod
    def _known_limits(cls, value: object) -> object:
        return RequestOptions.parse(value) if isinstance(value, Mapping) else value

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> EvictionConfig:
        """Return the config in ``values`` (plain JSON).

        Raises ValueError, one sentence that names the field, what was given and what is allowed.
        """
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            raise ValueError(_one_sentence(error)) from None
        config.method()
        config.auto_budget()
        config._import_choices()
        return config

    def _import_choices(self) -> None:
        """Import what requests may choose now, so that no request makes the others wait for it."""
        for name in self.limits.named_policies:
            _build(POLICIES, name, {}, "policy_options")
        if self.limits.allows(REQUEST_POLICY) and ALL in self.limits.allowed_policies:
            POLICIES.import_all()
        if self.limits.allows(REQUEST_ALLOCATOR):
            ALLOCATORS.import_all()

    @property
    def limits(self) -> RequestOptions:
        """What requests may choose."""
        return _LIMITS[self.request_options] if isinstance(self.request_options, str) else self.request_options

    @property
    def most_kept(self) -> int | float:
        """What a prompt keeps at most: tokens, or the fraction of it."""
        return self.budget_max if isinstance(self.budget, str) else self.budget

    def auto_budget(self) -> AutoBudget | None:
        """Return how the budget of each prompt is chosen, None if it is fixed.

        Raises ValueError if that is not known of the policy, or does not go with what else was asked for.
        """
        if self.budget != AUTO:
            return None
        method = self.method()
        if self.policy not in self.calibration:
            known = ", ".join(sorted(self.calibration)) or "none"
            raise ValueError(
                f"kv_budget: 'auto' needs a calibration of policy {self.policy!r} (given: {known}); make one with "
                f"`python -m vllm_kvevict calibrate` and name its file with --kv-budget-calibration"
            )
        if method.schedule.is_bounded:
            option = REQUEST_DURING_DECODE if method.schedule.evicts_answer else REQUEST_DURING_PREFILL
            raise ValueError(
                f"kv_budget: 'auto' is chosen when all of a prompt is known, and does not go with {option}; give a "
                f"number, or say {option} false"
            )
        if self.budget_min > self.budget_max:
            raise ValueError(
                f"kv_budget_min: expected at most kv_budget_max ({self.budget_max}), got {self.budget_min}"
            )
        fitted = self.calibration[self.policy]
        return AutoBudget(fitted, self.budget_target, self.budget_min, self.budget_max, method.min_tokens)

    def method(self) -> Method:
        """Return the policy, the allocator and the protection this config names.

        Raises ValueError for an option that the policy or the allocator does not take.
        """
        return _method(self)

    @property
    def allocator_name(self) -> str:
        """The allocator in use."""
        return self.allocator or traits_of(self.method().policy).default_allocator

    def check_block_size(self, block_size: int) -> None:
        """Raise ValueError if the budget cannot hold the tokens that must stay in blocks of ``block_size``."""
        method = self.method()
        if self.interval not in (None, 1, block_size):
            raise ValueError(
                f"{REQUEST_INTERVAL}: expected 1 or the size of a block ({block_size}), got {quoted(self.interval)}"
            )
        num_blocks = min_kept_blocks(method.min_tokens, block_size, method.schedule.is_bounded)
        smallest = (num_blocks - 1) * block_size + 1
        if isinstance(self.budget, int) and self.budget < smallest:
            new_tokens = ", beside the block that new tokens fill" if method.schedule.is_bounded else ""
            raise ValueError(
                f"kv_budget: expected at least {smallest} tokens, since blocks hold {block_size} and {self.policy!r} "
                f"needs {method.min_tokens} tokens in every head ({method.num_protected} protected, "
                f"{method.query_window} observed){new_tokens}; got {self.budget}. Raise the budget, or start the "
                f"server with a lower num_sink, num_recent or window of the policy"
            )

    def for_request(self, options: Mapping[str, Any] | None, block_size: int) -> EvictionConfig | None:
        """Return the config of one request, None if it asked for no eviction.

        options: the request's ``vllm_xargs``, of which ``REQUEST_OPTIONS`` are read: ``kv_eviction`` (a policy or
                 "none"), ``kv_budget``, ``kv_budget_allocator``, ``kv_evict_during_decode``,
                 ``kv_evict_during_prefill``, ``kv_evict_interval``, and for an "auto" budget ``kv_budget_min`` and
                 ``kv_budget_max``. The server's own options go with its own policy and allocator; others get their
                 defaults

        Raises ValueError that names the field and what is allowed, as well for what the operator does not let requests
        choose and for options that look like ours and are none.
        """
        check_names(options or {})
        given = {option: value for option in REQUEST_OPTIONS if (value := (options or {}).get(option)) is not None}
        self.limits.check_options(given)
        policy, budget, allocator, during_decode, during_prefill, interval, least, most = map(
            given.get, REQUEST_OPTIONS
        )
        if policy is not None:
            policy = checked_name(REQUEST_POLICY, policy, "'none' or the name of a policy")
            self.limits.check_policy(policy, self.policy)
        if allocator is not None:
            allocator = checked_name(REQUEST_ALLOCATOR, allocator, "the name of an allocator")
        changes: dict[str, Any] = {}
        if policy not in (None, NONE, self.policy):
            changes = {"policy": policy, "policy_options": {}}
            if self.allocator is None:  # the other policy's own allocator may not take these
                changes["allocator_options"] = {}
        if allocator is not None:
            changes["allocator"] = allocator
            if allocator != self.allocator_name:
                changes["allocator_options"] = {}
            elif "allocator_options" in changes:  # the server's own allocator, with another policy
                del changes["allocator_options"]
        for field, value in (("budget", budget), ("budget_min", least), ("budget_max", most)):
            if value is not None:
                changes[field] = value
        if during_decode is not None:
            changes["during_decode"] = _as_bool(REQUEST_DURING_DECODE, during_decode)
        if during_prefill is not None:
            changes["during_prefill"] = _as_bool(REQUEST_DURING_PREFILL, during_prefill)
        if interval is not None:
            changes["interval"] = interval
        elif "policy" in changes or changes.get("during_decode") is False:  # the server's is for its own policy
            changes["interval"] = None
        config = self if not changes else EvictionConfig.parse({**self.model_dump(), **changes})
        self._check_limits(given, config)
        config.check_block_size(block_size)
        return None if policy == NONE else config

    def _check_limits(self, given: Mapping[str, Any], config: EvictionConfig) -> None:
        """Raise ValueError for a budget of a request, all of ``config``, beyond what the operator lets it choose."""
        is_chosen = config.budget != self.budget
        if is_chosen:
            self.limits.check_budget(REQUEST_BUDGET, config.budget)
        for option, fraction in ((REQUEST_BUDGET_MIN, config.budget_min), (REQUEST_BUDGET_MAX, config.budget_max)):
            if config.budget == AUTO and (is_chosen or option in given):
                self.limits.check_budget(option, fraction)


def _method(config: EvictionConfig) -> Method:
    policy = _build(POLICIES, config.policy, config.policy_options, "policy_options")
    traits = traits_of(policy)
    evicts_answer = traits.evicts_during_decode if config.during_decode is None else config.during_decode
    if (evicts_answer or config.during_prefill) and not traits.supports_decode:
        option = REQUEST_DURING_DECODE if evicts_answer else REQUEST_DURING_PREFILL
        raise ValueError(
            f"{option}: policy {config.policy!r} ranks the tokens of a whole prompt, once; say {option} false, or "
            f"choose another policy"
        )
    per_token = config.interval == 1
    if per_token and not evicts_answer:
        raise ValueError(
            f"{REQUEST_INTERVAL}: counts tokens of the answer, and policy {config.policy!r} does not evict answers by "
            f"itself; say {REQUEST_DURING_DECODE} true, or leave the option out"
        )
    if per_token and not traits.supports_per_token:
        raise ValueError(
            f"{REQUEST_INTERVAL}: policy {config.policy!r} evicts from an answer a block at a time; leave the option "
            f"out, or choose one of {', '.join(per_token_policies())}"
        )
    if config.during_prefill and traits.num_deferred:
        raise ValueError(
            f"{REQUEST_DURING_PREFILL}: does not work with policy {config.policy!r}, which holds the whole prompt "
            f"until it has seen the answer; choose another policy"
        )
    during_decode = DuringDecode.NOT
    if evicts_answer:
        during_decode = DuringDecode.BY_TOKEN if per_token else DuringDecode.BY_BLOCK
    schedule = Schedule(traits.num_deferred, config.during_prefill, during_decode)
    num_recent = traits.num_recent if config.num_recent is None else config.num_recent
    return Method(
        policy,
        _build(ALLOCATORS, config.allocator or traits.default_allocator, config.allocator_options, "allocator_options"),
        traits.num_sink if config.num_sink is None else config.num_sink,
        # to a policy the last tokens are those of the last queries, which an earlier eviction must not have taken away
        max(num_recent, traits.query_window) if schedule.is_bounded else num_recent,
        schedule,
    )


def _as_bool(option: str, value: object) -> bool:
    """Return what a request said: over HTTP vLLM takes texts and numbers only, and JSON's true arrives as 1."""
    words = {"true": True, "false": False, 1: True, 0: False}
    if not isinstance(value, str | int | float) or value not in words:
        raise ValueError(f"{option}: expected true or false, got {quoted(value)}")
    return words[value]


def _build(registry: Registry[Any], name: str, options: Mapping[str, Any], field_name: str) -> Any:
    """Return a policy or an allocator, one and the same for the same name and options: some read files, or try things
    out, when they are made.
    """
    try:
        options_json = json.dumps(options, sort_keys=True) if options else "{}"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field_name}: expected plain JSON, {error}") from None
    cls: Any = registry.get(name)
    return _built(registry, cls, name, options_json, field_name)


@cache
def _built(registry: Registry[Any], cls: Any, name: str, options_json: str, field_name: str) -> Any:
    what = f"{registry.kind} {name!r}"
    named_by = REQUEST_POLICY if registry is POLICIES else REQUEST_ALLOCATOR
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ValueError(f"{named_by}: {what} must be a dataclass, whose fields are its options")
    if isabstract(cls):
        raise ValueError(
            f"{named_by}: {what} has no {', '.join(sorted(cls.__abstractmethods__))}, which it must define"
        )
    options = json.loads(options_json)
    allowed = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    for option in options:
        if option not in allowed:
            raise ValueError(f"{field_name}: {what} takes {', '.join(allowed) or 'no options'}; got {option!r}")
    for option, is_required in allowed.items():
        if is_required and option not in options:
            where = f"{field_name} of --kv-eviction-config"
            raise ValueError(f"{named_by}: {what} needs {option!r}, which is given when the server starts, in {where}")
    try:
        with apart:
            built = cls(**options)
            settle(built)
        return built
    except ValueError:
        raise
    except BaseException as error:  # any: the class may be another package's
        if ends_process():
            raise
        raise ValueError(f"{field_name}: {what}: {said(error)}") from None


_LIMITS = {ALL: RequestOptions(), NONE: RequestOptions(options=[])}
_FLAGS = {
    "policy": "kv_eviction",
    "budget": "kv_budget",
    "calibration": "kv_budget_calibration",
    "budget_target": "kv_budget_target",
    "budget_min": "kv_budget_min",
    "budget_max": "kv_budget_max",
    "allocator": "kv_budget_allocator",
    "during_decode": "kv_evict_during_decode",
    "during_prefill": "kv_evict_during_prefill",
    "interval": "kv_evict_interval",
    "log_requests": "kv_eviction_log_requests",
    "request_options": "kv_request_options",
}
_ALLOWED = {
    "budget": "a whole number of tokens of at least 1, a fraction between 0 and 1, or 'auto'",
    "calibration": "for each policy the numbers alpha and beta",
    "budget_target": "a fraction between 0 and 1",
    "budget_min": "a fraction between 0 and 1",
    "budget_max": "a fraction between 0 and 1",
    "num_sink": "a whole number of tokens of at least 0",
    "num_recent": "a whole number of tokens of at least 0",
    "during_decode": "true or false",
    "during_prefill": "true or false",
    "interval": "1 or the size of a block, in tokens",
    "log_requests": "true or false",
    "request_options": "'all', 'none', or a mapping of options, policies, least_budget and most_budget",
}


def _one_sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return f"kv_eviction: unknown field {quoted(name)}. Available: {', '.join(EvictionConfig.model_fields)}"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"kv_eviction: {name!r} is missing. Give --kv-eviction POLICY and --kv-budget N"
    field = _FLAGS.get(name, f"kv_eviction.{name}")
    if first["type"] == "value_error":
        return f"{field}: {first['ctx']['error']}"
    return f"{field}: expected {_ALLOWED.get(name, first['msg'].lower())}, got {quoted(first['input'])}"
