"""What requests may choose: the names of their options, and how the operator of a server limits them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_kvevict.foreign.values import LONGEST_NAME, quoted
from vllm_kvevict.policies import POLICIES

REQUEST_POLICY = "kv_eviction"
REQUEST_BUDGET = "kv_budget"
REQUEST_ALLOCATOR = "kv_budget_allocator"
REQUEST_DURING_DECODE = "kv_evict_during_decode"
REQUEST_DURING_PREFILL = "kv_evict_during_prefill"
REQUEST_INTERVAL = "kv_evict_interval"
REQUEST_BUDGET_MIN = "kv_budget_min"
REQUEST_BUDGET_MAX = "kv_budget_max"
REQUEST_OPTIONS = (
    REQUEST_POLICY,
    REQUEST_BUDGET,
    REQUEST_ALLOCATOR,
    REQUEST_DURING_DECODE,
    REQUEST_DURING_PREFILL,
    REQUEST_INTERVAL,
    REQUEST_BUDGET_MIN,
    REQUEST_BUDGET_MAX,
)
VLLM_FIELD = "vllm_xargs"  # where a request gives them over HTTP
NONE = "none"
AUTO = "auto"
ALL = "all"

Fraction = Annotated[float, Field(gt=0, lt=1)]
Budget = Annotated[int, Field(ge=1)] | Fraction

# vLLM itself reads these of a request's ``extra_args``, where ``vllm_xargs`` arrive (v1/request.py)
_VLLM_OPTIONS = ("kv_transfer_params", "kv_cache_report_mode")
# a server's fields, as a request might call them
_MEANT = {option: option for option in REQUEST_OPTIONS} | {
    "kv_policy": REQUEST_POLICY,
    "kv_allocator": REQUEST_ALLOCATOR,
    "kv_interval": REQUEST_INTERVAL,
    "kv_during_decode": REQUEST_DURING_DECODE,
    "kv_during_prefill": REQUEST_DURING_PREFILL,
}
_WHO = "the operator of this server (--kv-request-options)"


class RequestOptions(BaseModel):
    """What the requests of a server may choose; the server's own policy and budget are not limited by it.

    options:      names of the options that a request may give; None: all of them
    policies:     what ``kv_eviction`` may name beside the server's own policy: names of policies, which are imported
                  when the server starts, "none" for no eviction, and "all" for every policy that is installed, of which
                  the presses of kvpress are none; None: "all", and "none" as long as there is no ``most_budget``
    least_budget: the least that a request may keep of its prompt, in tokens or as a fraction; None: no such bound
    most_budget:  the most that it may keep, in the unit of ``least_budget``; budgets in the other unit, of which
                  nobody knows on which side of a bound they are, are refused
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    options: list[str] | None = None
    policies: list[str] | None = None
    least_budget: Budget | None = None
    most_budget: Budget | None = None

    @field_validator("options")
    @classmethod
    def _known_options(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in REQUEST_OPTIONS:
                raise ValueError(_unknown(name))
        return names

    @field_validator("policies")
    @classmethod
    def _known_policies(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in (ALL, NONE):
                POLICIES.get(name)
        return names

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RequestOptions:
        """Return the limits in ``values`` (plain JSON).

        Raises ValueError, one sentence that names the field, what was given and what is allowed.
        """
        try:
            limits = cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                raise ValueError(f"unknown field {name!r}. Available: {', '.join(cls.model_fields)}") from None
            if first["type"] == "value_error":
                raise ValueError(f"{name}: {first['ctx']['error']}") from None
            expected = "a list of names" if name in ("options", "policies") else "tokens, at least 1, or a fraction"
            raise ValueError(f"{name}: expected {expected}, got {quoted(first['input'])}") from None
        least, most = limits.least_budget, limits.most_budget
        if least is not None and most is not None and (type(least) is not type(most) or least > most):
            raise ValueError(f"most_budget: expected at least least_budget ({least}), in its unit, got {most}")
        return limits

    @property
    def allowed_policies(self) -> list[str]:
        """What ``kv_eviction`` may name beside the server's own policy: ``policies``, or its default."""
        everything = [ALL] if self.most_budget is not None else [ALL, NONE]
        return everything if self.policies is None else self.policies

    @property
    def named_policies(self) -> list[str]:
        """The policies that the operator has named one by one."""
        return [name for name in self.allowed_policies if name not in (ALL, NONE)]

    def allows(self, option: str) -> bool:
        """Whether requests may give an option."""
        return self.options is None or option in self.options

    def check_options(self, given: Iterable[str]) -> None:
        """Raise ValueError for an option that requests may not give."""
        for option in given:
            if not self.allows(option):
                allowed = ", ".join(self.options or ()) or "no option"
                raise ValueError(f"{option}: {_WHO} lets requests choose {allowed}; leave it out")

    def check_policy(self, policy: str, own: str) -> None:
        """Raise ValueError for a policy that requests may not name. Others may be unknown all the same.

        own: the server's policy, which they may
        """
        allowed = self.allowed_policies
        if policy == own or (policy in allowed and policy != ALL):
            return
        if policy == NONE and self.policies is None:
            raise ValueError(
                f"{REQUEST_POLICY}: 'none' keeps a whole prompt, and {_WHO} allows {self._budgets()}; leave it out"
            )
        if policy == NONE or ALL not in allowed:
            names = ", ".join(dict.fromkeys((own, *allowed)))
            raise ValueError(
                f"{REQUEST_POLICY}: {_WHO} lets requests choose {names}; got {quoted(policy)}; name one of them"
            )
        if ":" in policy:  # a client must not choose what the server imports
            raise ValueError(
                f"{REQUEST_POLICY}: a request may name a press only if the server was started with it; got "
                f"{quoted(policy)}. Give it to --kv-eviction, or to the policies of --kv-request-options"
            )

    def check_budget(self, option: str, budget: int | float | str) -> None:
        """Raise ValueError for a budget that requests may not choose.

        budget: tokens, a fraction, or "auto", of which only ``kv_budget_min`` and ``kv_budget_max`` have a unit
        """
        least, most = self.least_budget, self.most_budget
        unit = float if isinstance(budget, str) else type(budget)
        fits = all(type(bound) is unit for bound in (least, most) if bound is not None)
        if fits and not isinstance(budget, str):
            fits = (least is None or least <= budget) and (most is None or budget <= most)
        if not fits:
            raise ValueError(f"{option}: {_WHO} allows {self._budgets()}, got {quoted(budget)}; choose one of those")

    def _budgets(self) -> str:
        bounds = {"at least": self.least_budget, "at most": self.most_budget}
        unit = "fractions of" if any(type(bound) is float for bound in bounds.values()) else "budgets, in tokens, of"
        return f"{unit} {' and '.join(f'{word} {bound}' for word, bound in bounds.items() if bound is not None)}"


def check_names(options: Mapping[str, Any]) -> None:
    """Raise ValueError, with the nearest name, for an option that looks like one of ours and is none.

    options: the request's ``vllm_xargs``, where vLLM puts names of its own as well
    """
    for name in options:
        if is_ours(name) and name not in REQUEST_OPTIONS:
            raise ValueError(f"{VLLM_FIELD}: {_unknown(name)}")


def is_ours(name: object) -> bool:
    """Whether an option is meant for us: its name begins as ours do, and vLLM has none of that name."""
    return isinstance(name, str) and name[:3].lower() in ("kv_", "kv-") and name not in _VLLM_OPTIONS


def checked_name(option: str, name: object, expected: str) -> str:
    """Return the name that a request gave.

    Raises ValueError if it is no text, or longer than any name, before it is compared with others.
    """
    if not isinstance(name, str):
        raise ValueError(f"{option}: expected {expected}, got {quoted(name)}")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{option}: expected {expected}, got a text of {len(name)} characters")
    return name


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name[:LONGEST_NAME].lower().replace("-", "_"), _MEANT, n=1)
    hint = f" Did you mean {_MEANT[close[0]]!r}?" if close else ""
    return f"unknown option {quoted(name)}.{hint} Available: {', '.join(REQUEST_OPTIONS)}"
