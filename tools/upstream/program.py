"""Modules and classes of several packages from their syntax trees alone: names, bases, members, signatures."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from functools import cache

from tools.upstream.infer import Scope, annotation
from tools.upstream.sources import Source, Sources
from tools.upstream.syntax import FunctionNode, bound_names, counts, is_property, kind, set_on, statements
from tools.upstream.values import (
    MISSING,
    UNKNOWN,
    Builtin,
    Class,
    Either,
    Function,
    Instance,
    Missing,
    Module,
    Outside,
    Super,
    Type,
    Unknown,
    either,
)


@cache
def parsed(text: str) -> ast.Module:
    """Parse a module once, however many programs it is part of."""
    return ast.parse(text)


class Program:
    """What can be known of a set of modules without running them.

    roles: objects that are Any to a type checker, by the name of the variable -> the full names of their classes
    """

    def __init__(self, sources: Sources, roles: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.sources = sources
        self.roles = roles or {}
        self._scopes: dict[str, dict[str, list[ast.AST]]] = {}
        self._names: dict[tuple[str, str], Type] = {}
        self._mros: dict[Class, list[Class | Outside]] = {}
        self._own: dict[Class, dict[str, list[tuple[ast.AST, FunctionNode | None]]]] = {}
        self._members: dict[tuple[Class, str, Class], Type] = {}

    def tree(self, module: str) -> ast.Module:
        return parsed(self.sources[module].text)

    def source(self, module: str) -> Source:
        return self.sources[module]

    def classes(self, module: str) -> list[Class]:
        """Return the classes that a module defines outside of functions."""
        nodes = (node for nodes in self._scope(module).values() for node in nodes)
        return [Class(module, node.name, node) for node in nodes if isinstance(node, ast.ClassDef)]

    def named(self, path: str) -> Type:
        """Return what "package.module.Name", or "package.module:Name.attribute", stands for."""
        dotted = path.replace(":", ".")
        for end in range(len(dotted), 0, -1):
            if dotted[:end] in self.sources and (end == len(dotted) or dotted[end] == "."):
                found: Type = Module(dotted[:end])
                for name in filter(None, dotted[end:].split(".")):
                    found = self.member(found, name)
                return found
        return MISSING

    def lookup(self, module: str, name: str) -> Type:
        """Return what a name means in a module, imports followed."""
        key = module, name
        if key not in self._names:
            self._names[key] = UNKNOWN  # what a circle of imports comes to
            self._names[key] = self._look_up(module, name)
        return self._names[key]

    def _look_up(self, module: str, name: str) -> Type:
        nodes = self._scope(module).get(name, [])
        found = [self.defined_by(module, node, name) for node in nodes]
        known = [each for each in found if not isinstance(each, Unknown | Missing)]
        # of a name that is bound in several ways, e.g. to None without an optional package, the first class or function
        telling = [each for each in known if isinstance(each, Class | Function | Module)]
        if telling or known:
            return (telling or known)[0]
        if found:
            return MISSING if all(isinstance(each, Missing) for each in found) else UNKNOWN
        if f"{module}.{name}" in self.sources:
            return Module(f"{module}.{name}")
        for node in self._scope(module).get("*", []):
            starred = self.defined_by(module, node, name)
            if not isinstance(starred, Missing):
                return starred
        return MISSING

    def defined_by(self, module: str, node: ast.AST, name: str) -> Type:
        """Return what a statement of a module binds a name to."""
        scope = Scope(self, module)
        match node:
            case ast.ClassDef():
                return Class(module, node.name, node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                return Function(module, node)
            case ast.Import():
                alias = next(each for each in node.names if (each.asname or each.name.split(".")[0]) == name)
                path = alias.name if alias.asname else name
                return Module(path) if path in self.sources else Outside(path)
            case ast.ImportFrom():
                original = next((each.name for each in node.names if (each.asname or each.name) == name), name)
                return self.imported(module, node, original)
            case ast.AnnAssign():
                return annotation(scope, node.annotation)
            case ast.Assign():
                return scope.type_of(node.value)
        return UNKNOWN

    def imported(self, module: str, node: ast.ImportFrom, name: str) -> Type:
        """Return what ``from ... import name`` in a module takes."""
        package = self.sources[module].package.split(".") if node.level else []
        parts = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        origin = ".".join(parts)
        if origin in self.sources:
            return self.lookup(origin, name)
        return MISSING if parts[0] in self.sources else Outside(f"{origin}.{name}")

    def _scope(self, module: str) -> dict[str, list[ast.AST]]:
        if module not in self._scopes:
            scope = self._scopes[module] = {}
            for node in statements(self.tree(module)):
                for name in bound_names(node):
                    scope.setdefault(name, []).append(node)
        return self._scopes[module]

    def mro(self, cls: Class) -> list[Class | Outside]:
        """Return a class and its bases in the order in which Python asks them."""
        if cls not in self._mros:
            self._mros[cls] = [cls]  # of a class that is its own base in a circle of imports
            bases = map(Scope(self, cls.module).type_of, map(_unsubscripted, cls.node.bases))
            known = [base for base in bases if isinstance(base, Class | Outside)]
            lines = [self.mro(base) if isinstance(base, Class) else [base] for base in known]
            self._mros[cls] = [cls, *_merged([*map(list, lines), list(known)])]
        return self._mros[cls]

    def own(self, cls: Class) -> dict[str, list[tuple[ast.AST, FunctionNode | None]]]:
        """Return what a class itself defines: name -> (statement or value, method that assigns it to ``self``)."""
        if cls not in self._own:
            found = self._own[cls] = {}
            for node in statements(cls.node):
                for name in bound_names(node):
                    found.setdefault(name, []).append((node, None))
                if isinstance(node, FunctionNode) and node.args.args:
                    for name, value in set_on(node.args.args[0].arg, node):
                        found.setdefault(name, []).append((value, node))
        return self._own[cls]

    def owner(self, cls: Class, name: str, after: Class | None = None) -> Class | None:
        """Return which class of the mro, behind ``after`` if that is given, defines a member."""
        line = self.mro(cls)
        start = line.index(after) + 1 if after is not None else 0
        return next((each for each in line[start:] if isinstance(each, Class) and name in self.own(each)), None)

    def method(self, owner: Class, name: str) -> FunctionNode | None:
        """Return a method that a class itself defines, None if the name is something else."""
        nodes = [node for node, setter in self.own(owner).get(name, []) if setter is None]
        return next((node for node in reversed(nodes) if isinstance(node, FunctionNode) and counts(node)), None)

    def member(self, of: Type, name: str) -> Type:
        """Return what ``of.name`` is."""
        match of:
            case Module():
                return self.lookup(of.name, name)
            case Outside():
                return Outside(f"{of.path}.{name}")
            case Instance():
                return self._member_of_class(of.cls, name, of.cls, is_instance=True)
            case Super():
                return self._member_of_class(of.of, name, of.of, is_instance=True, after=of.after)
            case Class():
                return self._member_of_class(of, name, of, is_instance=False)
            case Builtin():
                python = {"deque": "collections", "defaultdict": "collections"}.get(of.name, "builtins")
                kind = getattr(importlib.import_module(python), of.name, None)
                return MISSING if isinstance(kind, type) and not hasattr(kind, name) else UNKNOWN
            case Either():
                found = [self.member(each, name) for each in of.types]
                there = [each for each in found if not isinstance(each, Missing)]
                return either(there) if there else MISSING
        return UNKNOWN

    def _member_of_class(
        self, cls: Class, name: str, receiver: Class, *, is_instance: bool, after: Class | None = None
    ) -> Type:
        owner = self.owner(cls, name, after)
        if owner is not None:
            found = self._member_of_owner(owner, name, receiver)
            if isinstance(found, Function) and not is_instance and kind(found.node) == "instance":
                return Function(found.module, found.node, found.owner, is_bound=False)
            return found
        line = self.mro(cls)
        line = line[line.index(after) + 1 :] if after is not None else line
        return UNKNOWN if _is_dunder(name) or any(self._may_have(each, name) for each in line) else MISSING

    def _may_have(self, base: Class | Outside, name: str) -> bool:
        if isinstance(base, Class):
            return "__getattr__" in self.own(base)
        module, _, attribute = base.path.rpartition(".")
        try:
            return hasattr(getattr(importlib.import_module(module or "builtins"), attribute), name)
        except (ImportError, AttributeError):
            return True

    def _member_of_owner(self, owner: Class, name: str, receiver: Class) -> Type:
        key = owner, name, receiver
        if key not in self._members:
            self._members[key] = UNKNOWN
            self._members[key] = self._type_of_member(owner, name, receiver)
        return self._members[key]

    def _type_of_member(self, owner: Class, name: str, receiver: Class) -> Type:
        method = self.method(owner, name)
        if method is not None:
            function = Function(owner.module, method, owner, is_bound=kind(method) != "static")
            return Scope.of(self, function, receiver).returned(method) if is_property(method) else function
        definitions = self.own(owner)[name]
        if any(isinstance(base, Outside) and base.path.startswith("enum.") for base in self.mro(owner)):
            return Instance(receiver)
        types: list[Type] = []
        for node, setter in definitions:
            scope = Scope(self, owner.module)
            if setter is not None:
                scope = Scope.of(self, Function(owner.module, setter, owner, is_bound=True), receiver)
            if isinstance(node, ast.AnnAssign):
                declared = annotation(scope, node.annotation)
                if not isinstance(declared, Unknown):
                    return declared
            value = node.value if isinstance(node, ast.AnnAssign | ast.Assign) else node
            is_none = value is None or (isinstance(value, ast.Constant) and value.value is None)
            if isinstance(node, ast.ClassDef):
                types.append(Class(owner.module, node.name, node))
            elif not is_none:
                types.append(scope.type_of(value) if isinstance(value, ast.expr) else UNKNOWN)
        return either(types)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _unsubscripted(node: ast.expr) -> ast.expr:
    return node.value if isinstance(node, ast.Subscript) else node


def _merged(lines: list[list[Class | Outside]]) -> list[Class | Outside]:
    """C3, as Python's own; a line that does not go is appended."""
    merged: list[Class | Outside] = []
    while lines := [line for line in lines if line]:
        heads = (line[0] for line in lines)
        head = next((each for each in heads if not any(each in line[1:] for line in lines)), lines[0][0])
        merged.append(head)
        lines = [[each for each in line if each != head] for line in lines]
    return merged
