"""How the operator of a server limits what its requests may choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vllm_kvevict.foreign.values import quoted, suggestion
from vllm_kvevict.options.names import ALL, LIMITS, NONE, POLICY, flag_of
from vllm_kvevict.options.table import Row, unknown_option
from vllm_kvevict.policies import POLICIES

Fraction = Annotated[float, Field(gt=0, lt=1)]
Budget = Annotated[int, Field(ge=1)] | Fraction

_WHO = f"the operator of this server ({flag_of(LIMITS)})"


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
    def _known_options(cls, names: list[str] | None, info: ValidationInfo) -> list[str] | None:
        options: Mapping[str, Row] = (info.context or {}).get("options", {})
        for name in names or ():
            if name not in options:
                raise ValueError(unknown_option(name, options))
        return names

    @field_validator("policies")
    @classmethod
    def _known_policies(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in (ALL, NONE):
                POLICIES.get(name)
        return names

    @classmethod
    def parse(cls, values: Mapping[str, Any], options: Mapping[str, Row]) -> RequestOptions:
        """Return the limits in ``values`` (plain JSON).

        options: the options of requests, by name

        Raises ValueError, one sentence that names the field, what was given and what is allowed.
        """
        try:
            limits = cls.model_validate(dict(values), context={"options": options})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                hint = suggestion(name, cls.model_fields)
                raise ValueError(f"unknown field {name!r}.{hint} Available: {', '.join(cls.model_fields)}") from None
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
                f"{POLICY}: 'none' keeps a whole prompt, and {_WHO} allows {self._budgets()}; leave it out"
            )
        if policy == NONE or ALL not in allowed:
            names = ", ".join(dict.fromkeys((own, *allowed)))
            raise ValueError(f"{POLICY}: {_WHO} lets requests choose {names}; got {quoted(policy)}; name one of them")
        if ":" in policy:  # a client must not choose what the server imports
            raise ValueError(
                f"{POLICY}: a request may name a press only if the server was started with it; got "
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
