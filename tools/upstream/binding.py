"""Whether calls bind to signatures, and whether one signature takes whatever another one takes."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from tools.upstream.program import Program
from tools.upstream.syntax import FunctionNode, decorators, kind, signature, statements
from tools.upstream.values import Class, Function, Outside

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# decorators and bases that make a constructor from a class's fields
_DATACLASS = {"dataclass", "config"}
_RECORDS = {"msgspec.Struct", "pydantic.BaseModel", "typing.NamedTuple"}


def parameters(node: FunctionNode, *, is_bound: bool) -> inspect.Signature:
    """Return the signature of a function as its caller sees it."""
    full = signature(node)
    first = next(iter(full.parameters.values()), None)
    if not is_bound or first is None or first.kind not in _POSITIONAL:
        return full
    return full.replace(parameters=list(full.parameters.values())[1:])


def as_method(node: FunctionNode) -> inspect.Signature:
    """Return the signature of a method without ``self`` or ``cls``."""
    return parameters(node, is_bound=kind(node) != "static")


def call_error(call: ast.Call, taken: inspect.Signature) -> str | None:
    """Return why a call does not bind; of what ``*args`` and ``**kwargs`` hold in it, it may be anything."""
    is_open = any(isinstance(each, ast.Starred) for each in call.args) or any(
        each.arg is None for each in call.keywords
    )
    given = [ast.unparse(each) for each in call.args if not isinstance(each, ast.Starred)]
    named = {each.arg: ast.unparse(each.value) for each in call.keywords if each.arg is not None}
    try:
        (taken.bind_partial if is_open else taken.bind)(*given, **named)
    except TypeError as error:
        return str(error)
    return None


def narrower(ours: inspect.Signature, theirs: inspect.Signature) -> str | None:
    """Return what a caller of ``theirs`` may do that ``ours`` does not take, None if it takes it all."""
    for given, named in _calls(theirs):
        try:
            bound = ours.bind(*given, **named)
        except TypeError as error:
            return f"{error}, for a call ({', '.join([*given, *(f'{name}=' for name in named)])})"
        for name, value in bound.arguments.items():
            if ours.parameters[name].kind in _POSITIONAL and name != value and name in theirs.parameters:
                return f"{value!r}, given by position, comes in as {name!r}"
    of_kind = inspect.Parameter
    for variadic, stars in ((of_kind.VAR_POSITIONAL, "*"), (of_kind.VAR_KEYWORD, "**")):
        takes = [any(each.kind == variadic for each in one.parameters.values()) for one in (theirs, ours)]
        if takes == [True, False]:
            return f"theirs takes any {stars}arguments"
    return None


def _calls(taken: inspect.Signature) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield calls that bind: each parameter's value is its own name.

    The first ones by position, for every number of them, and the others by name; with all that is optional and without.
    """
    declared = list(taken.parameters.values())
    places = [each for each in declared if each.kind in _POSITIONAL]
    named = [each for each in declared if each.kind == inspect.Parameter.KEYWORD_ONLY]
    num_nameless = sum(each.kind == inspect.Parameter.POSITIONAL_ONLY for each in places)
    for is_short in (False, True):
        first = [each for each in places if not is_short or each.default is inspect.Parameter.empty]
        others = [each.name for each in named if not is_short or each.default is inspect.Parameter.empty]
        for num_given in range(len(first), min(num_nameless, len(first)) - 1, -1):
            by_name = [each.name for each in first[num_given:]] + others
            yield [each.name for each in first[:num_given]], {name: name for name in by_name}


def constructor(program: Program, cls: Class) -> inspect.Signature | None:
    """Return what a class is called with, None if that cannot be told."""
    for base in program.mro(cls):
        if isinstance(base, Outside):
            return _of_fields(program, cls) if base.path in _RECORDS else None
        init = program.method(base, "__init__")
        if init is not None:
            return as_method(init)
        if _DATACLASS & set(decorators(base.node)):
            return _of_fields(program, cls)
    return inspect.Signature()


def fields_of(program: Program, cls: Class) -> dict[str, inspect.Parameter]:
    """Return the fields of a dataclass or the like that its constructor takes."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(program.mro(cls)):
        if isinstance(base, Class):
            is_named = _says(base.node.keywords, "kw_only") or any(
                isinstance(each, ast.Call) and _says(each.keywords, "kw_only") for each in base.node.decorator_list
            )
            for node in statements(base.node):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    if ast.unparse(node.annotation).rpartition(".")[2] == "KW_ONLY":
                        is_named = True
                    elif "ClassVar" not in ast.unparse(node.annotation):
                        _add_field(found, node.target.id, node.value, is_named)
    return found


def _add_field(found: dict[str, inspect.Parameter], name: str, value: ast.expr | None, is_named: bool) -> None:
    options = value.keywords if isinstance(value, ast.Call) and "ield" in ast.unparse(value.func) else None
    if options is not None and any(each.arg == "init" and ast.unparse(each.value) == "False" for each in options):
        found.pop(name, None)
        return
    has_default = value is not None
    if isinstance(value, ast.Call) and options is not None:
        has_default = bool(value.args) or bool({"default", "default_factory"} & {each.arg for each in options})
        is_named = is_named or _says(options, "kw_only")
    of_kind = inspect.Parameter.KEYWORD_ONLY if is_named else inspect.Parameter.POSITIONAL_OR_KEYWORD
    found[name] = inspect.Parameter(name, of_kind, default=... if has_default else inspect.Parameter.empty)


def _says(options: list[ast.keyword], name: str) -> bool:
    return any(each.arg == name and ast.unparse(each.value) == "True" for each in options)


def _of_fields(program: Program, cls: Class) -> inspect.Signature | None:
    declared = sorted(fields_of(program, cls).values(), key=lambda each: each.kind)
    try:
        return inspect.Signature(declared)
    except ValueError:  # a default before none: fields of several classes, in an order that only Python knows
        return None


def binding_error(program: Program, call: ast.Call, called: Class | Function) -> str | None:
    """Return why a call does not bind to a function or class."""
    if isinstance(called, Function):
        return call_error(call, parameters(called.node, is_bound=called.is_bound))
    taken = constructor(program, called)
    return None if taken is None else call_error(call, taken)
