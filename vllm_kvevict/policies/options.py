"""What the options of policies and allocators may be: the annotation of a field says it, and one function checks it.

    window: Annotated[int, at_least(1)] = 32
    capacity: Annotated[int, at_least(1)] | None = None
    pool: Literal["max", "avg"] = "max"
    normalize: bool = False

A class checks by itself what is not said of one option alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache, reduce
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from vllm_kvevict.foreign.values import quoted


@dataclass(frozen=True)
class Rule:
    """Which values are allowed.

    expected: what a message calls them; of a bound it has {} in the place of the kind of number
    """

    expected: str
    allows: Callable[[Any], bool]


def at_least(bound: float) -> Rule:
    """Let an int or a float be ``bound`` or more."""
    return Rule(f"{{}} of at least {bound}", lambda value: value >= bound)


def above(bound: float) -> Rule:
    """Let an int or a float be more than ``bound``."""
    return Rule(f"{{}} above {bound}", lambda value: value > bound)


def between(least: float, most: float) -> Rule:
    """Let an int or a float be ``least``, ``most`` or between them."""
    return Rule(f"{{}} from {least} to {most}", lambda value: least <= value <= most)


ODD = Rule("an odd number", lambda value: value % 2 == 1)


def check_options(owner: Any) -> None:
    """Raise ValueError for an option of a policy or an allocator that its annotation does not allow.

    int, float, bool, str, Literal and None are known, alone or joined by |. An int does for a float, and a bool for
    neither; NaN and infinity are no numbers. Annotations of other kinds, and those that cannot be read, allow all
    values; a default is allowed in any case.
    """
    cls: type = type(owner)
    rules = _rules(cls)
    for option in fields(owner):
        rule, value = rules.get(option.name), getattr(owner, option.name)
        if rule is not None and value is not option.default and not rule.allows(value):
            name = getattr(cls, "name", cls.__name__)
            raise ValueError(f"{name}.{option.name}: expected {rule.expected}, got {quoted(value)}")


@cache
def _rules(cls: type) -> dict[str, Rule | None]:
    """Return what the annotations of ``cls`` allow, None where that is not known.

    A subclass that changes a default, and says int or float again, keeps the bounds.
    """
    read: dict[str, Field[Any]] = {}
    rules: dict[str, Rule | None] = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        for option in fields(base):
            if read.get(option.name) is option:  # inherited
                continue
            hint = _hint(base, option)
            if option.name not in rules or (hint is not int and hint is not float):
                rules[option.name] = _rule(hint, [])
            read[option.name] = option
    return rules


def _hint(cls: type, option: Field[Any]) -> Any:
    """Return the annotation of a field that ``cls`` has added."""
    alone = type(cls.__name__, (), {"__annotations__": {option.name: option.type}, "__module__": cls.__module__})
    try:
        return get_type_hints(alone, include_extras=True)[option.name]
    except Exception:  # a third party's may name what was imported for type checkers only
        return Any


def _rule(hint: Any, bounds: Sequence[Rule]) -> Rule | None:
    """Return what ``hint`` allows, its numbers within ``bounds``; None if that is not known."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _rule(args[0], [*(said for said in args[1:] if isinstance(said, Rule)), *bounds])
    if origin in (Union, UnionType):
        rules = [rule for alternative in args if (rule := _rule(alternative, bounds)) is not None]
        return _any_of(rules) if len(rules) == len(args) else None
    if origin is Literal:
        return _any_of([_only(choice) for choice in args])
    if hint is int or hint is float:
        return reduce(_within, bounds, _INT if hint is int else _FLOAT)
    return next((rule for kind, rule in _OTHERS if kind is hint), None)


def _any_of(rules: Sequence[Rule]) -> Rule:
    *first, last = [rule.expected for rule in rules]
    expected = f"{', '.join(first)} or {last}" if first else last
    return Rule(expected, lambda value: any(rule.allows(value) for rule in rules))


def _only(choice: object) -> Rule:
    return Rule(repr(choice), lambda value: type(value) is type(choice) and value == choice)


def _within(number: Rule, bound: Rule) -> Rule:
    return Rule(bound.expected.format(number.expected), lambda value: number.allows(value) and bound.allows(value))


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


# what torch can hold
_INT = Rule("a whole number", lambda value: _is_number(value, int) and -(2**63) <= value < 2**63)
_FLOAT = Rule("a number", lambda value: _is_number(value, int, float) and abs(value) <= sys.float_info.max)
_OTHERS = (
    (bool, Rule("true or false", lambda value: isinstance(value, bool))),
    (str, Rule("a text", lambda value: isinstance(value, str))),
    (NoneType, Rule("None", lambda value: value is None)),
)
