"""What of ours a given vLLM breaks: the two packages' sources side by side, nothing imported, nothing run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tools.upstream.binding import as_method, binding_error, call_error, fields_of, narrower
from tools.upstream.infer import Scope, annotation
from tools.upstream.ours import THEIRS, Override, Upstream, is_theirs
from tools.upstream.syntax import FunctionNode, decorators, is_property, kind, signature
from tools.upstream.values import (
    MISSING,
    Builtin,
    Class,
    Either,
    Function,
    Instance,
    Missing,
    Module,
    Super,
    Type,
    Unknown,
)
from tools.upstream.walk import Seen

PATH = re.compile(r"vllm(\.\w+)+(:\w+(\.\w+)*)?")
LOGGER = "vllm.kvevict"  # named as if it were a module of vLLM's


@dataclass(frozen=True, order=True)
class Finding:
    """Something that breaks. place: file and line of ours."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def imports(upstream: Upstream, seen: Seen) -> Iterator[str]:
    """What we import, or name in a string, is there."""
    program = upstream.program
    match seen.node:
        case ast.Import(names=names):
            lost = [each.name for each in names if isinstance(program.named(each.name), Missing)]
        case ast.ImportFrom(names=names) as node:
            found = {each.name: program.imported(seen.scope.module, node, each.name) for each in names}
            lost = [f"{node.module}.{name}" for name, what in found.items() if isinstance(what, Missing)]
        case ast.Constant(value=str() as path) if PATH.fullmatch(path) and path != LOGGER:
            lost = [path] if isinstance(program.named(path), Missing) else []
        case _:
            return
    yield from (f"{name} is gone" for name in lost if name.split(".")[0] == THEIRS)


def overrides(upstream: Upstream) -> Iterator[Finding]:
    """Whatever may be passed to a method of vLLM, ours in its place takes as well."""
    for override in upstream.overrides:
        why = _unlike(override) or narrower(as_method(override.ours.node), as_method(override.theirs.node))
        if why is not None:
            yield _on(upstream, override, why)
    for wrapped in upstream.wrapped:
        theirs = upstream.program.named(wrapped.target)
        ours = next((each for each in wrapped.wrap.node.body if isinstance(each, FunctionNode)), None)
        if isinstance(theirs, Function) and ours is not None:
            is_static = kind(theirs.node) == "static"
            why = narrower(signature(ours) if is_static else as_method(ours), as_method(theirs.node))
            if why is not None:
                place = upstream.place(wrapped.wrap.module, ours)
                yield Finding(place, f"what wraps {wrapped.target} takes less than that: {why}")
    for (cls, name), node in upstream.unheard.items():
        if not upstream.is_for_the_newest(cls, name):
            yield Finding(
                upstream.place(cls.module, node), f"{cls}.{name} replaces nothing of vLLM's, and is not called"
            )


def vllm_calls(upstream: Upstream) -> Iterator[Finding]:
    """Every call in vLLM's code that binds to a method that we replace binds to ours."""
    by_name: dict[str, list[Override]] = {}
    for override in upstream.overrides:
        if not override.name.startswith("__"):
            by_name.setdefault(override.name, []).append(override)
    for module in _area(upstream, by_name):
        broken: dict[ast.Call, list[tuple[Override, str]]] = {}
        for node in ast.walk(upstream.program.tree(module)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in by_name:
                errors = ((each, call_error(node, as_method(each.ours.node))) for each in by_name[node.func.attr])
                broken[node] = [(each, why) for each, why in errors if why is not None]
        for call, scope in _calls_in(upstream, module) if any(broken.values()) else ():
            for override, why in broken.get(call, ()):
                if _is_for(upstream, call, scope, override):
                    written = f"{ast.unparse(call)} ({upstream.place(module, call)})"
                    yield _on(upstream, override, f"{why}, for the call {written}")


def _is_for(upstream: Upstream, call: ast.Call, scope: Scope, override: Override) -> bool:
    """Return whether a call may be to the method that ours replaces, and binds to that."""
    on = scope.type_of(call.func.value) if isinstance(call.func, ast.Attribute) else MISSING
    cls = on.cls if isinstance(on, Instance) else on
    if isinstance(cls, Super | Module) or (isinstance(cls, Class) and cls not in upstream.program.mro(override.cls)):
        return False
    return call_error(call, as_method(override.theirs.node)) is None


def our_calls(upstream: Upstream, seen: Seen) -> Iterator[str]:
    """Every call of ours to a function, method or class of vLLM binds."""
    if not isinstance(seen.node, ast.Call):
        return
    called = seen.scope.type_of(seen.node.func)
    every = [each for each in _each(called) if isinstance(each, Class | Function) and _concerns(upstream, each)]
    errors = [binding_error(upstream.program, seen.node, each) for each in every]
    if errors and all(errors):
        yield f"{called} is called in vain: {errors[0]}"
    if isinstance(seen.node.func, ast.Attribute) and seen.node.func.attr == "replace":
        # of a dataclass: it takes any name, and fails for what is not a field
        of = seen.scope.type_of(seen.node.func.value)
        fields = fields_of(upstream.program, of.cls) if isinstance(of, Instance) else {}
        lost = [each.arg for each in seen.node.keywords if fields and each.arg is not None and each.arg not in fields]
        if lost:
            yield f"{of} has no field {', '.join(lost)}"


def abstract(upstream: Upstream) -> Iterator[Finding]:
    """No class of ours that has objects lacks a method that vLLM's base class leaves open."""
    program = upstream.program
    for cls in upstream.made:
        for base in program.mro(cls):
            for name in program.own(base) if isinstance(base, Class) else ():
                method = program.method(base, name) if program.owner(cls, name) == base else None
                if method is not None and "abstractmethod" in decorators(method):
                    yield Finding(upstream.place(cls.module, cls.node), f"{cls} has no {name}, abstract in {base}")


def collisions(upstream: Upstream) -> Iterator[Finding]:
    """The newest vLLM gives no meaning to a name that is ours on this one."""
    for (cls, name), theirs in upstream.newly_shared.items():
        yield Finding(upstream.place(cls.module, cls.node), f"{cls}.{name} is ours, and {theirs}.{name} in the newest")


def names(upstream: Upstream, seen: Seen) -> Iterator[str]:
    """Every attribute that we read or set on an object of vLLM's is there."""
    match seen.node:
        case ast.Attribute(value=value, attr=name):
            of = seen.scope.type_of(value)
        case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str() as name), *_]):
            of = seen.scope.type_of(value)
        case _:
            return
    if any(_concerns(upstream, each) for each in _each(of)):
        if not upstream.has(of, name):
            yield f"{ast.unparse(value)}.{name}: {of} has no {name!r}"
    elif isinstance(of, Unknown) and name.startswith("_") and not name.endswith("__"):
        yield from [] if upstream.defines(name) else [f"nothing of vLLM's defines {name!r}"]


def containers(upstream: Upstream, seen: Seen) -> Iterator[str]:
    """Where our annotation says which container one of vLLM's variables is, it is that."""
    match seen.node:
        case ast.AnnAssign(value=ast.Attribute() as value, annotation=declared):
            found, expected = seen.scope.type_of(value), _each(annotation(seen.scope, declared))
            names = {each.name for each in expected if isinstance(each, Builtin)}
            if isinstance(found, Builtin) and len(names) == len(expected) and found.name not in names:
                yield f"{ast.unparse(value)} is a {found}, and ours expects {' or '.join(sorted(names))}"


def _each(of: Type) -> tuple[Type, ...]:
    return of.types if isinstance(of, Either) else (of,)


def _concerns(upstream: Upstream, of: Type) -> bool:
    """Return whether a new vLLM can change this."""
    match of:
        case Instance():
            return any(map(is_theirs, upstream.program.mro(of.cls)))
        case Class():
            return any(map(is_theirs, upstream.program.mro(of)))
    return isinstance(of, Super | Builtin) or is_theirs(of)


def _unlike(override: Override) -> str | None:
    ours, theirs = override.ours.node, override.theirs.node
    if is_property(ours) != is_property(theirs):
        return "one of the two is a property"
    if isinstance(ours, ast.AsyncFunctionDef) != isinstance(theirs, ast.AsyncFunctionDef):
        return "one of the two is async"
    if kind(ours) == "instance" and kind(theirs) != "instance":
        return f"theirs is a {kind(theirs)} method"
    return None


def _on(upstream: Upstream, override: Override, why: str) -> Finding:
    theirs = upstream.place(override.theirs.module, override.theirs.node)
    place = upstream.place(override.ours.module, override.ours.node)
    return Finding(place, f"{override.ours} in place of {override.theirs} ({theirs}): {why}")


def _area(upstream: Upstream, names: Iterable[str]) -> Iterator[str]:
    """Yield the modules of vLLM that call a method by one of these names, and may know an object of ours."""
    replaced = {override.theirs.module for override in upstream.overrides}
    areas = tuple({".".join(module.split(".")[:2]) + "." for module in replaced})
    classes = re.compile("|".join({str(override.theirs.owner) for override in upstream.overrides}))
    called = re.compile(rf"\.(?:{'|'.join(names)})\(")
    for module in upstream.their_modules:
        text = upstream.program.source(module).text
        if called.search(text) and (module.startswith(areas) or classes.search(text)):
            yield module


def _calls_in(upstream: Upstream, module: str) -> Iterator[tuple[ast.Call, Scope]]:
    """Yield the calls ``x.name(...)`` of a module, each with the names of the function around it."""

    def below(node: ast.AST, scope: Scope, cls: Class | None) -> Iterator[tuple[ast.Call, Scope]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
                yield child, scope
            if isinstance(child, ast.ClassDef):
                yield from below(child, scope, Class(module, child.name, child))
            elif isinstance(child, FunctionNode):
                function = Function(module, child, cls, is_bound=cls is not None)
                yield from below(child, Scope.of(upstream.program, function, cls, scope), None)
            else:
                yield from below(child, scope, cls)

    return below(upstream.program.tree(module), Scope(upstream.program, module), None)


# of every node of ours, and of all at once
_OF_NODES = {"imports": imports, "our_calls": our_calls, "names": names, "containers": containers}
_OF_ALL = {"overrides": overrides, "vllm_calls": vllm_calls, "abstract": abstract, "collisions": collisions}
CHECKS = {**_OF_NODES, **_OF_ALL}


def findings(upstream: Upstream, names: Iterable[str] = CHECKS) -> dict[str, list[Finding]]:
    """Return what some of ``CHECKS`` find. Twice as fast without garbage collection, which goes through all trees."""
    found: dict[str, set[Finding]] = {name: set() for name in names}
    for name, of_all in _OF_ALL.items():
        found |= {name: set(of_all(upstream))} if name in found else {}
    of_nodes = {name: check for name, check in _OF_NODES.items() if name in found}
    for seen in upstream.seen() if of_nodes else ():
        for name, of_node in of_nodes.items() if not seen.is_guarded else ():
            place = upstream.place(seen.scope.module, seen.node)
            found[name] |= {Finding(place, text) for text in of_node(upstream, seen)}
    return {name: sorted(found[name]) for name in found}
