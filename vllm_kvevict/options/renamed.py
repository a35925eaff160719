"""Options of policies in a configuration, which may use names of earlier releases until 0.2."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from vllm_kvevict.policies import POLICIES
from vllm_kvevict.policies.wrapper import WrapperPolicy


def with_new_names(policy: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a policy, and of one inside it, under the names that they have today, with a warning.

    Raises ValueError for an unknown policy, and for an option that is given under both of its names.
    """
    cls, renamed = POLICIES.get(policy), dict(options)
    for old, new in cls.old_names.items():
        if old in options and new in options:
            raise ValueError(f"{policy}.{new}: expected one name, got {old!r} and {new!r}; leave {old!r} out")
        if old in options:
            text = f"{policy}.{old} is called {new!r} now; the old name is accepted until 0.2"
            warnings.warn(text, FutureWarning, stacklevel=2)
            renamed[new] = renamed.pop(old)
    if issubclass(cls, WrapperPolicy):
        inner, of_inner = options.get("policy", cls.policy), options.get("policy_options")
        if inner in POLICIES and isinstance(of_inner, dict):
            renamed["policy_options"] = with_new_names(inner, of_inner)
    return renamed


def _renamed(options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    policy = info.data.get("policy")  # None if it is refused itself
    return options if policy is None else with_new_names(policy, options)


# of a model whose field ``policy``, before this one, is the policy's name
PolicyOptions = Annotated[dict[str, Any], AfterValidator(_renamed)]
