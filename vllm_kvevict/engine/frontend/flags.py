"""``--kv-eviction`` and its companions, on every entry point that uses vLLM's parser."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from vllm_kvevict.budgets import ALLOCATORS
from vllm_kvevict.config import EvictionConfig
from vllm_kvevict.engine.settings import FIELD
from vllm_kvevict.options.limits import ALL, AUTO, NONE
from vllm_kvevict.policies import POLICIES

_DESTINATIONS = {
    "policy": "kv_eviction",
    "budget": "kv_budget",
    "calibration": "kv_budget_calibration",
    "allocator": "kv_budget_allocator",
    "during_decode": "kv_evict_during_decode",
    "during_prefill": "kv_evict_during_prefill",
    "interval": "kv_evict_interval",
    "log_requests": "kv_eviction_log_requests",
    "request_options": "kv_request_options",
}


def with_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.add_cli_args`` so that the parser knows our flags."""

    @functools.wraps(add_cli_args)
    def wrapper(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        add_group(parser)
        return add_cli_args(parser, *args, **kwargs)

    return wrapper


def with_config(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.from_cli_args`` so that our flags travel in ``additional_config``.

    They move there inside the namespace: vLLM hands it on to further API server processes, which read it before they
    have loaded any plugin.
    """

    @functools.wraps(from_cli_args)
    def wrapper(cls: type, args: argparse.Namespace) -> Any:
        values = flag_values(args)
        if values:
            given = getattr(args, "additional_config", None) or {}
            if FIELD in given:
                raise ValueError(f"additional_config: {FIELD!r} and the --kv-eviction flags exclude each other")
            config = EvictionConfig.parse(values)
            args.additional_config = {**given, FIELD: config.model_dump(exclude_unset=True)}
            for destination in ("kv_eviction_config", *_DESTINATIONS.values()):
                setattr(args, destination, None)
        return from_cli_args(cls, args)

    return wrapper


def add_group(parser: argparse.ArgumentParser) -> None:
    """Add our flags to ``parser``."""
    group = parser.add_argument_group(
        title="KV eviction (vllm_kvevict)",
        description="Keep a part of every prompt's KV cache and give the blocks of the rest back.",
    )
    group.add_argument(
        "--kv-eviction",
        metavar="POLICY",
        choices=POLICIES,
        help=f"Switch eviction on; how tokens rank. One of: {POLICIES.listing()}.",
    )
    group.add_argument(
        "--kv-budget",
        metavar="N",
        type=_budget,
        help="Tokens per KV head and layer that a prompt keeps, or the fraction in (0, 1) of it; rounded up to whole "
        "blocks. Or 'auto': as much of each prompt as a calibration says.",
    )
    group.add_argument(
        "--kv-budget-calibration",
        metavar="FILE",
        type=_calibration,
        help="What `python -m vllm_kvevict calibrate` has written, for --kv-budget auto.",
    )
    group.add_argument(
        "--kv-budget-allocator",
        metavar="NAME",
        choices=ALLOCATORS.names(),
        help=f"How the budget is shared among layers and heads. One of: {', '.join(ALLOCATORS.names())}.",
    )
    group.add_argument(
        "--kv-evict-during-decode",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Go on while an answer grows, so that a request never holds more than its budget; or not, for a policy "
        "that would. Default: what the policy's paper does.",
    )
    group.add_argument(
        "--kv-evict-during-prefill",
        action="store_true",
        default=None,
        help="Evict after each chunk of a prompt, so that it needs the memory of its budget and of a chunk only, and "
        "prompts are served that do not fit into the KV cache.",
    )
    group.add_argument(
        "--kv-evict-interval",
        metavar="N",
        type=int,
        help="Tokens of an answer from one eviction to the next: 1, so that each new token takes the slot of one that "
        "goes, or the block size, which is the default.",
    )
    group.add_argument(
        "--kv-eviction-config",
        metavar="FILE-or-JSON",
        type=_mapping,
        help="Everything else, as a YAML or JSON file or a JSON text: num_sink, num_recent, policy_options, "
        "allocator_options, budget_target, budget_min, budget_max. The flags win over it.",
    )
    group.add_argument(
        "--kv-eviction-log-requests",
        action="store_true",
        default=None,
        help="Write one JSON line to the log for every prompt that is evicted: tokens, blocks, milliseconds.",
    )
    group.add_argument(
        "--kv-request-options",
        metavar="all|none|FILE-or-JSON",
        type=_request_options,
        help="What requests may choose in vllm_xargs: 'all', the default, 'none', or limits, as a YAML or JSON file or "
        "a JSON text: options and policies, each a list of names; least_budget and most_budget, in tokens or as a "
        "fraction. Presses of kvpress have to be listed.",
    )


def flag_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of an EvictionConfig that the flags in ``args`` set."""
    values = dict(getattr(args, "kv_eviction_config", None) or {})
    for field, destination in _DESTINATIONS.items():
        value = getattr(args, destination, None)
        if value is not None:
            values[field] = value
    return values


def _budget(text: str) -> int | float | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        message = f"expected a whole number of tokens, a fraction between 0 and 1, or 'auto'; got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _calibration(value: Any) -> dict[str, Any]:
    """Return policy -> constants, of a file or, in a process that vLLM has started, of itself."""
    parsed = _mapping(value)
    policies = parsed.get("policies", parsed)
    if not isinstance(policies, dict):
        raise argparse.ArgumentTypeError(f"expected 'policies', a mapping of names to constants; got {policies!r}")
    return policies


def _request_options(value: Any) -> str | dict[str, Any]:
    return value if value in (ALL, NONE) else _mapping(value)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value) if value.lstrip().startswith("{") else yaml.safe_load(Path(value).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"expected a YAML or JSON file, or a JSON text; {error}") from None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping of field names to values, got {parsed!r}")
    return parsed
