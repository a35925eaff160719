"""What a name or an expression can be, as far as syntax trees tell."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field


class Unknown:
    """Something, but we cannot tell what."""

    def __repr__(self) -> str:
        return "UNKNOWN"


class Missing:
    """Nothing: there is no such name."""

    def __repr__(self) -> str:
        return "MISSING"


UNKNOWN, MISSING = Unknown(), Missing()


@dataclass(frozen=True)
class Module:
    """A module that we have the source of."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outside:
    """A module, class or function of another package, by its full name."""

    path: str


@dataclass(frozen=True)
class Class:
    """A class itself."""

    module: str
    name: str
    node: ast.ClassDef = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Function:
    """A function or method. is_bound: its first parameter is not the caller's to give."""

    module: str
    node: ast.FunctionDef | ast.AsyncFunctionDef = field(repr=False)
    owner: Class | None = None
    is_bound: bool = False

    def __str__(self) -> str:
        return f"{self.owner}.{self.node.name}" if self.owner else self.node.name


@dataclass(frozen=True)
class Instance:
    """An object of a class."""

    cls: Class

    def __str__(self) -> str:
        return self.cls.name


@dataclass(frozen=True)
class Super:
    """``super()`` in a method of ``after`` that an object of ``of`` runs."""

    after: Class
    of: Class

    def __str__(self) -> str:
        return f"super() of {self.of}"


@dataclass(frozen=True)
class Builtin:
    """An object of a builtin type or a container, with the types of what it holds."""

    name: str
    args: tuple[Type, ...] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Either:
    """One of several."""

    types: tuple[Type, ...]

    def __str__(self) -> str:
        return " or ".join(map(str, self.types))


Type = Module | Outside | Class | Function | Instance | Super | Builtin | Either | Unknown | Missing


def either(types: Sequence[Type]) -> Type:
    """Return their union; UNKNOWN if that is one of them."""
    flat = [each for one in types for each in (one.types if isinstance(one, Either) else (one,))]
    distinct = tuple(dict.fromkeys(flat))
    if not distinct or any(isinstance(each, Unknown | Missing | Outside) for each in distinct):
        return UNKNOWN
    return distinct[0] if len(distinct) == 1 else Either(distinct)
