"""Every function of vLLM that we wrap, and why. Official hooks and subclasses do the rest."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_kvevict.engine.versions import UnsupportedVLLMError

_MARK = "_kvevict_patch"


@dataclass(frozen=True)
class Patch:
    """One wrapped function.

    target:      "package.module:Class.method"
    wrap:        original -> replacement
    params:      parameters of the original that the replacement relies on
    why:         what cannot be done by a hook or a subclass
    remove_when: what vLLM would have to offer to make this unnecessary
    """

    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    params: tuple[str, ...]
    why: str
    remove_when: str


def apply_patches(patches: Iterable[Patch]) -> None:
    """Apply each patch once per process; all targets are resolved before anything changes.

    Raises UnsupportedVLLMError if a target is missing or has lost a parameter.
    """
    for patch, (owner, name, attribute) in [(patch, find(patch)) for patch in patches]:
        function = getattr(attribute, "__func__", attribute)
        if hasattr(function, _MARK):
            continue
        replacement = patch.wrap(function)
        setattr(replacement, _MARK, patch.target)
        binding = type(attribute) if isinstance(attribute, classmethod | staticmethod) else None
        setattr(owner, name, binding(replacement) if binding else replacement)


def find(patch: Patch) -> tuple[type, str, Any]:
    """Return the class, the name and the raw attribute (classmethod objects included) that a patch is about.

    Raises UnsupportedVLLMError if a target is missing or has lost a parameter.
    """
    module_name, _, path = patch.target.partition(":")
    class_name, _, name = path.partition(".")
    try:
        owner = getattr(importlib.import_module(module_name), class_name)
        attribute = inspect.getattr_static(owner, name)
    except (ImportError, AttributeError):
        raise UnsupportedVLLMError(f"{patch.target} is missing in this vLLM; {patch.why}") from None
    function = inspect.unwrap(getattr(attribute, "__func__", attribute))
    lost = [param for param in patch.params if param not in inspect.signature(function).parameters]
    if lost:
        raise UnsupportedVLLMError(f"{patch.target} no longer takes {', '.join(lost)}; {patch.why}")
    return owner, name, attribute
