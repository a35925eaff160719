"""The kernels as operators of torch, so that torch.compile knows what they change and what they return.

They are registered from Python, which is the same table that TORCH_LIBRARY in C++ writes to: the compiled library then
needs no header of torch, and one build of it serves every version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("kvevict", "DEF")


def is_tracing() -> bool:
    """Whether torch.compile looks on, and wants operators in place of functions."""
    return torch.compiler.is_compiling()


def operator(
    schema: str, fake: Callable[..., Any], groups: Mapping[int, type] | None = None
) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as ``torch.ops.kvevict.<its name>``.

    While torch.compile traces, calls become calls of the operator; all others go straight to the function, past the
    dispatcher, which would take 5 to 10 microseconds of each.

    schema: arguments and results, such as "(Tensor(a!) keys, int start) -> Tensor"
    fake:   takes the arguments, and returns tensors of the right shape and dtype without computing anything
    groups: by their places among the arguments, those that are a dataclass or named tuple: operators take their fields
            instead
    """
    names = {place: _field_names(kind) for place, kind in (groups or {}).items()}

    def flat(arguments: tuple[Any, ...]) -> list[Any]:
        values: list[Any] = []
        for place, argument in enumerate(arguments):
            values += [getattr(argument, name) for name in names[place]] if place in names else [argument]
        return values

    def grouped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            arguments: list[Any] = []
            rest = values
            while rest:
                kind = (groups or {}).get(len(arguments))
                count = 1 if kind is None else len(names[len(arguments)])
                taken, rest = rest[:count], rest[count:]
                arguments.append(taken[0] if kind is None else kind(*taken))
            return function(*arguments)

        return call

    def decorate(function: Function) -> Function:
        name = function.__name__
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, grouped(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"kvevict::{name}", grouped(fake), lib=_LIBRARY)
        registered = getattr(torch.ops.kvevict, name)

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if is_tracing():
                return registered(*flat(arguments), **options)
            return function(*arguments, **options)

        return cast("Function", call)

    return decorate


def _field_names(kind: type) -> list[str]:
    return list(getattr(kind, "_fields", ())) or [field.name for field in fields(kind)]
