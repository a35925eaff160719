"""Every expression of our code with what its names stand for, once for each class whose objects run it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tools.upstream.infer import Scope, annotation
from tools.upstream.program import Program
from tools.upstream.syntax import FunctionNode
from tools.upstream.values import MISSING, Builtin, Class, Either, Function, Instance, Missing, Outside, Type, Unknown

# what a version of vLLM may lack where one of these is caught
_CAUGHT = {"ImportError", "ModuleNotFoundError", "AttributeError", "Exception"}


@dataclass(frozen=True)
class Seen:
    """One node. is_guarded: where it stands, what it asks for may be missing."""

    node: ast.AST
    scope: Scope
    is_guarded: bool = False


class Walk:
    """Visits what stands in modules of ours.

    made:      classes of ours that derive from one of vLLM's, and have objects
    originals: functions of ours that wrap one of vLLM's, by module and name -> that one
    idle:      methods to be left out
    """

    def __init__(
        self,
        program: Program,
        made: list[Class],
        originals: dict[tuple[str, str], Function],
        idle: list[FunctionNode],
    ) -> None:
        self._program = program
        self._made = made
        self._originals = originals
        self._idle = idle
        self._is_guarded = False
        self._allowed: list[str] = []

    def module(self, module: str) -> Iterator[Seen]:
        scope = Scope(self._program, module)
        for node in ast.iter_child_nodes(self._program.tree(module)):
            if isinstance(node, FunctionNode) and (module, node.name) in self._originals:
                yield from self._wrapper(node, scope, self._originals[module, node.name])
            else:
                yield from self._visit(node, scope)

    def _wrapper(self, node: FunctionNode, scope: Scope, original: Function) -> Iterator[Seen]:
        """Visit a function that takes vLLM's and returns what takes its place, which gets the same arguments."""
        outer = Scope.of(self._program, Function(scope.module, node), None, scope)
        outer.given[node.args.args[0].arg] = Function(original.module, original.node, original.owner)
        for child in node.body:
            if not isinstance(child, FunctionNode):
                yield from self._visit(child, outer)
                continue
            inner = Scope.of(self._program, Function(scope.module, child), None, outer)
            theirs = Scope.of(self._program, original, original.owner)
            for argument in (*child.args.args, *child.args.kwonlyargs):
                found = theirs.name(argument.arg)
                if not isinstance(found, Missing | Outside):
                    inner.given[argument.arg] = found
            for each in child.body:
                yield from self._visit(each, inner)

    def _visit(self, node: ast.AST, scope: Scope) -> Iterator[Seen]:
        is_guarded = self._is_guarded or (
            isinstance(node, ast.Attribute) and f"{ast.unparse(node.value)}.{node.attr}" in self._allowed
        )
        yield Seen(node, scope, is_guarded)
        match node:
            case ast.ClassDef():
                yield from self._class(node, scope)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from self._function(node, scope, None, None)
            case ast.If() | ast.IfExp():
                yield from self._branches(node, scope)
            case ast.Try():
                caught = {ast.unparse(each) for one in node.handlers if one.type for each in ast.walk(one.type)}
                with self._guard(bool(caught & _CAUGHT)):
                    yield from self._visit_all(node.body, scope)
                yield from self._visit_all([*node.handlers, *node.orelse, *node.finalbody], scope)
            case _:
                yield from self._visit_all(ast.iter_child_nodes(node), scope)

    def _visit_all(self, nodes: Iterable[ast.AST], scope: Scope) -> Iterator[Seen]:
        rest = list(nodes)
        while rest:
            node = rest.pop(0)
            yield from self._visit(node, scope)
            match node:
                # behind `if not isinstance(x, T): return` x is a T
                case ast.If(test=ast.UnaryOp(op=ast.Not(), operand=test), body=[*_, last], orelse=[]):
                    if isinstance(last, ast.Return | ast.Raise | ast.Continue | ast.Break):
                        written, narrowed, _, _ = self._narrowing(test, scope)
                        with self._narrow(scope, written, narrowed):
                            yield from self._visit_all(rest, scope)
                        return

    def _class(self, node: ast.ClassDef, scope: Scope) -> Iterator[Seen]:
        cls = Class(scope.module, node.name, node)
        receivers = [each for each in self._made if cls in self._program.mro(each)] or [cls]
        yield from self._visit_all([*node.decorator_list, *node.bases, *node.keywords], scope)
        for child in node.body:
            if child in self._idle:
                continue
            if isinstance(child, FunctionNode):
                for receiver in receivers:
                    yield from self._function(child, scope, cls, receiver)
            else:
                yield from self._visit(child, scope)

    def _function(
        self, node: FunctionNode, scope: Scope, owner: Class | None, receiver: Class | None
    ) -> Iterator[Seen]:
        yield from self._visit_all([*node.decorator_list, *filter(None, node.args.kw_defaults)], scope)
        yield from self._visit_all([*node.args.defaults], scope)
        function = Function(scope.module, node, owner, is_bound=owner is not None)
        yield from self._visit_all([*node.body], Scope.of(self._program, function, receiver, scope))

    def _branches(self, node: ast.If | ast.IfExp, scope: Scope) -> Iterator[Seen]:
        yield from self._visit(node.test, scope)
        body = node.body if isinstance(node.body, list) else [node.body]
        orelse = node.orelse if isinstance(node.orelse, list) else [node.orelse]
        test, then, otherwise = node.test, body, orelse
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, then, otherwise = test.operand, orelse, body
        written, narrowed, can_be, must_be = self._narrowing(test, scope)
        with self._narrow(scope, written, narrowed), self._guard(not can_be), self._allow(test):
            yield from self._visit_all([*then], scope)
        with self._guard(must_be):
            yield from self._visit_all([*otherwise], scope)

    def _narrowing(self, test: ast.expr, scope: Scope) -> tuple[str, Type, bool, bool]:
        """Return what ``isinstance(x, T)`` says: the text of x, its type then, whether that can be, and must be."""
        tests = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
        for each in tests:
            if isinstance(each, ast.Call) and ast.unparse(each.func) == "isinstance" and len(each.args) == 2:
                known, asked = scope.type_of(each.args[0]), annotation(scope, each.args[1])
                if isinstance(asked, Unknown):
                    return "", MISSING, True, False
                possible = list(known.types) if isinstance(known, Either) else [known]
                verdicts = [self._is_a(one, asked) for one in possible]
                must_be = len(tests) == 1 and all(verdict is True for verdict in verdicts)
                written = "" if must_be else ast.unparse(each.args[0])  # what is known says more
                return written, asked, any(verdict is not False for verdict in verdicts), must_be
        return "", MISSING, True, False

    def _is_a(self, known: Type, asked: Type) -> bool | None:
        if isinstance(known, Builtin) and isinstance(asked, Builtin):
            return known.name == asked.name
        if isinstance(known, Instance) and isinstance(asked, Instance):
            return True if asked.cls in self._program.mro(known.cls) else None
        return None

    @contextmanager
    def _narrow(self, scope: Scope, written: str, narrowed: Type) -> Iterator[None]:
        before = dict(scope.narrowed)
        if written:
            scope.narrowed[written] = narrowed
        yield
        scope.narrowed = before

    @contextmanager
    def _guard(self, is_guarded: bool) -> Iterator[None]:
        before, self._is_guarded = self._is_guarded, self._is_guarded or is_guarded
        yield
        self._is_guarded = before

    @contextmanager
    def _allow(self, test: ast.expr) -> Iterator[None]:
        """Inside ``if hasattr(x, "name")`` there may be no ``x.name``."""
        asked = [each for each in ast.walk(test) if isinstance(each, ast.Call) and ast.unparse(each.func) == "hasattr"]
        names = [f"{ast.unparse(each.args[0])}.{ast.unparse(each.args[1])[1:-1]}" for each in asked]  # without quotes
        self._allowed += names
        yield
        del self._allowed[len(self._allowed) - len(names) :]
