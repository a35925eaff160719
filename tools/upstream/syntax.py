"""What syntax trees say of functions and classes by themselves, names not looked up."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Binding = tuple[str, ast.expr | ast.stmt]
_NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def kind(node: FunctionNode) -> str:
    """Return how a method is called: "static", "class" or "instance"."""
    names = decorators(node)
    if "staticmethod" in names or node.name == "__new__":
        return "static"
    return "class" if "classmethod" in names or node.name == "__init_subclass__" else "instance"


def decorators(node: FunctionNode | ast.ClassDef) -> list[str]:
    """Return the last parts of the names of its decorators."""
    plain = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return [ast.unparse(each).rpartition(".")[2] for each in plain]


def is_property(node: FunctionNode) -> bool:
    return bool({"property", "cached_property", "abstractproperty"} & set(decorators(node)))


def counts(node: FunctionNode) -> bool:
    return not {"overload", "setter", "deleter"} & set(decorators(node))


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from statements(node)


def bound_names(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Import():
            return [alias.asname or alias.name.split(".")[0] for alias in node.names]
        case ast.ImportFrom():
            return [alias.asname or alias.name for alias in node.names]
        case ast.Assign():
            flat = [each for target in node.targets for each in ast.walk(target)]
            return [each.id for each in flat if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
        case ast.AnnAssign() | ast.AugAssign() | ast.For():
            return [node.target.id] if isinstance(node.target, ast.Name) else []
    return []


def set_on(receiver: str, method: FunctionNode) -> Iterator[tuple[str, ast.AST]]:
    """Yield (attribute, statement or value) of what a method assigns to its first parameter."""
    for node in ast.walk(method):
        pairs: list[tuple[ast.expr, ast.AST]] = []
        match node:
            case ast.Assign(targets=[ast.Tuple() as left], value=ast.Tuple() as right):
                pairs = list(zip(left.elts, right.elts, strict=False))
            case ast.Assign():
                pairs = [(target, node) for target in node.targets]
            case ast.AnnAssign():
                pairs = [(node.target, node)]
            case ast.For() | ast.AsyncFor():
                pairs = [(node.target, ast.Pass())]  # what it is, we do not find out
            case ast.withitem(optional_vars=ast.expr() as target):
                pairs = [(target, ast.Pass())]
        for target, value in pairs:
            for each in ast.walk(target):
                match each:
                    case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store()) if name == receiver:
                        yield each.attr, value if target is each else ast.Pass()


def signature(node: FunctionNode) -> inspect.Signature:
    """Return the signature that a function declares, with ``...`` for every default."""
    arguments, Parameter = node.args, inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    with_default = len(plain) - len(arguments.defaults)
    parameters = []
    for place, argument in enumerate(plain):
        of_kind = Parameter.POSITIONAL_ONLY if place < len(arguments.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD
        default = ... if place >= with_default else Parameter.empty
        parameters.append(Parameter(argument.arg, of_kind, default=default))
    if arguments.vararg:
        parameters.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = Parameter.empty if value is None else ...
        parameters.append(Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=default))
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every node below ``node``, but not those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (*_NESTED, ast.ClassDef)):
            yield from inside(child)


def bindings(function: FunctionNode) -> dict[str, list[Binding]]:
    """Return what names are bound to inside a function: a path into the value, and the value."""
    found: dict[str, list[Binding]] = {}

    def bind(target: ast.AST, value: ast.expr | ast.stmt, path: str = "") -> None:
        if isinstance(target, ast.Name):
            found.setdefault(target.id, []).append((path, value))
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple) and not path:
            for one, part in zip(target.elts, value.elts, strict=False):
                bind(one, part)
        elif isinstance(target, ast.Tuple | ast.List):
            for place, one in enumerate(target.elts):
                bind(one, value, f"{path}.{place}")
        elif isinstance(target, ast.Starred):
            bind(target.value, function)

    for node in inside(function):
        match node:
            case ast.Assign():
                for target in node.targets:
                    bind(target, node.value)
            case ast.AnnAssign():
                bind(node.target, node)
            case ast.NamedExpr():
                bind(node.target, node.value)
            case ast.For() | ast.AsyncFor() | ast.comprehension():
                bind(node.target, node.iter, "each")
            case ast.withitem() if node.optional_vars is not None:
                bind(node.optional_vars, function)
            case ast.ExceptHandler() if node.name:
                found.setdefault(node.name, []).append(("", function))
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    name = alias.asname or alias.name.split(".")[0]
                    found.setdefault(name, []).append((name, node))
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found.setdefault(node.name, []).append(("", function))
            case ast.ClassDef():
                found.setdefault(node.name, []).append((node.name, node))
    return found
