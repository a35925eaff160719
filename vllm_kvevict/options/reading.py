"""What a flag's text means. Values that are no text come from a process that vLLM has started, and stay as they are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from vllm_kvevict.options.names import ALL, AUTO, NONE
from vllm_kvevict.registry import Registry


def budget(text: str) -> int | float | str:
    """Return tokens, a fraction, or "auto"."""
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


def name_in(registry: Registry[Any]) -> Callable[[str], str]:
    """Return what reads a name of the registry."""

    def name(text: str) -> str:
        try:
            registry.get(text)
        except ValueError as error:
            remedy = "; for no eviction, leave the flag out" if text == NONE else ""
            raise argparse.ArgumentTypeError(f"{error}{remedy}") from None
        return text

    return name


def calibration(value: Any) -> dict[str, Any]:
    """Return policy -> constants."""
    parsed = mapping(value)
    policies = parsed.get("policies", parsed)
    if not isinstance(policies, dict):
        raise argparse.ArgumentTypeError(f"expected 'policies', a mapping of names to constants; got {policies!r}")
    return policies


def request_options(value: Any) -> str | dict[str, Any]:
    """Return "all", "none", or limits."""
    return value if value in (ALL, NONE) else mapping(value)


def mapping(value: Any) -> dict[str, Any]:
    """Return what a YAML or JSON file says, or a JSON text."""
    if isinstance(value, dict):
        return value
    try:
        parsed = json.loads(value) if value.lstrip().startswith("{") else yaml.safe_load(Path(value).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"expected a YAML or JSON file, or a JSON text; {error}") from None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping of field names to values, got {parsed!r}")
    return parsed
